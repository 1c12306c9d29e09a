import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import ddpm
from ddpm.datasets.types import Dataset, Facts, Split, hold_out
from ddpm.samplers import Denoise, Noise, Step
from ddpm.schedules import Level, NoiseSchedule


@ddpm.register("schedule")
def arc(num_timesteps: int, power: float = 1.0) -> NoiseSchedule:
    """alpha and sigma walk a quarter of a circle; with power above 1 they start slowly."""
    if power <= 0:
        raise ValueError(f"power = {power}: must be above 0")
    t = (torch.arange(num_timesteps, dtype=torch.float64) + 0.5) / num_timesteps
    angle = math.pi / 2 * t**power
    return NoiseSchedule(angle.cos(), angle.sin())


@ddpm.register("sampler", num_steps=20)
def renoise(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise, *, fresh: float = 1.0
) -> Iterator[Step]:
    """Guess the clean image and noise it again for the next level, with new noise in the part `fresh`."""
    for k, (t, s) in enumerate(pairwise(levels)):
        estimate = denoiser(x, t, last=s.sigma == 0)
        eps = math.sqrt(1 - fresh**2) * estimate.eps + fresh * noise(k)
        x = s.alpha * estimate.x_0 + s.sigma * eps
        yield Step(x, estimate.x_0, s)


@ddpm.register("dataset")
def discs(data_root: Path, image_size: int = 16, count: int = 2000) -> Dataset:
    """White discs on black, anywhere."""
    place = torch.rand(2, count, 1, 1, generator=torch.Generator().manual_seed(0)) * image_size
    pixel = torch.arange(image_size) + 0.5
    distance = torch.hypot(pixel - place[0], pixel[:, None] - place[1])
    images = 255 * (distance < image_size / 4).to(torch.uint8)
    rest, test = hold_out(Split(images[:, None], labels=None), count // 10)
    train, val = hold_out(rest, count // 10)
    facts = Facts("discs", channels=1, image_size=image_size, num_classes=0, class_names=(), levels=2)
    return Dataset(facts, train, val, test)
