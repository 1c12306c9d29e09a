"""Precision, recall, density and coverage: sets whose figures are known, and loops over all pairs."""

import pytest
import torch
from torch import Tensor

from ddpm.evaluate.metrics.prdc import prdc


def draws(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_copies_score_one_and_strangers_zero() -> None:
    x = draws(100, 3, 1)
    same = prdc(x, x.flip(0), k=3)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density >= 1  # each copy lies in its own ball and its neighbours'
    assert prdc(x, x + 100, k=3)[:4] == (0, 0, 0, 0)


def test_points_on_a_line() -> None:
    """Real 0, 1, 2, 10 with k = 1 have balls of radius 1, 1, 1, 8; fake 0.5, 1.5, 20, 21 of radius 1, 1, 1, 1."""
    real, fake = (torch.tensor(v, dtype=torch.float64)[:, None] for v in ([0, 1, 2, 10], [0.5, 1.5, 20, 21]))
    result = prdc(real, fake, k=1)
    assert result.precision == 2 / 4  # 0.5 and 1.5
    assert result.recall == 3 / 4  # all but 10
    assert result.density == 4 / 4  # 0.5 in the balls of 0 and 1, 1.5 in those of 1 and 2
    assert result.coverage == 3 / 4


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision() -> None:
    two = torch.cat([draws(300, 2, 1), draws(300, 2, 2) + 20])
    dropped = prdc(two, draws(600, 2, 3))
    assert dropped.precision > 0.95 and dropped.recall < 0.52 and dropped.coverage < 0.52
    invented = prdc(draws(600, 2, 3), two)
    assert invented.precision < 0.52 and invented.recall > 0.95


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake, k, n = draws(57, 4, 1), draws(57, 4, 2) * 1.2, 4, 57
    monkeypatch.setattr("ddpm.evaluate.metrics.prdc.CHUNK", 10)
    result = prdc(real, fake, k)
    distance = torch.cdist(real, fake)
    real_radius = torch.cdist(real, real).sort(1).values[:, k]
    fake_radius = torch.cdist(fake, fake).sort(1).values[:, k]
    inside = [[float(distance[i, j]) <= float(real_radius[i]) for j in range(n)] for i in range(n)]
    reached = [any(float(distance[i, j]) <= float(fake_radius[j]) for j in range(n)) for i in range(n)]
    assert result.precision == pytest.approx(sum(any(row[j] for row in inside) for j in range(n)) / n)
    assert result.recall == pytest.approx(sum(reached) / n)
    assert result.density == pytest.approx(sum(map(sum, inside)) / (k * n))
    assert result.coverage == pytest.approx(sum(map(any, inside)) / n)


def test_what_cannot_be_compared_is_refused() -> None:
    x = draws(10, 2, 1)
    with pytest.raises(ValueError, match="not finite"):
        prdc(x, torch.full_like(x, torch.inf))


@pytest.mark.slow
def test_ten_thousand_take_bounded_memory() -> None:
    result = prdc(draws(10_000, 64, 1), draws(10_000, 64, 2))
    assert 0.6 < result.precision < 0.75 and 0.9 < result.coverage <= 1
