"""How far a Fréchet distance can be trusted: an interval for what it would be with infinitely many images."""

from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor

from ddpm.evaluate.metrics.frechet import (
    Gaussian,
    checked,
    frechet_bias,
    frechet_distance,
    gaussian,
    invertible,
    transported,
)


class Interval(NamedTuple):
    """The value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def frechet_interval(x: Tensor, y: Tensor, level: float = 0.95) -> Interval:
    """Excess Fréchet distance of features (n_1, d) and (n_2, d), and its interval at this confidence level.

    The value is `frechet_distance` - `frechet_bias`: it estimates the distance of the two distributions themselves,
    and may fall below 0 when they agree. The plain percentile bootstrap does not hold: each resample adds the bias
    once more, so that it often lies wholly above the truth. Here the interval is value ± z · error, the error by the
    infinitesimal jackknife (Efron 1982, ch. 6): the spread of the influence of single features. Where the
    distributions agree the distance is quadratic in its errors and this is too wide, by √2, on the safe side.
    Nothing is random. Raises ValueError as `gaussian` does, or if the level is not within 0 … 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}; allowed: above 0 and below 1")
    x, y = checked(x, "x"), checked(y, "y")
    a, b = gaussian(x), gaussian(y)
    value = frechet_distance(a, b) - frechet_bias(x, y)
    variance = influence(x, a, b).var() / len(x) + influence(y, b, a).var() / len(y)
    half = NormalDist().inv_cdf((1 + level) / 2) * float(variance.sqrt())
    return Interval(value, value - half, value + half)


def influence(x: Tensor, own: Gaussian, other: Gaussian) -> Tensor:
    """By how much one more feature at each of x (N, d) would move the distance, times N, up to a constant: (N,).

    2 (x - a)·(a - b) + |x - a|² - (x - a)' T (x - a), T the optimal transport from A to B.
    """
    x = x - own.mean
    z, root = transported(x, own, other)
    safe, singular = invertible(root)
    inverse = (1 / safe).masked_fill(singular, 0)
    return 2 * x @ (own.mean - other.mean) + x.square().sum(1) - z.square() @ inverse
