"""Precision, recall, density and coverage: do generated features lie where real ones do, and the reverse.

Each set's support is the union of balls around its features that reach to their k-th neighbour in the same set.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.evaluate.metrics.frechet import checked
from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Embedded, Found, Reference, Samples, choose_rows

NEIGHBOURS = 5  # k
FEWEST = 50  # images
CHUNK = 1000  # rows of a table of distances held at a time


class Prdc(NamedTuple):
    """`density` may exceed 1, the others lie in 0 … 1. Comparable only at the same n and k."""

    precision: float
    recall: float
    density: float
    coverage: float
    n: int
    k: int


def neighbours(samples: Samples, reference: Reference) -> Found:
    """Compute precision, recall, density and coverage of the samples, and of training images."""
    return _compare(samples.embedded, reference.test).beside(of_real(reference))


@lru_cache(maxsize=1)  # the same for all samples
def of_real(reference: Reference) -> Found:
    """Compute them of training images."""
    return _compare(reference.train, reference.test)


def _compare(x: Embedded, test: Embedded) -> Found:
    """Take as many of x as there are test images, drawn at random where they differ."""
    n = min(len(x.features), len(test.features))
    if n < FEWEST:
        note = f"no precision, recall, density, coverage: they need {FEWEST} images on either side, there are {n}"
        return Found({}, [note])
    found = prdc(choose_rows(test.features, n), choose_rows(x.features, n), NEIGHBOURS)
    shares = {name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")}
    return Found({name: Metric(value, n=n, text=f"k={found.k}") for name, value in shares.items()})


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> Prdc:
    """Compare two sets of features (n, d), with the same n.

    - precision: share of fake features inside a real ball; recall: share of real ones inside a fake ball
      (Kynkäänniemi et al. 2019, eq. 1-2);
    - density: real balls that hold a fake feature, on average, over k; coverage: share of real balls that hold a
      fake feature (Naeem et al. 2020).

    Distances are computed in float64 and a tie counts as inside, so copies of the real features score 1. n > k ≥ 1.
    Raises ValueError unless every number is finite.
    """
    real, fake = checked(real, "real"), checked(fake, "fake")
    n, centre = len(real), real.mean(0)
    real, fake = real - centre, fake - centre  # so that less is lost in |a|² + |b|² - 2 a·b
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    precise = held = 0
    recalled_by = torch.zeros(n, dtype=torch.bool)
    covered_by = torch.zeros(n, dtype=torch.bool)
    for part, radius in zip(torch.split(fake, CHUNK), torch.split(fake_radius, CHUNK), strict=True):
        distance = squared_distances(part, real)
        inside = distance <= real_radius
        precise += int(inside.any(1).sum())
        held += int(inside.count_nonzero())
        covered_by |= inside.any(0)
        recalled_by |= (distance <= radius[:, None]).any(0)
    recalled, covered = int(recalled_by.sum()), int(covered_by.sum())
    return Prdc(precise / n, recalled / n, held / (n * k), covered / n, n, k)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Compute |a_i - b_j|², (N, d) and (M, d) → (N, M), by one matrix product, off by rounding of |a|²."""
    return torch.addmm(a.square().sum(1, keepdim=True) + b.square().sum(1), a, b.T, alpha=-2).clamp_(min=0)


def _radii(x: Tensor, k: int) -> Tensor:
    """Compute the squared distance (n,) from each of x (n, d) to its k-th neighbour, itself not counted."""
    radii = []
    for start in range(0, len(x), CHUNK):
        distance = squared_distances(x[start : start + CHUNK], x)
        rows = torch.arange(len(distance))
        distance[rows, rows + start] = torch.inf
        radii.append(distance.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)
