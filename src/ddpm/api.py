"""ddpm as a library: what `import ddpm` offers, imported when it is first asked for, as torch takes its time.

import ddpm

model = ddpm.load("outputs/train/2026-01-31/12-00-00")
images = model.sample(16, seed=0, sampler="ddim", num_steps=20)
ddpm.save_grid(images, "digits.png")
"""

import warnings
from pathlib import Path

import torch

from ddpm import build
from ddpm.checkpoint import file as checkpoint
from ddpm.io.images import save_grid, to_uint8
from ddpm.sample import sampling
from ddpm.sample.sampling import Model

__all__ = ["Model", "load", "save_grid", "to_uint8"]


def load(ckpt: str | Path, device: str | torch.device = "auto", ema: bool = True) -> Model:
    """The model in a checkpoint file, in a run's folder, or in the "latest" run under outputs/, ready to draw from.

    `device` is auto, cpu, cuda or cuda:1; `ema=False` takes the last weights in place of the averaged ones. Of a run
    the newest whole checkpoint counts; a UserWarning tells of newer ones that are broken. Nothing in a file is run.
    Raises UserError: CheckpointError where there is nothing to load.
    """
    path, notes = checkpoint.newest_good(checkpoint.find(str(ckpt)), check=build.examine)
    for note in notes:
        warnings.warn(note.removeprefix("warning: "), stacklevel=2)
    model, _ = sampling.load(path, build.device(str(device)), ema)
    return model
