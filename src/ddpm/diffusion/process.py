"""The algebra of diffusion: noising, posterior, what a network predicts, the training loss and the denoiser.

Everything holds for any pair (alpha, sigma), variance-preserving or not.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm.checks import one_of, positive, within
from ddpm.diffusion.guidance import guide, threshold
from ddpm.diffusion.schedules import Level, NoiseSchedule

Scale = float | Tensor  # alpha or sigma: a number, or one for each image (N, 1, 1, 1)


def add_noise(x_0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """A sample of q(x_t | x_0) (Ho et al. 2020, eq. 4): x_t = alpha x_0 + sigma eps."""
    return alpha * x_0 + sigma * eps


@dataclass(frozen=True)
class Posterior:
    """q(x_s | x_t, x_0) for two levels s < t: mean = x_t_factor x_t + x_0_factor x_0, and its variance."""

    x_t_factor: float
    x_0_factor: float
    variance: float
    transition_variance: float  # sigma^2_{t|s}, that of q(x_t | x_s)


def posterior(t: Level, s: Level) -> Posterior:
    """Kingma et al. 2021 (*Variational Diffusion Models*), appendix A.2; Ho et al. 2020, eq. 7."""
    alpha_ts = t.alpha / s.alpha
    variance_ts = -math.expm1(2 * (t.lambda_ - s.lambda_)) * t.sigma**2  # no digits lost between close levels
    return Posterior(
        x_t_factor=alpha_ts * s.sigma**2 / t.sigma**2,
        x_0_factor=s.alpha * variance_ts / t.sigma**2,
        variance=variance_ts * s.sigma**2 / t.sigma**2,
        transition_variance=variance_ts,
    )


# What a network may predict: (a, b) of the target a x_0 + b eps, from alpha and sigma.
PREDICTIONS: dict[str, Callable[[Any, Any], tuple[Scale, Scale]]] = {
    "eps": lambda alpha, sigma: (0.0, 1.0),  # Ho et al. 2020, eq. 14
    "x_0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans & Ho 2022, section 4
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # Lipman et al. 2023, section 4.1: the straight path's velocity
}


def target(prediction: str, x_0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """What the network should have said."""
    a, b = PREDICTIONS[prediction](alpha, sigma)
    return a * x_0 + b * eps


def invert(prediction: str, output: Tensor, x_t: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
    """(x_0, eps) by Cramer's rule from x_t = alpha x_0 + sigma eps and output = a x_0 + b eps."""
    a, b = PREDICTIONS[prediction](alpha, sigma)
    determinant = alpha * b - sigma * a  # on the factors, as numbers cost less than images
    if isinstance(determinant, float) and determinant == 0:  # eps where alpha = 0 says nothing of x_0
        determinant = math.nan
    x_0 = b / determinant * x_t - sigma / determinant * output
    return x_0, alpha / determinant * output - a / determinant * x_t


# Loss weights w on the squared error of x_0: tables over t, from that of snr = alpha^2 / sigma^2. Each takes
# its own parameter and lets the others pass, so that an objective can hand all it has to any of them.


def uniform(snr: Tensor, **_: float) -> Tensor:
    """Every error in eps counts the same: L_simple (Ho et al. 2020, eq. 14)."""
    return snr


def min_snr(snr: Tensor, *, min_snr_gamma: float = 5.0, **_: float) -> Tensor:
    """min(snr, gamma) (Hang et al. 2023, section 3.4)."""
    positive("min_snr_gamma", min_snr_gamma)
    return snr.clamp(max=min_snr_gamma)


def p2(snr: Tensor, *, p2_gamma: float = 1.0, **_: float) -> Tensor:
    """1 / (k + snr)^gamma on the error of eps, with k = 1 (Choi et al. 2022, eq. 8)."""
    positive("p2_gamma", p2_gamma)
    return snr / (1 + snr) ** p2_gamma


def sigmoid(snr: Tensor, *, sigmoid_bias: float = 2.0, **_: float) -> Tensor:
    """L_w = 1/2 E[w (-d log snr / dt) |error of eps|^2], w = sigmoid(bias - log snr), t in [0, 1] (Kingma &
    Gao 2023). The slope makes it the same weighting of noise levels whatever the schedule.
    """
    if len(snr) < 2:
        raise ValueError("weight = sigmoid: takes the slope of log snr, so num_timesteps must be at least 2")
    slope = -torch.gradient(snr.log())[0] * len(snr)
    return 0.5 * slope * snr * torch.sigmoid(sigmoid_bias - snr.log())


