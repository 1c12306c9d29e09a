"""The algebra of diffusion: noising, the posterior, and what a network may predict.

Everything holds for any pair (alpha, sigma), variance-preserving or not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddpm.diffusion.schedules import Level

Scale = float | Tensor  # alpha or sigma: a number, or one for each image (N, 1, 1, 1)


def add_noise(x_0: Tensor, eps: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """Return x_t = alpha x_0 + sigma eps, a draw from q(x_t | x_0) (Ho et al. 2020, eq. 4), for eps ~ N(0, I)."""
    return alpha * x_0 + sigma * eps


@dataclass(frozen=True)
class Posterior:
    """q(x_s | x_t, x_0) for two levels s < t: mean = x_t_factor x_t + x_0_factor x_0, and its variance."""

    x_t_factor: float
    x_0_factor: float
    variance: float
    transition_variance: float  # sigma^2_{t|s}, that of q(x_t | x_s)


def posterior(t: Level, s: Level) -> Posterior:
    """Compute q(x_s | x_t, x_0) for s cleaner than t.

    Kingma et al. 2021 (*Variational Diffusion Models*), appendix A.2; Ho et al. 2020, eq. 7.
    """
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
    """Return what the network is trained to predict, shaped like x_0 (N, C, H, W)."""
    a, b = PREDICTIONS[prediction](alpha, sigma)
    return a * x_0 + b * eps


def invert(prediction: str, output: Tensor, x_t: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
    """Return (x_0, eps), by Cramer's rule from x_t = alpha x_0 + sigma eps and output = a x_0 + b eps."""
    a, b = PREDICTIONS[prediction](alpha, sigma)
    determinant = alpha * b - sigma * a  # on the factors, as numbers cost less than images
    if isinstance(determinant, float) and determinant == 0:  # eps where alpha = 0 says nothing of x_0
        determinant = math.nan
    x_0 = b / determinant * x_t - sigma / determinant * output
    return x_0, alpha / determinant * output - a / determinant * x_t


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Split a network's output (N, C or 2 C, H, W) into (prediction, fraction).

    The second C channels, if any, say where in its range the log variance lies: -1 is the smallest, 1 the largest.
    `fraction` has these at 0 and 1; it is None where there are only C channels.
    """
    if output.shape[1] == channels:
        return output, None
    return output[:, :channels], (output[:, channels:] + 1) / 2
