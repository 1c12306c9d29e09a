"""Spacings: the times at which a sampler evaluates the network on its way from t = T-1 to t = 0.

Each returns num_steps falling times within [0, T-1], fractional where it must be: rounded to integers, some
would coincide. To add one, write the function and put it into `SPACINGS`.
"""

import math
from collections.abc import Callable

from ddpm.diffusion.schedules import NoiseSchedule

LAMBDA_OF_NOISE = -5.0  # alpha / sigma = 0.007: no steps are spent where it is noisier, nothing changes there


def linspace(schedule: NoiseSchedule, num_steps: int, **_: float) -> list[float]:
    """Take equal steps of t from T-1 to 0, both included."""
    last = schedule.num_timesteps - 1
    return _steps(last, 0, num_steps)


def leading(schedule: NoiseSchedule, num_steps: int, **_: float) -> list[float]:
    """Take the start of each of num_steps equal slices of 0 … T-1 (Song et al. 2021, *DDIM*).

    It begins before T-1, where the image still shows (Lin et al. 2024, table 2): for few steps take `trailing`.
    Raises ValueError for a single step.
    """
    if num_steps == 1 < schedule.num_timesteps:
        raise ValueError("spacing = leading: would take its single step at the clean end; take trailing")
    return [schedule.num_timesteps * i / num_steps for i in reversed(range(num_steps))]


def trailing(schedule: NoiseSchedule, num_steps: int, **_: float) -> list[float]:
    """Take the end of each of num_steps equal slices of 0 … T-1 (Lin et al. 2024, section 3.3)."""
    return [schedule.num_timesteps * i / num_steps - 1 for i in range(num_steps, 0, -1)]


def logsnr(schedule: NoiseSchedule, num_steps: int, **_: float) -> list[float]:
    """Take equal steps of lambda (Lu et al. 2022, *DPM-Solver*)."""
    noisiest, cleanest = _lambda_ends(schedule)
    return _times(schedule, _steps(noisiest, cleanest, num_steps))


def karras(schedule: NoiseSchedule, num_steps: int, *, rho: float) -> list[float]:
    """Take equal steps of (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5)."""
    noisiest, cleanest = (math.exp(-lambda_ / rho) for lambda_ in _lambda_ends(schedule))
    return _times(schedule, [-rho * math.log(root) for root in _steps(noisiest, cleanest, num_steps)])


def _lambda_ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """lambda at T-1, or -5 where that is lower or even -inf; and at 0."""
    noisiest, cleanest = schedule.at(schedule.num_timesteps - 1).lambda_, schedule.at(0).lambda_
    return max(noisiest, min(LAMBDA_OF_NOISE, cleanest - 1)), cleanest


def _times(schedule: NoiseSchedule, lambdas: list[float]) -> list[float]:
    """Return the times of these lambdas; the first is exactly T-1."""
    return [schedule.num_timesteps - 1.0] + [schedule.at_lambda(lambda_).t for lambda_ in lambdas[1:]]


def _steps(first: float, last: float, num_steps: int) -> list[float]:
    """Equal steps, exact at both ends; the first alone where num_steps is 1."""
    n = max(num_steps - 1, 1)
    return [(first * (n - i) + last * i) / n for i in range(num_steps)]


SPACINGS: dict[str, Callable[..., list[float]]] = {
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
    "logsnr": logsnr,
    "karras": karras,
}
