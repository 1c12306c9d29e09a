"""ddpm-export: what diffusers makes of the folder is what ddpm makes of the checkpoint."""

import ast
import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import ddpm
from ddpm.cli import export as command
from ddpm.config import hydra
from ddpm.config.choices import Component
from ddpm.config.schema import ExportConfig, TrainConfig, check, to_dict
from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.samplers import SAMPLERS, sample_levels
from ddpm.errors import CheckpointError, UserError
from ddpm.export import crosscheck, formats, model_card
from ddpm.export import folder as folder_module
from ddpm.io import folders
from ddpm.sample import model as sample_model
from ddpm.sample import sampling
from ddpm.train.checkpointing import save
from ddpm.train.state import prepare
from tests.checkpoint.test_checkpoint import rewrite
from tests.conftest import Command
from tests.networks.test_networks import scrambled
from tests.train.test_training import CPU, config, tiny_data

SHORT = ["schedule.num_timesteps=20"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def trained(folder: Path, *overrides: str) -> Path:
    """A checkpoint with every weight random, the averaged ones other than the last."""
    torch.manual_seed(0)
    run = prepare(config(*overrides), tiny_data(), CPU)
    scrambled(run.network), scrambled(run.ema)
    run.step = 7
    folder.mkdir(parents=True, exist_ok=True)
    save(run, folder / "step_0000007.safetensors", {"val_loss": 0.5, "val_eps_mse": 0.25})
    return folder / "step_0000007.safetensors"


def exported(
    tmp_path: Path, *overrides: str, form: str = "diffusers", ema: bool = True
) -> tuple[ddpm.Model, Path]:
    ckpt = trained(tmp_path / "run", *overrides)
    command.export(ExportConfig(str(ckpt), form, str(tmp_path / "out"), ema))
    return ddpm.load(ckpt, "cpu", ema), tmp_path / "out"


def noise(model: ddpm.Model, n: int = 3) -> Tensor:
    return torch.randn(n, *model.shape, generator=torch.Generator().manual_seed(5))


# eps has no x_0 at zero terminal SNR, which training refuses
RECIPES = [
    (prediction, schedule, zero)
    for prediction in ("eps", "v", "x_0")
    for schedule in ("linear", "cosine", "sigmoid")
    for zero in ("false", "true")
    if (prediction, zero) != ("eps", "true")
]


@pytest.mark.parametrize(("prediction", "schedule", "zero"), RECIPES)
def test_diffusers_draws_the_same(tmp_path: Path, prediction: str, schedule: str, zero: str) -> None:
    """The table, one call of the network, and every state on the way from pure noise, not only the clipped end."""
    model, out = exported(
        tmp_path, f"objective={prediction}", f"schedule={schedule}", f"schedule.zero_terminal_snr={zero}"
    )
    pipelines = [kind.from_pretrained(out) for kind in (diffusers.DDPMPipeline, diffusers.DDIMPipeline)]
    for pipeline in pipelines:
        table = pipeline.scheduler.alphas_cumprod.double()
        torch.testing.assert_close(
            table, model.schedule.alpha**2, rtol=0, atol=7e-8
        )  # half a digit of float32
        torch.testing.assert_close(table[:-1], (model.schedule.alpha**2)[:-1], rtol=2e-7, atol=0)
    x, t = noise(model), torch.tensor([0, 500, 999])
    with torch.no_grad():
        ours, theirs = model.network(x, t), pipelines[0].unet(x, t).sample
    assert ours.std() > 0.05
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    for clip in ("clip", "none"):
        assert_same_states(model, pipelines[1], clip)


def assert_same_states(model: ddpm.Model, pipeline: Any, clip: str) -> None:
    steps = 20
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=clip == "clip")
    scheduler.set_timesteps(steps)
    levels = sample_levels(model.schedule, steps, "trailing")
    assert [level.t for level in levels[:-1]] == scheduler.timesteps.tolist()
    denoise = Denoiser(model.network, model.schedule, model.config.objective.prediction, clip=clip)
    x = noise(model)
    with torch.no_grad():
        for t, step in zip(
            scheduler.timesteps, SAMPLERS["ddim"](denoise, levels, x, torch.zeros), strict=True
        ):
            x = scheduler.step(pipeline.unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
            scale = max(1.0, step.x.abs().max().item())  # of eps without clipping, x_0 is up to 1 / alpha
            assert (x - step.x).abs().max() < 1e-4 * scale, (clip, t)
    assert step.x.std() > 0.1


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_is_the_same(
    tmp_path: Path, variance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDPMPipeline's own steps, all of them, with our noise."""
    sampler = ["sampler=ddpm", f"sampler.variance={variance}"]
    model, out = exported(tmp_path, *SHORT, "objective=v", "schedule=cosine", *sampler)
    pipeline = diffusers.DDPMPipeline.from_pretrained(out)
    assert pipeline.scheduler.config.variance_type == f"fixed_{variance}"
    drawn = [torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(k)) for k in range(21)]
    feed = iter([drawn[20], *drawn])
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *a, **k: next(feed))
    images = pipeline(batch_size=2, num_inference_steps=20, output_type="np").images
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    path = sample_model.levels(model, model.config.sampler)
    denoise = sample_model.denoiser(model, model.config.sampler, None, sample_model.Guidance())
    steps = SAMPLERS["ddpm"](denoise, path, drawn[20], lambda k: drawn[k], variance=variance)
    ours = sampling.last(steps).clamp(-1, 1)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert ours.std() > 0.1 and ours.abs().lt(1).float().mean() > 0.05


