"""Noise schedules: for t = 0 … T-1 the pair (alpha_t, sigma_t) with x_t = alpha_t x_0 + sigma_t eps.

A schedule is a function of its parameters that returns a `NoiseSchedule`. To add one, write the function, put
it into `SCHEDULES` and add `configs/schedule/<name>.yaml` with its parameters.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddpm.errors import within

MAX_BETA = 0.999  # Nichol & Dhariwal 2021, section 3.2: no single step destroys everything


@dataclass(frozen=True)
class Level:
    """One noise level: time index t (may be fractional; -1 is the clean image) with its alpha and sigma."""

    t: float
    alpha: float
    sigma: float

    @property
    def lambda_(self) -> float:
        """Half the log signal-to-noise ratio, log(alpha / sigma), in [-inf, inf]."""
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The table of a schedule: alpha and sigma, both (T,) float64 on the CPU, from almost clean to pure
    noise.

    Between the integers, times are interpolated in the angle phi = atan2(sigma, alpha) and the length
    hypot(alpha, sigma) (which is 1 for variance-preserving schedules). Unlike lambda the angle is finite at
    both ends: 0 for the clean image, which stands at t = -1, and pi/2 for pure noise.
    """

    alpha: Tensor
    sigma: Tensor
    _angle: list[float] = field(init=False, repr=False)
    _length: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.alpha.dtype == self.sigma.dtype == torch.float64 and self.alpha.shape == self.sigma.shape
        angle = torch.atan2(self.sigma, self.alpha)
        growth = angle.diff(prepend=angle.new_zeros(1))
        if not (growth > 0).all():
            t = int((growth > 0).int().argmin())
            raise ValueError(f"the schedule adds no noise at t = {t}: sigma / alpha must grow with every t")
        object.__setattr__(self, "_angle", [0.0, *angle.tolist()])
        object.__setattr__(self, "_length", [1.0, *torch.hypot(self.sigma, self.alpha).tolist()])

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    @property
    def lambda_(self) -> Tensor:
        """(T,) float64, decreasing; -inf where alpha is 0."""
        return (self.alpha / self.sigma).log()

    def at(self, t: float) -> Level:
        """Return the level at time t in [-1, T-1], interpolated between the integers."""
        i = min(max(int(t + 1), 0), self.num_timesteps - 1)
        if t == i - 1:
            return self._exact(i - 1)
        if t == i:
            return self._exact(i)
        part = t + 1 - i
        angle = self._angle[i] + part * (self._angle[i + 1] - self._angle[i])
        length = self._length[i] + part * (self._length[i + 1] - self._length[i])
        return Level(t, length * math.cos(angle), length * math.sin(angle))

    def _exact(self, i: int) -> Level:
        if i == -1:
            return Level(-1.0, 1.0, 0.0)
        return Level(float(i), self.alpha[i].item(), self.sigma[i].item())

    def at_lambda(self, lambda_: float) -> Level:
        """Return the level with this lambda, or the nearest end of 0 … T-1 where the schedule does not reach it."""
        angle = math.atan2(1.0, math.exp(min(lambda_, 700.0)))
        i = bisect_left(self._angle, angle)
        if i <= 1:
            return self.at(0)
        if i > self.num_timesteps:
            return self.at(self.num_timesteps - 1)
        part = (angle - self._angle[i - 1]) / (self._angle[i] - self._angle[i - 1])
        return self.at(i - 2 + part)


def is_noise(level: Level) -> bool:
    """Return whether sampling may start here from N(0, sigma^2 I): alpha is at most a tenth."""
    return level.alpha <= 0.1


def from_betas(beta: Tensor, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """Make a variance-preserving schedule from betas (T,): alpha_bar_t = prod (1 - beta_s) (Ho et al. 2020, eq. 4).

    `zero_terminal_snr` shifts and scales alpha so that the last is 0 and the first stays (Lin et al. 2024,
    algorithm 1). Computed by way of log alpha and 1 - alpha, so that sigma keeps all its digits near t = 0.
    """
    log_alpha = 0.5 * torch.log1p(-beta.double()).cumsum(0)
    alpha, lost = log_alpha.exp(), -torch.expm1(log_alpha)
    if zero_terminal_snr:
        if len(beta) < 2:
            raise ValueError("num_timesteps = 1: zero_terminal_snr needs at least 2")
        first, last = alpha[0].clone(), alpha[-1].clone()
        alpha = first * (alpha - last) / (first - last)
        lost = (first * lost - last * lost[0]) / (first - last)
    return NoiseSchedule(alpha, (lost * (1 + alpha)).sqrt())


def from_alpha_bar(alpha_bar: Tensor, zero_terminal_snr: bool) -> NoiseSchedule:
    """Make a schedule from alpha_bar at the T + 1 borders of the time steps, the first being the clean image."""
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    return from_betas(beta.clamp(max=MAX_BETA), zero_terminal_snr)


def linear(
    num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False
) -> NoiseSchedule:
    """Let betas rise linearly (Ho et al. 2020, section 4). Defined for T = 1000, else scaled by 1000 / T."""
    within("num_timesteps", num_timesteps, 1, math.inf)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start = {beta_start}, beta_end = {beta_end}: need 0 < start <= end < 1")
    beta = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64) * (1000 / num_timesteps)
    return from_betas(beta.clamp(max=MAX_BETA), zero_terminal_snr)


def cosine(num_timesteps: int, s: float = 0.008, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """Let alpha_bar(t) = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi / 2) (Nichol & Dhariwal 2021, eq. 17).

    Only ratios of alpha_bar enter, so that f(0) cancels. Betas are clipped at 0.999.
    """
    within("num_timesteps", num_timesteps, 1, math.inf)
    within("s", s, 0, 1)
    t = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    return from_alpha_bar(torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2, zero_terminal_snr)


def sigmoid(
    num_timesteps: int,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Let alpha_bar(t) = (S(end) - S(x)) / (S(end) - S(start)), S = sigmoid(. / tau), x from start to end.

    tau below 1 makes the schedule cleaner at the clean end and noisier at the noisy one.

    Jabri et al. 2022 (*Scalable Adaptive Computation for Iterative Generation*); written out in Chen 2023
    (*On the Importance of Noise Scheduling*), algorithm 1. Betas are clipped as for the cosine.
    """
    within("num_timesteps", num_timesteps, 1, math.inf)
    if not (-math.inf < start < end < math.inf and 0 < tau < math.inf):
        raise ValueError(f"start = {start}, end = {end}, tau = {tau}: need start < end and 0 < tau, finite")
    ramp = torch.sigmoid(torch.linspace(start, end, num_timesteps + 1, dtype=torch.float64) / tau)
    return from_alpha_bar((ramp[-1] - ramp) / (ramp[-1] - ramp[0]), zero_terminal_snr)


def straight(num_timesteps: int) -> NoiseSchedule:
    """Let alpha = 1 - t, sigma = t at the middles of T equal slices of [0, 1].

    The straight line from image to noise of flow matching (Lipman et al. 2023, section 4.1) and of rectified flow
    (Liu et al. 2023).
    """
    within("num_timesteps", num_timesteps, 1, math.inf)
    t = (torch.arange(num_timesteps, dtype=torch.float64) + 0.5) / num_timesteps
    return NoiseSchedule(1 - t, t)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "straight": straight,
}