WEIGHTS: dict[str, Callable[..., Tensor] | None] = {
    "plain": None,  # the prediction's own squared error, at every t the same
    "uniform": uniform,
    "min_snr": min_snr,
    "p2": p2,
    "sigmoid": sigmoid,
}


@dataclass(frozen=True, eq=False)
class Objective:
    """What the network learns: float32 tables (T,) over t, on the device of the training."""

    prediction: str
    alpha: Tensor
    sigma: Tensor
    weight: Tensor  # on the squared error of the prediction
    vlb_scale: float  # of the bound that teaches the variance; 0: the variance is not learned
    vlb_gap: Tensor  # snr_{t-1} - snr_t on the squared error of x_0, as a factor of the prediction's
    vlb_log_range: Tensor  # log of the largest over the smallest variance of p(x_{t-1} | x_t)


def make_objective(
    schedule: NoiseSchedule,
    device: torch.device | str,
    *,
    prediction: str,
    weight: str,
    learned_variance: bool = False,
    vlb_weight: float = 0.001,
    **weight_parameters: float,
) -> Objective:
    """Tables in float64, cast at the end. Refuses, with the reason, what could not be trained.

    A weight w on the error of x_0 becomes one on the prediction's by the chain rule: `invert` says
    x_0 = ... - (sigma / determinant) output, so it is w (sigma / determinant)^2.
    """
    one_of("prediction", prediction, PREDICTIONS)
    one_of("weight", weight, WEIGHTS)
    alpha, sigma = schedule.alpha, schedule.sigma
    if prediction == "eps" and alpha[-1] == 0:
        raise ValueError("prediction = eps: says nothing of x_0 at the last t, where alpha = 0; take v")
    a, b = PREDICTIONS[prediction](alpha, sigma)
    x_0_per_output = sigma / (alpha * b - sigma * a)
    snr = (alpha / sigma) ** 2
    of_x_0 = WEIGHTS[weight]
    w = torch.ones_like(snr) if of_x_0 is None else of_x_0(snr, **weight_parameters) * x_0_per_output**2
    _refuse_untrained(w.float(), weight, prediction)
    positive("vlb_weight", vlb_weight)
    gap, log_range = _vlb_tables(schedule)
    return Objective(
        prediction,
        alpha=alpha.to(device, torch.float32),
        sigma=sigma.to(device, torch.float32),
        weight=w.to(device, torch.float32),
        vlb_scale=vlb_weight * len(snr) if learned_variance else 0.0,
        vlb_gap=(gap * x_0_per_output**2).to(device, torch.float32),
        vlb_log_range=log_range.to(device, torch.float32),
    )


def _refuse_untrained(w: Tensor, weight: str, prediction: str) -> None:
    bad = ~((w > 0) & (w < math.inf))
    if bad.any():
        t = int(bad.int().argmax())
        raise ValueError(
            f"weight = {weight}: is {w[t]:g} for prediction = {prediction} at t = {t}, which "
            "stays untrained unless it is above 0 and finite; take plain"
        )