def example(out: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    return code


def run_example(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(out)
    scope: dict[str, Any] = {}
    exec(example(out), scope)
    return scope


def test_the_cards_example_draws_our_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = exported(tmp_path, *SHORT, "objective=v")
    images = run_example(out, monkeypatch)["images"]
    assert len(images) == 5
    x_T = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(0))
    ours = ddpm.to_uint8(crosscheck.ours(model, x_T, None))[..., 0].astype(int)
    assert ours.std() > 10
    for image, pixels in zip(images, ours, strict=False):  # theirs are rounded PIL images
        assert abs(torch.tensor(list(image.get_flattened_data())).view(8, 8).numpy() - pixels).max() <= 1


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_the_cards_conditional_example_guides_as_we_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    recipe = ["objective=v", "model.conditional=true", f"objective.label_dropout={dropout}"]
    model, out = exported(tmp_path, *SHORT, *recipe)
    assert not (out / "model_index.json").exists()
    code = example(out)
    assert len(code.splitlines()) <= 16 and ("scale" in code) == (dropout > 0)
    images = run_example(out, monkeypatch)["images"] * 2 - 1
    sampler = formats.ddim_as_exported(model)
    y = torch.arange(model.facts.num_classes)
    guidance = sample_model.Guidance(model_card.SCALE if dropout else 1.0)
    x_T = torch.randn(len(y), *model.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoise = sample_model.denoiser(model, sampler, y, guidance)
        path = sample_model.levels(model, sampler)
        ours = sampling.last(sampling.run(model, sampler, denoise, path, x_T, y, 0)).clamp(-1, 1)
        other = sample_model.denoiser(model, sampler, y.flip(0), guidance)
        unlike = sampling.last(sampling.run(model, sampler, other, path, x_T, y, 0)).clamp(-1, 1)
    torch.testing.assert_close(images, ours, atol=1e-4, rtol=0)
    assert (unlike - ours).abs().max() > 0.01  # the label counts
    assert "Labels: 0 `a`, 1 `b`, 2 `c`." in (out / "README.md").read_text()


@pytest.mark.parametrize("ema", [True, False])
def test_weights_and_config_alone_rebuild_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: bool
) -> None:
    recipe = ["objective=flow", "schedule=straight", "model.conditional=true", *SHORT]
    model, out = exported(tmp_path, *recipe, form="safetensors", ema=ema)
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == model.network.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.network.state_dict().items())
    scope = run_example(out, monkeypatch)
    torch.testing.assert_close(scope["images"], model.sample(16, seed=0), atol=1e-5, rtol=0)
    assert scope["images"].std() > 0.1
    about = json.loads((out / "config.json").read_text())
    assert about["step"] == 7 and about["figures"] == {"val_loss": 0.5, "val_eps_mse": 0.25}


def test_every_file_is_named_and_the_check_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = exported(tmp_path, *SHORT)
    *files, checked = capsys.readouterr().out.splitlines()
    assert {Path(line) for line in files} == {path for path in out.rglob("*") if path.is_file()}
    assert re.fullmatch(
        rf"checked with diffusers {diffusers.__version__}: 4 images from the same noise, 20 steps of DDIM: "
        r"largest difference \d\.\de-\d+ in \[-1, 1\]",
        checked,
    )


def test_without_diffusers_the_folder_is_written_and_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, with_it = exported(tmp_path / "a", *SHORT)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    _, without = exported(tmp_path / "b", *SHORT)
    assert capsys.readouterr().out.splitlines()[-1].startswith("the folder is complete; to see that")
    for file in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (with_it / file).read_bytes() == (without / file).read_bytes()


