"""Numbers that are not numbers, and data of which there is too little."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from tests.faults.cases import Case
from tests.faults.processes import (
    QUICK,
    reference,
    refused,
    run,
    steps_that_load,
    succeeded,
    temporary_files,
)

TOO_FAST = (
    ("optimizer.lr=1e9",),
    ("optimizer.lr=1e9", "trainer.precision=bf16"),
    ("optimizer.lr=1e9", "trainer.accumulate=4", "optimizer.decay=constant"),
    ("optimizer.lr=1e30", "objective=v"),
    ("optimizer.lr=1e9", "objective=x_0", "trainer.grad_clip=1e30"),
    ("optimizer.lr=1e9", "objective.timesteps=loss_aware", "trainer.checkpoint_every=1"),
    ("optimizer.lr=1e9", "optimizer.warmup_steps=40"),
    ("optimizer.lr=1e9", "model=mlp"),
)
PLUGIN = """
from pathlib import Path

import torch

import ddpm
from ddpm.data.dataset import Dataset, Split
from ddpm.data.info import DatasetInfo


@ddpm.register("dataset")
def strange(data_root: Path) -> Dataset:
    images = torch.randint(0, 256, (40, 1, 8, 8)).to(torch.uint8)
    labels = None
    {change}
    facts = DatasetInfo("strange", 1, 8, {classes}, ("only",) * {classes}, levels=256)
    part = Split(images, labels)
    return Dataset(facts, part, part, part)
"""
FLOATS = "images = images.float() / 255; images[3, 0, 4, 4] = "
REFUSED = (
    (FLOATS + "float('nan')", 0, "float32"),
    (FLOATS + "float('inf')", 0, "float32"),
    ("images = images[:0]", 0, "(0, 1, 8, 8)"),
    ("images = images[:, :, :5]", 0, "(40, 1, 5, 8)"),
    ("labels = torch.full((40,), 1)", 1, "labels"),
    ("labels = torch.zeros(40)", 1, "labels"),
)
WORKING = (
    ("images = torch.zeros_like(images)", 0, ()),
    ("images = torch.full_like(images, 255)", 0, ()),
    ("images = images[:1]", 0, ()),
    ("labels = torch.zeros(40, dtype=torch.int64)", 1, ("model.conditional=true",)),
)
SHORT = (*QUICK, "trainer.max_steps=6", "trainer.validate_every=3")


def too_fast(folder: Path, count: int) -> str:
    """Learning rates that blow the weights up."""
    kept = 0
    for trial, settings in enumerate(TOO_FAST[:count]):
        sizes = [setting for setting in QUICK if "channels" not in setting or "model=mlp" not in settings]
        script = run("train", f"run_dir=run-{trial}", *sizes, *settings, cwd=folder)
        refused(script, " step ", "optimizer.lr")
        run_dir = folder / f"run-{trial}"
        kept += len(steps_that_load(run_dir))
        for file in (run_dir / "checkpoints").iterdir():
            for name, tensor in checkpoint.load(file)[1].items():
                if name != "timesteps.history":  # where nan is an empty place
                    assert torch.isfinite(tensor).all(), f"{name} in {file.name} is not finite: {script}"
        assert not temporary_files(run_dir), f"left behind: {script}"
    return f"{min(count, len(TOO_FAST))} trainings stopped; all numbers in the {kept} checkpoints before are finite"


def strange_data(folder: Path, count: int) -> str:
    """Datasets of a user's own: refused by name before the run has a folder, or trained to the end."""
    trials = [(*entry, True) for entry in REFUSED] + [(*entry, False) for entry in WORKING]
    for change, classes, say, bad in trials[:count]:
        (folder / "strange.py").write_text(PLUGIN.format(change=change, classes=classes))
        more = () if bad else say
        settings = ("plugins=strange", "dataset=strange", "model=unet_tiny", *SHORT, *more)
        script = run("train", "run_dir=run", "overwrite=true", *settings, cwd=folder)
        if bad:
            refused(script, "strange", str(say))
            assert not (folder / "run").exists(), f"made a folder for nothing: {script}"
        else:
            succeeded(script)
            succeeded(run("sample", "plugins=strange", "ckpt=run", "n=2", "sampler.num_steps=3", cwd=folder))
    bad, good = min(count, len(REFUSED)), max(0, min(count - len(REFUSED), len(WORKING)))
    return f"{bad} datasets refused by name; {good} odd but sound ones trained and sampled"


def few_images(folder: Path, count: int) -> str:
    """dataset=folder with 0, 1, 2 and 3 images: one each is needed for training, validation and test."""
    for number in range(count):
        images = folder / f"images-{number}"
        images.mkdir()
        for i in range(number):
            Image.fromarray(np.full((9, 9), 80 * i, np.uint8)).save(images / f"{i}.png")
        settings = (
            "dataset=folder",
            f"dataset.path={images.name}",
            "dataset.image_size=8",
            "model=unet_tiny",
            *SHORT,
        )
        script = run("train", f"run_dir=run-{number}", *settings, cwd=folder)
        if number < 3:
            refused(script, images.name, f"{number} images", "at least 3")
            assert not (folder / f"run-{number}").exists(), f"made a folder for nothing: {script}"
        else:
            succeeded(script)
    return f"{count} folders of 0 to {count - 1} images: refused below 3"


def overflowing(folder: Path, count: int) -> str:
    """Weights that are finite, but so large that sampling overflows."""
    source = locate.saved_steps(reference(*QUICK))[-1]
    meta, tensors = checkpoint.load(source)
    samplers = ("dpmpp_2m_sde", "ddim", "ddpm", "heun", "unipc", "dpmpp_2m")
    for sampler in samplers[:count]:
        file = folder / "huge.safetensors"
        checkpoint.save(file, {name: _huge(name, tensor) for name, tensor in tensors.items()}, meta)
        settings = (f"sampler={sampler}", "sampler.num_steps=4", "n=3", "device=cpu")
        script = run("sample", f"ckpt={file.name}", *settings, cwd=folder)
        refused(script, "not finite", "step 1 of 4", "0, 1, 2")
        assert [path.name for path in folder.iterdir()] == [file.name], f"left behind by: {script}"
    return f"{min(count, len(samplers))} samplers: images and step named, no picture written"


def _huge(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not name.startswith("ema.") or not tensor.is_floating_point():
        return tensor
    return torch.full_like(tensor, math.sqrt(torch.finfo(torch.float32).max))


CASES = (
    Case(
        "a learning rate far too high",
        "Exit 2 naming step, value and optimizer.lr; no checkpoint holds a number that is not finite.",
        short=1,
        long=len(TOO_FAST),
        run=too_fast,
    ),
    Case(
        "datasets with broken numbers",
        "NaN, infinity, other types and shapes are refused by name; all-black images and a single one are trained on.",
        short=1,
        long=len(REFUSED) + len(WORKING),
        run=strange_data,
    ),
    Case(
        "folders of few images",
        "Fewer than 3 images are refused, 3 are trained on.",
        short=0,
        long=4,
        run=few_images,
    ),
    Case(
        "weights that overflow",
        "ddpm-sample exits with 2, names images and step, and writes no picture.",
        short=0,
        long=6,
        run=overflowing,
    ),
)
