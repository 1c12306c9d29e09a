"""`import ddpm`: cheap, typed, and the same images as ddpm-sample draws."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
from ddpm.checkpoint import locate
from ddpm.cli import train
from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check
from ddpm.train.checkpointing import save
from ddpm.train.state import prepare
from tests.conftest import run_script
from tests.train.test_training import CPU, config, tiny_data

ROOT = Path(__file__).parents[1]
QUICK = [
    "model.channels=[8,16]",
    "model.head_dim=8",
    "model.conditional=true",
    "trainer.batch_size=8",
    "trainer.max_steps=2",
    "trainer.sample_every=0",
    "run_dir=run",
    "device=cpu",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a short conditional run on digits is `run`."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("ddpm.train.validation.EVALUATIONS", 34)
        train.train(check(TrainConfig, hydra.compose("train", QUICK)))
    return folder


@pytest.fixture(scope="module")
def model(home: Path) -> ddpm.Model:
    """Its last weights, made large enough for the classes to count."""
    model = ddpm.load(home / "run", device="cpu", ema=False)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def run_python(code: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_import_is_cheap_until_something_is_used() -> None:
    code = """
import sys, ddpm
assert "load" in dir(ddpm) and issubclass(ddpm.UserError, Exception)
heavy = {"torch", "numpy", "hydra", "omegaconf", "PIL", "sklearn", "matplotlib", "diffusers"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
ddpm.load
assert "torch" in sys.modules and not heavy - {"torch", "numpy", "PIL"} & sys.modules.keys()
try:
    ddpm.lead
except AttributeError as error:
    assert str(error) == "module 'ddpm' has no attribute 'lead'"
else:
    raise SystemExit("ddpm.lead")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_all_that_is_offered_is_there_and_documented() -> None:
    for name in ddpm.__all__:
        assert getattr(ddpm, name).__doc__, name
    assert set(ddpm.api.__all__) < set(ddpm.__all__)


@pytest.mark.slow
def test_mypy_sees_the_types(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "import ddpm\nreveal_type(ddpm.load('latest').sample(4))\nddpm.load('a').sample('four')\nddpm.lead\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--cache-dir",
            str(tmp_path / "c"),
            str(tmp_path / "user.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"MYPYPATH": str(ROOT / "src"), "PATH": ""},
    )
    assert 'Revealed type is "torch._tensor.Tensor"' in done.stdout, done.stdout
    assert 'incompatible type "str"' in done.stdout
    # a module's __getattr__ answers for every name, so mypy cannot know that this one is wrong; Python does
    assert done.stdout.count("error:") == 1


def test_a_run_folder_a_file_and_latest_are_one_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = [path for path in locate.of_run(home / "run") if path.name.startswith("step_")]
    monkeypatch.chdir(home)
    (home / "outputs").mkdir(exist_ok=True)
    (home / "outputs" / "again").symlink_to(home / "run")
    models = [ddpm.load(ckpt, "cpu") for ckpt in (file, str(home / "run"), "outputs/again")]
    for other in models[1:]:
        assert torch.equal(other.sample(2, num_steps=2), models[0].sample(2, num_steps=2))
    assert models[0].step == 2 and models[0].figures["val_eps_mse"] > 0
    assert models[0].facts.name == "digits" and models[0].config.trainer.max_steps == 2
    ema, last = (
        torch.cat([p.flatten() for p in ddpm.load(file, "cpu", ema=ema).network.parameters()])
        for ema in (True, False)
    )
    assert not torch.equal(ema, last)


def test_images_are_those_of_ddpm_sample(home: Path) -> None:
    typed = ["sampler=ddim", "sampler.num_steps=5", "sampler.eta=0.5", "label=[3,1]", "guidance_scale=2"]
    arguments = ["ckpt=run", "n=5", "seed=7", "device=cpu", "save=[npz]", "out=drawn", "batch_size=5"]
    done = run_script("sample", *arguments, *typed, cwd=home)
    assert done.returncode == 0, done.stderr
    expected = np.load(home / "drawn" / "samples.npz")["images"]
    model = ddpm.load(home / "run", device="cpu")
    options: dict[str, Any] = {
        "label": [3, 1],
        "guidance_scale": 2,
        "sampler": "ddim",
        "num_steps": 5,
        "eta": 0.5,
    }
    images = model.sample(5, seed=7, **options)
    assert images.shape == (5, 1, 8, 8) and images.dtype == torch.float32 and images.device == CPU
    assert images.abs().max() <= 1
    assert (ddpm.to_uint8(images)[..., 0] == expected).all() and expected.std() > 10
    # and with nothing said, the sampler of the training
    done = run_script("sample", "ckpt=run", "n=2", "device=cpu", "save=[npz]", "out=plain", cwd=home)
    assert (ddpm.to_uint8(model.sample(2))[..., 0] == np.load(home / "plain" / "samples.npz")["images"]).all()


def test_an_image_is_named_by_seed_and_index(model: ddpm.Model) -> None:
    whole = model.sample(6, num_steps=4)
    assert (model.sample(index=[5, 2], num_steps=4) - whole[[5, 2]]).abs().max() < 1e-4
    assert (model.sample(6, num_steps=4, batch_size=4) - whole).abs().max() < 1e-4
    assert (model.sample(6, num_steps=4, seed=1) - whole).abs().max() > 0.1
    assert (model.sample(6, num_steps=4, label=0) - whole)[1:].abs().max() > 1e-3
    numpy = model.sample(np.int64(2), index=np.array([5, 2]), label=torch.arange(10), num_steps=np.int64(4))
    assert (numpy - whole[[5, 2]]).abs().max() < 1e-4


def test_images_are_tensors_like_any_other(model: ddpm.Model) -> None:
    images = model.sample(2, num_steps=2)
    assert not images.is_inference() and not images.requires_grad
    weight = torch.ones((), requires_grad=True)
    (images * weight).sum().backward()  # which an inference tensor refuses
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": -5}, "n=-5: must be a number from 1 to"),
        ({"n": 2.5}, "n=2.5: must be a number from 1 to"),
        ({"seed": -1}, "seed=-1: must be"),
        ({"label": 10}, "label=10: digits has the labels 0 to 9"),
        ({"label": "cat"}, "label=cat: digits has the labels 0 to 9"),
        ({"index": [-1]}, "index=-1"),
        ({"index": []}, r"index=\[\]: must be a number, or a list of at least one"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"sampler": "ddimm"}, "sampler=ddimm: must be one of ddim, ddpm, .*did you mean 'ddim'"),
        ({"num_steps": 0}, "sampler.num_steps=0: must be a number from 1"),
        ({"num_steps": 1001}, "sampler.num_steps = 1001: .* 1000"),
        ({"steps": 20}, "unknown key 'sampler.steps'; did you mean 'num_steps'"),
        ({"sampler": "dpmpp_2m", "eta": 0.0}, "unknown key 'sampler.eta'"),
        ({"sampler": "ddpm", "variance": "learned"}, "sampler.variance=learned: this model was trained with"),
        ({"spacing": "karas"}, "sampler.spacing"),
        ({"clip": "clipp"}, "sampler.clip=clipp: must be one of none, clip, dynamic"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_with_its_key(model: ddpm.Model, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ddpm.UserError, match=words) as refusal:
        model.sample(**{"n": 2, "num_steps": 2, **options})
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_loaded_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    for ckpt, words in ((tmp_path / "none", "does not exist"), (tmp_path / "a.pt", "can run code")):
        with pytest.raises(ddpm.UserError, match=words):
            ddpm.load(ckpt)


def test_a_broken_newest_checkpoint_is_warned_of(tmp_path: Path) -> None:
    run = prepare(config(), tiny_data(), CPU)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (3, 9):
        run.step = step
        save(run, folder / f"step_{step:07d}.safetensors", {})
    newest = folder / "step_0000009.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="step_0000009.*is broken") as said:
        model = ddpm.load(tmp_path, device="cpu")
    assert model.step == 3 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddpm.load(folder / "step_0000003.safetensors", device="cpu")
    with pytest.raises(ddpm.UserError, match="conditional=true"):
        model.sample(1, label=0)


def test_out_of_memory_halves_the_batch_with_a_warning(
    model: ddpm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, forward = model.sample(5, num_steps=2), model.network.forward

    def small(x: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *others)

    monkeypatch.setattr(model.network, "forward", small)
    with pytest.warns(RuntimeWarning, match="batch_size=2") as said:
        halves = model.sample(5, num_steps=2)
    assert (halves - whole).abs().max() < 1e-4 and said[0].filename == __file__


def test_save_grid(model: ddpm.Model, tmp_path: Path) -> None:
    ddpm.save_grid(model.sample(6, num_steps=2), tmp_path / "a.png", nrow=3)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 58 + 2, 2 * 58 + 2) and picture.mode == "L"
    with pytest.raises(OSError):
        ddpm.save_grid(torch.zeros(1, 1, 8, 8), tmp_path / "none" / "a.png")


def test_bf16_is_the_networks_alone_and_near_float32(model: ddpm.Model) -> None:
    low = replace(model, precision=torch.bfloat16)
    whole, rounded = (each.sample(8, sampler="ddim", num_steps=4) for each in (model, low))
    assert rounded.dtype == torch.float32
    error = (whole - rounded).square().mean().sqrt().item()
    assert 0 < error < 0.05
