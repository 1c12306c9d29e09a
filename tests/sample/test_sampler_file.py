"""sampler.yaml beside a checkpoint: who takes it, what wins over it, and that it can be no more than a sampler."""

from pathlib import Path

import pytest
import torch

import ddpm
from ddpm.cli import default_sampler
from ddpm.config import hydra
from ddpm.config.choices import Component, choose_sampler
from ddpm.config.schema import EvalConfig, SampleConfig, check
from ddpm.errors import UserError
from ddpm.sample import sampler_file
from ddpm.sample.sampler_file import trained_sampler
from ddpm.train.checkpointing import save
from ddpm.train.state import prepare
from tests.train.test_training import CPU, config, tiny_data

DDIM = choose_sampler("ddim", {"num_steps": 3, "eta": 0.5})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint of a run, `checkpoints/step_0000001.safetensors`."""
    run = prepare(config(), tiny_data(), CPU)
    run.step = 1
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "step_0000001.safetensors"
    save(run, path, {})
    return path


def taken(file: Path, *typed: str) -> Component:
    """The sampler that ddpm-sample takes."""
    overrides = hydra.read_overrides([f"ckpt={file}", *typed])
    first = default_sampler.overrides("sample", overrides)
    composed: SampleConfig = check(SampleConfig, hydra.compose("sample", first + overrides))
    return composed.sampler


def test_it_is_taken_unless_another_one_is_typed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert taken(file).name == "dpmpp_2m_sde" and not capsys.readouterr().out
    sampler_file.write(file.parent / "sampler.yaml", DDIM, ["a study\nof", "two lines"])
    assert taken(file) == DDIM and "sampler=ddim as in" in capsys.readouterr().out
    assert taken(file.parents[1]) == DDIM  # the run's folder
    more = taken(file, "sampler.num_steps=7", "sampler.spacing=logsnr")
    assert more.params == {**DDIM.params, "num_steps": 7, "spacing": "logsnr"}
    capsys.readouterr()
    assert taken(file, "sampler=heun").name == "heun" and taken(file, "task=interpolate").params["eta"] == 0
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"sampler\.order"):
        taken(file, "sampler.order=3")


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_guidance_is_that_which_the_training_recommends(tmp_path: Path, dropout: float) -> None:
    """Where the model can have it, and nothing else is typed."""
    guided = ["guidance_scale=3", "guidance_rescale=0.5", "guidance_interval=[0.2,2]"]
    more = ["model.conditional=true", f"objective.label_dropout={dropout}", "sampler.num_steps=3", *guided]
    trained = prepare(config(*more), tiny_data(), CPU)
    with torch.no_grad():
        for weight in trained.ema.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    save(trained, tmp_path / "a.safetensors", {})

    def found(*typed: str, program: str = "sample", schema: type = SampleConfig) -> tuple[object, ...]:
        overrides = hydra.read_overrides([f"ckpt={tmp_path / 'a.safetensors'}", *typed])
        first = default_sampler.overrides(program, overrides)
        composed = check(schema, hydra.compose(program, first + overrides))
        return tuple(getattr(composed, key) for key in sampler_file.NO_GUIDANCE)

    recommended = (3.0, 0.5, [0.2, 2.0]) if dropout else (1.0, 0.0, None)
    assert found() == found("sampler=ddim") == found(program="eval", schema=EvalConfig) == recommended
    assert found("guidance_interval=null") == (*recommended[:2], None)
    assert found("guidance_scale=2") == (2.0, 0.0, None) and found("task=reconstruct") == (1.0, 0.0, None)
    model = ddpm.load(tmp_path / "a.safetensors", device="cpu")
    plain, full = (model.sample(2, guidance_scale=scale) for scale in ((1, 3) if dropout else (1, 1)))
    assert torch.equal(model.sample(2), plain) is not bool(dropout)
    assert torch.equal(model.sample(2), full) is not bool(dropout)  # which is everywhere, without rescale


def test_the_library_takes_it_too(file: Path) -> None:
    model = ddpm.load(file, device="cpu")
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    trained = model.sample(2, num_steps=2)
    sampler_file.write(file.parent / "sampler.yaml", DDIM, [])
    assert torch.equal(model.sample(2), model.sample(2, sampler="ddim", num_steps=3, eta=0.5))
    assert torch.equal(model.sample(2, num_steps=4), model.sample(2, sampler="ddim", num_steps=4, eta=0.5))
    (file.parent / "sampler.yaml").write_text("name: none")
    assert torch.equal(model.sample(2, sampler="dpmpp_2m_sde", num_steps=2), trained)
    with pytest.raises(UserError, match="delete the file, or name another sampler"):
        model.sample(2)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for name in ("ddim", "ddpm", "heun", "unipc", "dpmpp_2m", "dpmpp_2m_sde"):
        for settings in ({}, {"spacing": [900.5, 1e-5, 0.0]}):
            sampler = choose_sampler(name, {**settings, "dynamic_percentile": 1e-7})
            sampler_file.write(
                tmp_path / "sampler.yaml", sampler, ["written by ddpm", "name: other", "\x1b[2J"]
            )
            assert sampler_file.read(tmp_path / "sampler.yaml") == sampler
    assert sampler_file.read(tmp_path / "none.yaml") is None


def test_a_key_that_is_younger_than_the_file_has_its_old_meaning(tmp_path: Path) -> None:
    sampler = choose_sampler("heun", {})
    sampler_file.write(tmp_path / "sampler.yaml", sampler, [])
    text = (tmp_path / "sampler.yaml").read_text()
    (tmp_path / "sampler.yaml").write_text(text.replace("cap: true\n", ""))
    assert "cap" in text and sampler_file.read(tmp_path / "sampler.yaml") == sampler


GOOD = "name: dpmpp_2m\nnum_steps: 9\nspacing: logsnr\nrho: 7.0\nclip: clip\ndynamic_percentile: 0.995\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a set of keys with a name"),
        ("[1, 2]", "no set of keys"),
        ("name: [", "no YAML"),
        ("name: \x00", "no YAML"),
        ("\xff\xfe", "no YAML"),
        ("name: os.system", "sampler.name='os.system': must be one of"),
        ("name: !!python/object/apply:os.system [id]", "tags"),
        ("name: !!python/name:os.system", "tags"),
        (GOOD + "_target_: os.system\n", "unknown key 'sampler._target_'"),
        (GOOD + "1: 2\n", "unknown key 'sampler.1'"),
        (GOOD.replace("rho: 7.0\n", ""), "'sampler.rho' is missing"),
        (GOOD + "name: ddim\n", "'name' stands twice"),
        (GOOD.replace("9", "0"), "sampler.num_steps=0: must be a number from 1"),
        (GOOD.replace("9", "true"), "sampler.num_steps=True"),
        (GOOD.replace("9", "9" * 5000), "sampler.num_steps=9999"),
        (GOOD.replace("9", "2020-13-45"), "sampler.num_steps=2020-13-45"),
        (GOOD.replace("7.0", ".nan"), "sampler.rho=nan"),
        (GOOD.replace("logsnr", "${oc.env:HOME}"), "plain values"),
        (GOOD + "a: {b: 1}\n", "unknown key 'sampler.a'"),
        (GOOD.replace("logsnr", "[[1]]"), "sampler.spacing=[1]: must be a number"),
        (GOOD.replace("clip: clip", "clip: &a clip") + "x: *a\n", "anchors, aliases"),
        ("a: &a [x]\nb: &b [*a, *a]\n<<: {c: 1}", "plain values"),
        ("name: " + "[" * 5000, "cannot be used"),
        ("#" * 70_000, "more than the 65536 allowed"),
        ("{" + "x" * 900 + ": 1, name: ddim}", "unknown key"),
    ],
)
def test_it_can_be_no_more_than_a_sampler(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "sampler.yaml"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError) as refusal:
        sampler_file.read(path)
    said = str(refusal.value)
    assert said.startswith(f"{path} cannot be used: ") and words in said and len(said) < 700
    assert said.endswith("delete the file, or name another sampler (sampler=…)") and "\n" not in said


def test_it_must_be_a_file_and_fit_the_model(tmp_path: Path) -> None:
    (tmp_path / "a" / "sampler.yaml").mkdir(parents=True)
    with pytest.raises(UserError, match="it is not a regular file"):
        sampler_file.read(tmp_path / "a" / "sampler.yaml")
    few = config("schedule.num_timesteps=8")
    sampler_file.write(
        tmp_path / "sampler.yaml", choose_sampler("ddim", {"num_steps": 9}), ["written by ddpm"]
    )
    with pytest.raises(UserError, match="num_steps=9: the model has 8 timesteps; delete the file"):
        sampler_file.default(few, tmp_path)
    sampler_file.write(
        tmp_path / "sampler.yaml", choose_sampler("ddpm", {"num_steps": None}), ["written by ddpm"]
    )
    assert sampler_file.default(few, tmp_path)[0].params["num_steps"] is None
    assert sampler_file.default(few, tmp_path / "none") == (trained_sampler(few), None)
