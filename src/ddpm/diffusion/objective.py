"""Objectives: what a network is trained to predict, and how its errors are weighted."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm.diffusion.process import PREDICTIONS, add_noise, split, target
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.errors import one_of, positive

# Loss weights w on the squared error of x_0: tables (T,) over t, from snr = alpha^2 / sigma^2. Each takes its own
# parameter and ignores the others, so that an objective can pass all it has to any of them.


def uniform(snr: Tensor, **_: float) -> Tensor:
    """Weigh every squared error of eps the same: L_simple (Ho et al. 2020, eq. 14)."""
    return snr


def min_snr(snr: Tensor, *, min_snr_gamma: float = 5.0, **_: float) -> Tensor:
    """Return min(snr, gamma) (Hang et al. 2023, section 3.4). gamma must be above 0."""
    positive("min_snr_gamma", min_snr_gamma)
    return snr.clamp(max=min_snr_gamma)


def p2(snr: Tensor, *, p2_gamma: float = 1.0, **_: float) -> Tensor:
    """Weigh the error of eps by 1 / (k + snr)^gamma, k = 1 (Choi et al. 2022, eq. 8). gamma must be above 0."""
    positive("p2_gamma", p2_gamma)
    return snr / (1 + snr) ** p2_gamma


def sigmoid(snr: Tensor, *, sigmoid_bias: float = 2.0, **_: float) -> Tensor:
    """Weigh noise levels by w = sigmoid(bias - log snr), whatever the schedule (Kingma & Gao 2023).

    L_w = 1/2 E[w (-d log snr / dt) |error of eps|^2], t in [0, 1]. Raises ValueError for fewer than two timesteps.
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
    """Compute an objective's tables in float64 and cast them to float32 on `device`.

    Raises ValueError, with the reason, for what could not be trained. `vlb_weight` is a factor on a bound in nats;
    that of Nichol & Dhariwal (2021) is on bits, times T / 1000.
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
    """Return the loss of each image, (N,), for x_0 (N, C, H, W) in [-1, 1], times t (N,) int64 and noise eps like x_0.

    With a learned variance: L_hybrid (Nichol & Dhariwal 2021, eq. 16): see `vlb_terms`.
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
    """Return KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each pixel, in nats, from the squared `error`.

    Both are normal (Ho et al. 2020, eq. 1 and 6). The log variance of p stands at `fraction` between those of the
    posterior and the transition (Nichol & Dhariwal 2021, eq. 15), whose ratio is sigma_t^2 / sigma_{t-1}^2.
    The squared distance of the means over the posterior's variance is (snr_{t-1} - snr_t) |error of x_0|^2
    (Kingma et al. 2021, eq. 13).
    """
    gap, log_range = (table[t].view(-1, 1, 1, 1) for table in (objective.vlb_gap, objective.vlb_log_range))
    log_ratio = fraction * log_range  # log of p's variance over the posterior's
    return 0.5 * (log_ratio + torch.expm1(-log_ratio) + torch.exp(-log_ratio) * gap * error)
