"""The library behind `import ddpm`, which imports it and torch at the first use.

import ddpm

model = ddpm.load("outputs/train/2026-01-31/12-00-00")
images = model.sample(16, seed=0, sampler="ddim", num_steps=20)
ddpm.save_grid(images, "digits.png")
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.config.choices import choose_sampler
from ddpm.config.limits import like
from ddpm.config.schema import DrawConfig, check
from ddpm.io.images import save_grid, to_uint8
from ddpm.runtime import device as runtime_device
from ddpm.runtime.world import ALONE
from ddpm.sample import model as models
from ddpm.sample import sampler_file
from ddpm.sample.model import labels
from ddpm.sample.sampling import draw_all, generation

__all__ = ["Model", "load", "save_grid", "to_uint8"]


class Model(models.Model):
    """A trained model. Draw images with `sample`."""

    def sample(
        self,
        n: int = 64,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
        label: int | str | Sequence[int | str] | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        batch_size: int = 256,
        **settings: Any,
    ) -> Tensor:
        """Draw images, float32 (n, C, H, W) in [-1, 1] on the CPU; ddpm-sample draws the same for the same values.

        Image i of a seed does not depend on n, batch_size or the other images; `index` gives the images' numbers
        instead of 0 … n-1. Image i has the class label[i mod K], a number or, where it is none, a name of the
        checkpoint's classes; `label` defaults to all classes. `sampler` names a sampler with its own defaults; without
        it, sampler.yaml beside the checkpoint counts, else the training's sampler. `settings` are the sampler's keys,
        such as num_steps, spacing, clip, eta. Guidance is that which the training recommends, or of `guidance_scale`.
        Raises UserError that names the key for a value that is out of range or does not fit the model.
        """
        guided = sampler_file.recommended_guidance(self.config)
        if guidance_scale is not None:
            guided = {**sampler_file.NO_GUIDANCE, "guidance_scale": guidance_scale}
        typed = {"n": n, "seed": seed, "index": index, "label": label, "batch_size": batch_size, **guided}
        typed = {key: _plain(value) for key, value in typed.items()}
        todo: DrawConfig = check(DrawConfig, typed)
        base = sampler if sampler is not None else sampler_file.default(self.config, self.folder)[0]
        chosen = choose_sampler(base, {key: _plain(value) for key, value in settings.items()})
        guidance = models.guidance(todo)

        def halved(left: int, size: int) -> None:
            warnings.warn(f"out of memory: going on with batch_size={size}", RuntimeWarning, stacklevel=5)

        with runtime_device.own_defaults():
            numbers = torch.tensor(todo.index) if todo.index else torch.arange(todo.n)
            y, places = labels(self, todo.label, numbers, guidance), torch.arange(len(numbers))
            steps, size = generation(self, chosen, numbers, todo.seed), todo.batch_size
            x, _ = draw_all(self, chosen, guidance, y, places, steps, size, lambda at, step: None, halved)
            return x.clamp_(-1, 1)


def load(ckpt: str | Path, device: str | torch.device = "auto", ema: bool = True) -> Model:
    """Load the model of a checkpoint file, of a run's folder, or of the "latest" run under outputs/.

    `device` is auto, cpu, cuda or cuda:1; `ema=False` loads the last weights instead of their moving average. Of a run,
    the newest intact checkpoint is loaded; a UserWarning names newer ones that are broken. No code in a file is run.
    Raises UserError; CheckpointError if there is no checkpoint.
    """
    ema, found = like(True, _plain(ema), "ema", None), runtime_device.device(str(device))
    with runtime_device.own_defaults():
        _, model, _, notes = models.load_newest(str(ckpt), ALONE, found, ema, "auto")
    for note in notes:
        warnings.warn(note.removeprefix("warning: "), stacklevel=2)
    return Model(**vars(model))


def _plain(value: Any) -> Any:
    """Convert arrays and numbers of other libraries to Python's, which config checks accept."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
