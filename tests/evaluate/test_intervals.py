"""Intervals of the Fréchet excess contain the truth as often as they claim, by simulation."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm.evaluate.metrics.frechet import frechet_distance, frechet_interval, gaussian, influence

Make = Callable[[int, int, torch.Generator], Tensor]


def white(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def heavy(n: int, d: int, generator: torch.Generator) -> Tensor:
    """White with a common random radius, log-normal: E|x|⁴ is 1.28 times a Gaussian's."""
    radius = (0.25 * white(n, 1, generator)).exp() / math.exp(0.25**2)
    return radius * white(n, d, generator)


def skewed(n: int, d: int, generator: torch.Generator) -> Tensor:
    """White log-normal numbers."""
    x = (0.5 * white(n, d, generator)).exp()
    return (x - math.exp(1 / 8)) / math.sqrt(math.exp(0.5) - math.exp(0.25))


def coverage(make: Make, scale: float, shift: float, n: int, m: int, d: int, repeats: int) -> float:
    """Share of 95 % intervals that contain the distance between P and P scaled and shifted."""
    generator = torch.Generator().manual_seed(7)
    truth = d * (scale - 1) ** 2 + shift**2
    hits = 0
    for _ in range(repeats):
        y = make(m, d, generator) * scale
        y[:, 0] += shift
        interval = frechet_interval(make(n, d, generator), y)
        hits += interval.low <= truth <= interval.high
    return hits / repeats


@pytest.mark.parametrize(
    ("make", "scale", "shift"), [(white, 1, 0), pytest.param(heavy, 0.9, 0.3, marks=pytest.mark.slow)]
)
def test_intervals_contain_the_truth(make: Make, scale: float, shift: float) -> None:
    assert coverage(make, scale, shift, n=150, m=300, d=4, repeats=60) >= 0.88


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m", "d"), [(100, 100, 8), (400, 1000, 8), (300, 300, 32)])
@pytest.mark.parametrize("make", [white, heavy, skewed])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1, 0.3), (0.9, 0.1), (0.5, 0)])
def test_intervals_hold_for_every_shape_and_size(
    make: Make, scale: float, shift: float, n: int, m: int, d: int
) -> None:
    """0.95 is claimed; 250 repeats leave a standard error of 0.014."""
    assert coverage(make, scale, shift, n, m, d, repeats=250) >= 0.95 - 2.5 * 0.014


def test_the_plain_bootstrap_would_not_hold() -> None:
    """The reason for all this: between two sets of one distribution its interval does not contain 0."""
    generator, hits = torch.Generator().manual_seed(3), 0
    for _ in range(10):
        x, y = white(100, 8, generator), white(100, 8, generator)
        draws = []
        for _ in range(40):
            i, j = (torch.randint(100, (100,), generator=generator) for _ in range(2))
            draws.append(frechet_distance(gaussian(x[i]), gaussian(y[j])))
        hits += min(draws) <= 0.0
    assert hits == 0


def test_influence_is_the_derivative_of_the_distance() -> None:
    """One feature's weight raised by ε moves the distance by ε influence / N (less the mean influence)."""
    generator, n, step = torch.Generator().manual_seed(1), 50, 1e-5
    x, y = white(n, 3, generator), 0.7 * white(60, 3, generator) + 0.4
    own, other = gaussian(x), gaussian(y)

    def distance(weights: Tensor) -> float:
        share = weights / weights.sum()
        mean = share @ x
        covariance = (x - mean).T @ ((x - mean) * share[:, None])
        return frechet_distance(own._replace(mean=mean, covariance=covariance), other)

    plain = own._replace(covariance=own.covariance * (n - 1) / n)
    expected = influence(x, plain, other)
    expected = (expected - expected.mean()) / n
    for i in range(5):
        up, down = torch.ones(n).double(), torch.ones(n).double()
        up[i], down[i] = 1 + step, 1 - step
        assert (distance(up) - distance(down)) / (2 * step) == pytest.approx(expected[i].item(), abs=1e-6)


def test_more_images_and_less_confidence_make_it_narrower() -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = white(4000, 4, generator), 1.3 * white(4000, 4, generator)
    wide, half = frechet_interval(x[:1000], y[:1000]), frechet_interval(x, y)
    assert (half.high - half.low) / (wide.high - wide.low) == pytest.approx(0.5, rel=0.15)
    less = frechet_interval(x, y, level=0.5)
    assert (less.high - less.low) / (half.high - half.low) == pytest.approx(0.6745 / 1.96, rel=1e-3)
    assert less.value == half.value
    with pytest.raises(ValueError, match=r"level=95; allowed"):
        frechet_interval(x, y, level=95)
