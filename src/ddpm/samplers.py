"""Samplers: from pure noise to images, one noise level after the other.

A sampler is a generator `(denoiser, levels, x_T, noise, **options)` that yields a `Step` after each level. A
caller that wants the images takes the last, one that wants a film takes them all. `denoiser(x_t, level)` returns
(x_0, eps); `levels` runs from the noisiest to the clean image (`sample_levels`); `noise(k)` returns the k-th
standard normal tensor of this batch. Coefficients are Python floats from float64, so nothing waits for a GPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ddpm.diffusion import posterior
from ddpm.schedules import Level, NoiseSchedule

Denoise = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
Noise = Callable[[int], Tensor]


class Step(NamedTuple):
    """x (N, C, H, W) at noise level `level`, and the x_0 that was estimated on the way there."""

    x: Tensor
    x_0: Tensor
    level: Level


def sample_levels(schedule: NoiseSchedule, num_steps: int, spacing: str = "linspace") -> list[Level]:
    """num_steps noise levels from the noisiest, then the clean image: num_steps + 1 in all."""
    return [schedule.at(t) for t in SPACINGS[spacing](schedule, num_steps)] + [schedule.at(-1)]


def linspace(schedule: NoiseSchedule, num_steps: int) -> list[float]:
    """Equal steps of t from T-1 to 0, both included."""
    last = schedule.num_timesteps - 1
    return [last * (1 - i / max(num_steps - 1, 1)) for i in range(num_steps)]


def ddpm(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise, *, variance: str = "small"
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) between any two levels: a draw from q(x_s | x_t, x_0).

    variance "small" is the posterior's own (beta tilde), "large" that of q(x_t | x_s) (beta), ibid. section 3.2.
    """
    for k, (t, s) in enumerate(pairwise(levels)):
        x_0 = denoiser(x, t).x_0
        q = posterior(t, s)
        x = q.x_t_factor * x + q.x_0_factor * x_0
        if s.sigma > 0:
            x = x + math.sqrt(q.variance if variance == "small" else q.transition_variance) * noise(k)
        yield Step(x, x_0, s)


def ddim(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise, *, eta: float = 0.0
) -> Iterator[Step]:
    """Song et al. 2021 (*DDIM*), eq. 12: eta = 0 is deterministic, eta = 1 is ancestral sampling."""
    for k, (t, s) in enumerate(pairwise(levels)):
        x_0, eps = denoiser(x, t)[:2]
        std = eta * math.sqrt(posterior(t, s).variance)
        x = s.alpha * x_0 + math.sqrt(s.sigma**2 - std**2) * eps
        if std > 0:
            x = x + std * noise(k)
        yield Step(x, x_0, s)


SPACINGS: dict[str, Callable[[NoiseSchedule, int], list[float]]] = {"linspace": linspace}
SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {"ddpm": ddpm, "ddim": ddim}
