"""From a network to images: the sampler a config names, run over images of given indices."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.config import Choice
from ddpm.datasets.types import Facts
from ddpm.diffusion import Denoiser
from ddpm.randomness import normal
from ddpm.samplers import SAMPLERS, Step, sample_levels
from ddpm.schedules import NoiseSchedule


def sample(
    network: nn.Module, schedule: NoiseSchedule, prediction: str, sampler: Choice, facts: Facts, index: Tensor, seed: int
) -> Iterator[Step]:
    """The steps that draw images `index` (N,) int64 of seed `seed`; each image depends on its own index alone.

    Runs on the device of `index`, in float32. Raises UserError where the sampler does not fit the schedule.
    """
    shape = (facts.channels, facts.image_size, facts.image_size)
    options: dict[str, Any] = {**sampler.params}
    num_steps = options.pop("num_steps") or schedule.num_timesteps
    levels = sample_levels(schedule, num_steps, options.pop("spacing"), options.pop("rho"))
    denoiser = Denoiser(
        network, schedule, prediction, clip=options.pop("clip"), dynamic_percentile=options.pop("dynamic_percentile")
    )
    x_T = normal(seed, "x_T", 0, index, shape) * levels[0].sigma
    return SAMPLERS[sampler.name](
        denoiser, levels, x_T, lambda k: normal(seed, "sampler", k, index, shape), **options
    )


@torch.inference_mode()
def last(steps: Iterator[Step]) -> Tensor:
    """The images at the end of a sampler, (N, C, H, W)."""
    for step in steps:
        x = step.x
    return x
