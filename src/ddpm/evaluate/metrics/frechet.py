"""Distances between two sets of features: the Fréchet distance, its bias and its interval, and KID.

Everything in float64. Features are (N, d) tensors; d is small (8 to 64 with whitened features, 2048 for Inception).
"""

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.runtime.randomness import permutation

MIN_IMAGES_PER_DIMENSION = 2  # below it a class's covariance is too rough for its bias to be known
CHUNK = 1024  # rows of a table of pairs held at a time


class Gaussian(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d) of n features, float64."""

    n: int
    mean: Tensor
    covariance: Tensor


def checked(features: Tensor, name: str) -> Tensor:
    """Return the features in float64. Raises ValueError unless they are (N ≥ 2, d ≥ 1) and finite."""
    if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
        raise ValueError(f"{name}: features must be (N, d) with N ≥ 2 and d ≥ 1, not {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: some features are not finite numbers")
    return features.double()


def gaussian(features: Tensor) -> Gaussian:
    """Fit a Gaussian to features (N, d). Raises ValueError if N < 2 or a number is not finite."""
    x = checked(features, "features")
    mean = x.mean(0)
    x = x - mean
    return Gaussian(len(x), mean, x.T @ x / (len(x) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute the squared Fréchet distance of two Gaussians (Heusel et al. 2017, eq. 6), never below 0.

    |mean_a - mean_b|² + tr(A) + tr(B) - 2 tr((√A B √A)^½). The last trace is the sum of the roots of a symmetric
    matrix's eigenvalues, so nothing is complex and singular covariances do no harm.
    """
    root = matrix_root(a.covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    spread = a.covariance.trace() + b.covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def frechet_floor(n_1: int, n_2: int, d: int) -> float:
    """Return the distance's mean between n_1 and n_2 draws of one white Gaussian in d dimensions.

    (1/n_1 + 1/n_2)(d + d(d+1)/4): d for the means, and a quarter of E|A - B|² for the covariances.
    """
    return (1 / n_1 + 1 / n_2) * (d + d * (d + 1) / 4)


def frechet_bias(x: Tensor, y: Tensor) -> float:
    """Estimate the bias of the distance of two finite sets (n_1, d) and (n_2, d): by how much it is too large.

    The second-order term of the distance in the errors of both means and covariances, with the features' own
    fourth moments. Equals `frechet_floor` for two sets of white Gaussian features, and
    (1/n_1 + 1/n_2)(d + (E|x|⁴ - d)/4) for two sets of the same white distribution of any shape. This, not
    `frechet_floor`, is what is subtracted from a distance: features of images have longer tails than a Gaussian,
    and within one class they are not white. What that term leaves falls as 1/n²: so a third of what it leaves more
    in half the images is added (Richardson), where each half has 2d images. Raises ValueError as `gaussian` does.
    """
    x, y = checked(x, "x"), checked(y, "y")
    distance, bias = _distance_and_bias(x, y)
    if min(len(x), len(y)) < 4 * x.shape[1]:
        return bias
    halves = [_distance_and_bias(a, b) for a in _halves(x) for b in _halves(y)]
    left = sum(distance - bias for distance, bias in halves) / len(halves)
    return bias + (left - (distance - bias)) / 3


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return torch.tensor_split(x[permutation(0, "halves", 0, len(x))], 2)


def _distance_and_bias(x: Tensor, y: Tensor) -> tuple[float, float]:
    a, b = gaussian(x), gaussian(y)
    return frechet_distance(a, b), _bias_of_one(x - a.mean, a, b) + _bias_of_one(y - b.mean, b, a)


def _bias_of_one(x: Tensor, own: Gaussian, other: Gaussian) -> float:
    """Compute the share of the bias that comes from the finite set x, centred."""
    z, root = transported(x, own, other)
    weights = curvature(root)
    squares = z.square()
    variance = (squares.T @ squares) / len(x) - (z.T @ z / len(x)).square()  # of z_i z_j
    return ((own.covariance.trace() + (weights * variance).sum()) / len(x)).item()


def transported(x: Tensor, own: Gaussian, other: Gaussian) -> tuple[Tensor, Tensor]:
    """Return x √B in the eigenbasis of M = √B A √B, and the roots (d,) of M's eigenvalues."""
    root = matrix_root(other.covariance)
    eigenvalues, basis = torch.linalg.eigh(root @ own.covariance @ root)
    return x @ (root @ basis), eigenvalues.clamp(min=0).sqrt()


def curvature(root: Tensor) -> Tensor:
    """Return the weights w of Σ w_ij H_ij², the second-order term of -2 tr((M + H)^½), where M = diag(root²).

    w_ij = 1 / (2 r_i r_j (r_i + r_j)): the divided difference of the square root's derivative. 0 where M is
    singular, for there nothing varies.
    """
    safe, singular = invertible(root)
    weights = 0.5 / (safe[:, None] * safe * (safe[:, None] + safe))
    return weights.masked_fill(singular[:, None] | singular, 0)


def invertible(root: Tensor) -> tuple[Tensor, Tensor]:
    """Return roots of eigenvalues (d,) with 1 for those that are 0 up to rounding, and which these are."""
    singular = root <= 1e-7 * root.max()
    return root.masked_fill(singular, 1), singular


def matrix_root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix (d, d)."""
    eigenvalues, basis = torch.linalg.eigh(matrix)
    root: Tensor = basis * eigenvalues.clamp(min=0).sqrt() @ basis.T
    return root


class WithinClass(NamedTuple):
    """The Fréchet distance within a class, and its `frechet_bias`."""

    distance: float
    floor: float


def class_frechet(
    x: Tensor, x_labels: Tensor, y: Tensor, y_labels: Tensor, num_classes: int
) -> dict[int, WithinClass]:
    """Compute the Fréchet distance within each class. x (n_1, d), y (n_2, d), labels int64 0 … num_classes - 1.

    A class with fewer than 2d images on either side is left out. Raises ValueError if a feature is not finite.
    """
    x, y = checked(x, "x"), checked(y, "y")
    needed, found = max(2, MIN_IMAGES_PER_DIMENSION * x.shape[1]), dict[int, WithinClass]()
    for k in range(num_classes):
        own, other = x[x_labels == k], y[y_labels == k]
        if min(len(own), len(other)) >= needed:
            found[k] = WithinClass(frechet_distance(gaussian(own), gaussian(other)), frechet_bias(own, other))
    return found


class Kid(NamedTuple):
    """KID and its standard error."""

    value: float
    error: float


def kid(x: Tensor, y: Tensor) -> Kid:
    """Compute KID (Bińkowski et al. 2018): unbiased squared MMD of (n_1, d) and (n_2, d), kernel (x·y/d + 1)³.

    All pairs are used, a chunk at a time. The error is that of a U-statistic (van der Vaart 1998, ch. 12) with both
    terms: the linear one, which counts when the sets differ, and the quadratic one, which is all there is when they
    do not. What the finite sets add to the linear one's estimate (twice the quadratic one) is taken off again.
    Raises ValueError if a number is not finite or a set has fewer than 3 features.
    """
    x, y = checked(x, "x"), checked(y, "y")
    if min(len(x), len(y)) < 3:
        raise ValueError(f"kid: needs at least 3 features in each set, not {len(x)} and {len(y)}")
    n, m = len(x), len(y)
    row_x, _, square_x = _kernel_sums(x, x)
    row_y, _, square_y = _kernel_sums(y, y)
    row, column, square = _kernel_sums(x, y)
    own_x, own_y = _kernel(x.square().sum(1), x.shape[1]), _kernel(y.square().sum(1), y.shape[1])
    row_x, row_y = (row_x - own_x) / (n - 1), (row_y - own_y) / (m - 1)  # no feature is paired with itself
    row, column = row / m, column / n
    noise_x = _beyond_rows((square_x - own_x.square().sum()) / (n * (n - 1)), row_x, row_x)
    noise_y = _beyond_rows((square_y - own_y.square().sum()) / (m * (m - 1)), row_y, row_y)
    noise_xy = _beyond_rows(square / (n * m), row, column)
    linear = 4 * ((row_x - row).var() / n + (row_y - column).var() / m)
    quadratic = 2 * noise_x / n**2 + 4 * noise_xy / (n * m) + 2 * noise_y / m**2
    variance = torch.maximum(linear - quadratic, quadratic)
    return Kid((row_x.mean() + row_y.mean() - 2 * row.mean()).item(), variance.clamp(min=0).sqrt().item())


def _kernel(products: Tensor, d: int) -> Tensor:
    base = products / d + 1
    return base.square().mul_(base)


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the kernel over the rows (n_1,) and the columns (n_2,), and its square over all pairs."""
    rows, columns, square = [], torch.zeros(len(y), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
    for part in torch.split(x, CHUNK):
        k = _kernel(part @ y.T, x.shape[1])
        rows.append(k.sum(1))
        columns += k.sum(0)
        square += k.flatten().dot(k.flatten())
    return torch.cat(rows), columns, square


def _beyond_rows(mean_square: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return the variance of a table of pairs that neither the means of its rows nor of its columns explain."""
    return mean_square - row.square().mean() - column.square().mean() + row.mean() ** 2


class Interval(NamedTuple):
    """The value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def frechet_interval(x: Tensor, y: Tensor, level: float = 0.95) -> Interval:
    """Estimate the excess Fréchet distance of features (n_1, d) and (n_2, d), with its confidence interval.

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
    """Compute the influence of each feature x (N, d) on the distance, (N,): N times what one more such would add.

    Up to a constant.

    2 (x - a)·(a - b) + |x - a|² - (x - a)' T (x - a), T the optimal transport from A to B.
    """
    x = x - own.mean
    z, root = transported(x, own, other)
    safe, singular = invertible(root)
    inverse = (1 / safe).masked_fill(singular, 0)
    return 2 * x @ (own.mean - other.mean) + x.square().sum(1) - z.square() @ inverse