def test_only_the_check_imports_diffusers() -> None:
    package = Path(ddpm.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "diffusers" for name in names):
                assert file.name == "crosscheck.py", file


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["schedule=straight"], "schedule=straight is not variance-preserving"),
        (["objective=flow", "schedule=cosine"], "objective.prediction=flow is not known"),
        (["objective.learned_variance=true"], "objective.learned_variance=true: its DDIMScheduler"),
    ],
    ids=str,
)
def test_what_diffusers_cannot_hold_is_refused_with_the_reason(
    tmp_path: Path, overrides: list[str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as refusal:
        exported(tmp_path, *overrides)
    assert "format=safetensors takes any model" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_the_mlp_is_refused_and_exported_as_safetensors(tmp_path: Path) -> None:
    run = prepare(check(TrainConfig, hydra.compose("train", ["model=mlp", *SHORT])), tiny_data(), CPU)
    scrambled(run.network), scrambled(run.ema)
    save(run, tmp_path / "a.safetensors", {})
    model = ddpm.load(tmp_path / "a.safetensors", "cpu")
    with pytest.raises(UserError, match="model=mlp is none of its networks"):
        formats.diffusers_files(model)
    command.export(ExportConfig(str(tmp_path / "a.safetensors"), "safetensors", str(tmp_path / "out"), True))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == run.ema.state_dict().keys()


def test_a_plugins_schedule_needs_only_to_preserve_variance(tmp_path: Path) -> None:
    """arc of docs/extending.md, whose angle grows with t^1.5."""
    model, _ = exported(tmp_path, *SHORT, "objective=v")
    angle = torch.pi / 2 * ((torch.arange(20, dtype=torch.float64) + 0.5) / 20) ** 1.5
    arc = type(model.schedule)(angle.cos(), angle.sin())
    bent = dataclasses.replace(model, schedule=arc)
    folder = tmp_path / "arc"
    for name, data in formats.diffusers_files(bent).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert crosscheck.largest_difference(bent, folder) < 1e-4
    assert crosscheck.largest_difference(model, folder) > crosscheck.ALLOWED  # another schedule is noticed


def test_a_folder_that_draws_other_images_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = trained(tmp_path / "run", *SHORT, "objective=v")
    right = formats.trained_betas
    monkeypatch.setattr(formats, "trained_betas", lambda schedule: right(schedule)[::-1])
    with pytest.raises(UserError, match=r"draws other images .* nothing was kept"):
        command.export(ExportConfig(str(ckpt), "diffusers", str(tmp_path / "a" / "b"), True))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty folder"])
def test_nothing_is_left_of_a_failed_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    ckpt, out, write = (
        trained(tmp_path / "run", *SHORT),
        tmp_path / "new" / "deeper" / "out",
        folder_module.write_atomically,
    )
    if there:
        out.mkdir(parents=True)

    def full(path: Path, data: bytes) -> None:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(folder_module, "write_atomically", full)
    with pytest.raises(UserError, match=r"cannot write to .*out: No space left on device"):
        command.export(ExportConfig(str(ckpt), "diffusers", str(out), True))
    assert (list(out.iterdir()) == []) if there else not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    ckpt = trained(tmp_path / "run", *SHORT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for out in ("out", "out/thesis.txt"):
        with pytest.raises(UserError, match="exists already, and is no empty folder"):
            command.export(ExportConfig(str(ckpt), "diffusers", str(tmp_path / out), True))
    with pytest.raises(UserError, match=r"cannot make .*it is no folder"):
        command.export(ExportConfig(str(ckpt), "diffusers", str(tmp_path / "out" / "thesis.txt" / "b"), True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_broken_and_hostile_checkpoints_are_refused(tmp_path: Path) -> None:
    ckpt = trained(tmp_path / "run", *SHORT)
    data = ckpt.read_bytes()
    changes = {
        "unknown key 'model._target_'": lambda fields: fields["config"]["model"].update(_target_="os.system"),
        "no plain value": lambda fields: fields["config"].update(data_root="${oc.env:HOME}"),
        "does not fit its own config": lambda fields: fields["config"]["model"].update(channels=[8, 32]),
        "with a name of plain text": lambda fields: fields["facts"].update(name="\x1b[2J"),
    }
    for words, change in changes.items():
        ckpt.write_bytes(data)
        rewrite(ckpt, change)
        with pytest.raises(CheckpointError, match=re.escape(words)):
            command.export(ExportConfig(str(ckpt), "diffusers", str(tmp_path / "out"), True))
    ckpt.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is broken"):
        command.export(ExportConfig(str(ckpt), "diffusers", str(tmp_path / "out"), True))
    assert not (tmp_path / "out").exists()


HOSTILE = "$(touch owned)` | ``` <b>\"'>"


def test_names_from_a_checkpoint_are_neither_markup_nor_commands(tmp_path: Path) -> None:
    ckpt = trained(tmp_path / "run", *SHORT, "model.conditional=true")

    def change(fields: dict[str, Any]) -> None:
        fields["facts"].update(name=HOSTILE, class_names=[HOSTILE] * 3)
        fields["config"]["sampler"].update(spacing=HOSTILE)

    rewrite(ckpt, change)
    command.export(ExportConfig(str(ckpt), "safetensors", str(tmp_path / "out"), True))
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "ddpm"
    (line,) = [line for line in text.splitlines() if line.startswith("ddpm-train")]
    assert any(HOSTILE.replace("'", "\\'") in word for word in shlex.split(line))
    for line in text.splitlines():
        if "touch owned" in line and not line.startswith("ddpm-train"):
            assert "<b>" not in re.sub(r"`[^`]*`", "", line)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "model.conditional=true",
            "objective=v",
            "objective.weight=min_snr",
            "schedule=cosine",
            "sampler=heun",
        ],
        ["schedule.beta_end=0.03", "sampler.spacing=[900,500,0]", "seed=3", "model.attention=[]"],
        ["optimizer=muon", "trainer.max_epochs=2"],
    ],
    ids=str,
)
def test_the_cards_command_composes_the_same_config(tmp_path: Path, overrides: list[str]) -> None:
    ckpt = trained(tmp_path / "run", *overrides, "data_root=/home/secret", "run_dir=/home/secret/run")
    line = model_card.training_command(ddpm.load(ckpt, "cpu"))
    program, *words = shlex.split(line)
    again = check(TrainConfig, hydra.compose("train", hydra.read_overrides(words)))
    was = ddpm.load(ckpt, "cpu").config
    assert program == "ddpm-train"
    assert to_dict(again) == {**to_dict(was), "data_root": again.data_root, "run_dir": None}


def test_no_path_of_the_machine_is_published(tmp_path: Path) -> None:
    ckpt = trained(tmp_path / "run", *SHORT, "data_root=/home/secret/data", "run_dir=/home/secret/run")

    def change(fields: dict[str, Any]) -> None:
        fields["config"]["trainer"].update(init_from="/home/secret/other", resume="/home/secret/run")
        fields["config"]["dataset"] = {"name": "folder", "path": "/home/secret/pictures", "image_size": 8}

    rewrite(ckpt, change)
    for form in formats.FORMATS:
        command.export(ExportConfig(str(ckpt), form, str(tmp_path / form), True))
        for file in (tmp_path / form).rglob("*"):
            assert not file.is_file() or b"secret" not in file.read_bytes(), file
        text = (tmp_path / form / "README.md").read_text()
        assert "dataset.path=<images> trainer.init_from=<checkpoint>" in text


def test_a_card_names_the_licence_that_forbids(tmp_path: Path) -> None:
    model, out = exported(tmp_path, *SHORT)
    header = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert header == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "ddpm", "image-generation"],
    }
    persian = dataclasses.replace(model.config, dataset=Component("persian", {}))
    text = model_card.card(dataclasses.replace(model, config=persian), "diffusers", True, "")
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "other"
    assert "Free for research, not for commercial use." in text


@pytest.mark.parametrize(
    ("T", "steps"), [(1000, 50), (100, 50), (20, 20), (3, 3), (1, 1), (997, 997), (60, 30)]
)
def test_steps_of_ddim_divide_the_timesteps(T: int, steps: int) -> None:
    assert formats.ddim_steps(T) == steps


def test_the_command_as_it_is_installed(command: Command, tmp_path: Path) -> None:
    trained(tmp_path / "outputs" / "run" / "checkpoints", *SHORT)
    result = command("export", "ckpt=latest", "out=mine", real=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # nothing of what diffusers has to say
    assert "mine/README.md" in result.stdout.splitlines()
    shutil.rmtree(tmp_path / "outputs")


def test_a_failed_export_takes_no_other_along(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="cannot write"),
        folders.new_folder(tmp_path / "exports" / "a") as out,
    ):
        (tmp_path / "exports" / "b").mkdir(parents=True)
        (out / "half").write_text("")
        raise OSError(28, "No space left on device")
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["b"]
    with pytest.raises(KeyError), folders.new_folder(tmp_path / "new" / "deep"):
        raise KeyError
    assert not (tmp_path / "new").exists()