def _vlb_tables(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """(gap, log_range) of `vlb_terms`. Both are 0 at t = 0: there the variance is fixed, and with the mean's
    gradient stopped nothing is left to learn.
    """
    snr = (schedule.alpha / schedule.sigma) ** 2
    gap, log_range = torch.zeros_like(snr), torch.zeros_like(snr)
    gap[1:] = snr[:-1] - snr[1:]
    log_range[1:] = 2 * (schedule.sigma[1:] / schedule.sigma[:-1]).log()
    return gap, log_range


def losses(
    network: nn.Module, objective: Objective, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None
) -> Tensor:
    """The loss of each image, (N,), for times t (N,) int64 and noise eps (N, C, H, W).

    With a learned variance L_hybrid (Nichol & Dhariwal 2021, eq. 16): see `vlb_terms`.
    """
    tables = (objective.alpha, objective.sigma, objective.weight)
    alpha, sigma, weight = (table[t].view(-1, 1, 1, 1) for table in tables)
    output, fraction = split(network(add_noise(x_0, eps, alpha, sigma), t, y).float(), x_0.shape[1])
    error = (output - target(objective.prediction, x_0, eps, alpha, sigma)).square()
    loss = weight * error
    if objective.vlb_scale:
        assert fraction is not None, "a learned variance needs a network with twice the channels"
        loss = loss + objective.vlb_scale * vlb_terms(objective, error.detach(), fraction, t)
    return loss.mean(dim=(1, 2, 3))


def vlb_terms(objective: Objective, error: Tensor, fraction: Tensor, t: Tensor) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each pixel, in nats, from the squared `error`.

    Both are normal (Ho et al. 2020, eq. 5). The log variance of p stands at `fraction` between those of the
    posterior and the transition (Nichol & Dhariwal 2021, eq. 15), whose ratio is sigma_t^2 / sigma_{t-1}^2.
    The squared distance of the means over the posterior's variance is (snr_{t-1} - snr_t) |error of x_0|^2
    (Kingma et al. 2021, eq. 13).
    """
    gap, log_range = (table[t].view(-1, 1, 1, 1) for table in (objective.vlb_gap, objective.vlb_log_range))
    log_ratio = fraction * log_range  # log of p's variance over the posterior's
    return 0.5 * (log_ratio + torch.expm1(-log_ratio) + torch.exp(-log_ratio) * gap * error)


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(prediction, fraction): a network with twice the channels also says where in its range the log variance
    lies, -1 at the smallest and 1 at the largest; `fraction` has these at 0 and 1.
    """
    if output.shape[1] == channels:
        return output, None
    return output[:, :channels], (output[:, channels:] + 1) / 2


CLIPS = ("none", "clip", "dynamic")


class Estimate(NamedTuple):
    """What a denoiser makes of x_t. `fraction` is that of `split`, None where the variance is not learned."""

    x_0: Tensor
    eps: Tensor
    fraction: Tensor | None = None


@dataclass(eq=False)
class Denoiser:
    """A network with what it was trained on: gives the estimate of (x_0, eps) that samplers work with."""

    network: nn.Module
    schedule: NoiseSchedule
    prediction: str
    y: Tensor | None = None  # (N,) labels
    clip: str = "clip"
    dynamic_percentile: float = 0.995
    guidance_scale: float = 1.0  # 1 is off, 0 is unconditional
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)  # of sigma / alpha
    null_label: int | None = None
    precision: torch.dtype = torch.float32  # of the network; all else is float32
    evaluations: int = field(default=0, init=False)  # passes of one image through the network so far

    def __post_init__(self) -> None:
        one_of("clip", self.clip, CLIPS)
        within("dynamic_percentile", self.dynamic_percentile, 0, 1)
        within("guidance_scale", self.guidance_scale, 0, math.inf)
        within("guidance_rescale", self.guidance_rescale, 0, 1)
        low, high = self.guidance_interval
        if not 0 <= low <= high:
            raise ValueError(f"guidance_interval = [{low}, {high}]: need 0 <= low <= high")
        if self.guidance_scale != 1 and (self.y is None or self.null_label is None):
            raise ValueError(f"guidance_scale = {self.guidance_scale}: needs labels and a null label; else 1")

    def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate:
        """x_t (N, C, H, W) at one noise level; `last` says that x_0 will be the image itself.

        Where x_0 is clipped, eps follows from the clipped x_0; the old one would leave a grey residue.
        """
        output, fraction = split(self._output(x_t, level), x_t.shape[1])
        x_0, eps = invert(self.prediction, output, x_t, level.alpha, level.sigma)
        if self.clip != "none":
            dynamic = self.clip == "dynamic" and not last  # whose division would grey the image itself
            x_0 = threshold(x_0, self.dynamic_percentile if dynamic else None)
            eps = (x_t - level.alpha * x_0) / level.sigma
        return Estimate(x_0, eps, fraction)

    def _output(self, x_t: Tensor, level: Level) -> Tensor:
        """Guided inside the interval of noise levels (Kynkäänniemi et al. 2024), conditional outside."""
        t = torch.full((len(x_t),), level.t, device=x_t.device)
        low, high = self.guidance_interval
        scale = self.guidance_scale if low <= math.exp(-level.lambda_) <= high else 1.0
        if scale == 1:
            return self._evaluate(x_t, t, self.y)
        assert self.y is not None and self.null_label is not None
        null = torch.full_like(self.y, self.null_label)
        if scale == 0:
            return self._evaluate(x_t, t, null)
        both = self._evaluate(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([self.y, null]))
        self.evaluations += 1  # one call, but two passes of each image
        cond, uncond = both.chunk(2)
        return guide(cond, uncond, x_t.shape[1], scale, self.guidance_rescale)

    def _evaluate(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.evaluations += 1
        low = self.precision != torch.float32
        with torch.autocast(x_t.device.type, self.precision) if low else nullcontext():
            output: Tensor = self.network(x_t, t, y)
        return output.float()
