"""The algebra of diffusion: noising, posterior, what a network predicts, the training loss and the denoiser.

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


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(prediction, fraction): a network with twice the channels also says where in its range the log variance
    lies, -1 at the smallest and 1 at the largest; `fraction` has these at 0 and 1.
    """
    if output.shape[1] == channels:
        return output, None
    return output[:, :channels], (output[:, channels:] + 1) / 2
