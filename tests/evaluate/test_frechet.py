"""Distances of features: against scipy, torchmetrics, closed forms, and what chance alone makes of them."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ddpm.evaluate.metrics.distance import distances
from ddpm.evaluate.metrics.frechet import (
    Gaussian,
    class_frechet,
    frechet_bias,
    frechet_distance,
    frechet_floor,
    gaussian,
    kid,
)
from ddpm.evaluate.reference import Embedded


def draws(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, d: int, seed: int) -> Tensor:
    return draws(n, d, seed) @ draws(d, d, seed + 1000) + draws(1, d, seed + 2000)


def laplace(n: int, d: int, seed: int) -> Tensor:
    """White features with longer tails than a Gaussian: E x⁴ = 6."""
    u = torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).clamp(min=1e-300).log() / math.sqrt(2)


@pytest.mark.parametrize(("n", "d"), [(50, 1), (200, 8), (500, 32), (20, 32)])  # the last: singular
def test_frechet_distance_equals_scipys_matrix_root(n: int, d: int) -> None:
    a, b = gaussian(correlated(n, d, 1)), gaussian(correlated(n, d, 2))
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = (
        (a.mean - b.mean).square().sum() + torch.trace(a.covariance + b.covariance) - 2 * np.trace(root)
    )
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.slow
def test_frechet_distance_and_kid_equal_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    class Pixels(nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).float() / 50

    images = [
        (128 + 40 * correlated(300, 12, k)).clamp(0, 255).to(torch.uint8).view(-1, 3, 2, 2) for k in (1, 2)
    ]
    metric = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    x, y = (Pixels()(part).double() for part in images)
    ours = frechet_distance(gaussian(x), gaussian(y))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-5)
    assert kid(x, y).value == pytest.approx(poly_mmd(x, y).item(), rel=1e-9)


def test_frechet_distance_of_known_gaussians() -> None:
    """Covariances that commute: |a - b|² + Σ (√λ - √μ)²; a common rotation changes nothing."""
    turn = torch.linalg.qr(draws(5, 5, 3)).Q
    first, second = torch.tensor([1.0, 4, 9, 0, 2]).double(), torch.tensor([4.0, 4, 1, 1, 0]).double()
    a = Gaussian(9, torch.zeros(5).double(), turn @ first.diag() @ turn.T)
    b = Gaussian(9, torch.ones(5).double(), turn @ second.diag() @ turn.T)
    expected = 5 + (first.sqrt() - second.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-7)


def test_the_floor_is_what_two_sets_of_one_gaussian_differ_by() -> None:
    n_1, n_2, d, repeats = 400, 900, 6, 150
    sets = [(draws(n_1, d, k), draws(n_2, d, 500 + k)) for k in range(repeats)]
    distances = torch.tensor([frechet_distance(gaussian(x), gaussian(y)) for x, y in sets])
    error = (distances.std() / repeats**0.5).item()
    floor = frechet_floor(n_1, n_2, d)
    assert floor == pytest.approx((1 / 400 + 1 / 900) * (6 + 10.5))
    assert error < 0.05 * floor
    assert abs(distances.mean().item() - floor) < 3 * error + 0.01 * floor


SLOW = [pytest.param(shape, marks=pytest.mark.slow) for shape in ("gaussian", "coloured", "different")]


@pytest.mark.parametrize("shape", ["laplace", *SLOW])
def test_the_bias_is_what_finite_sets_add(shape: str) -> None:
    n, d, repeats = 300, 5, 100
    make = {"gaussian": draws, "laplace": laplace, "coloured": draws, "different": draws}[shape]
    scale = torch.tensor([3.0, 1, 0.5, 0.2, 0.1] if shape == "coloured" else [1.0] * 5).double()
    other = scale * (0.6 if shape == "different" else 1)
    truth = (scale - other).square().sum().item()
    sets = [(make(n, d, k) * scale, make(n, d, 500 + k) * other) for k in range(repeats)]
    biases = torch.tensor([frechet_bias(x, y) for x, y in sets])
    excess = torch.tensor([frechet_distance(gaussian(x), gaussian(y)) for x, y in sets]) - biases
    assert abs(excess.mean().item() - truth) < 3 * (excess.std() / repeats**0.5).item()
    gaussian_floor = frechet_floor(n, n, d)
    if shape == "gaussian":
        assert biases.mean().item() == pytest.approx(gaussian_floor, rel=0.05)
    if shape == "laplace":  # E|x|⁴ = d(d - 1) + 6d, so a floor a third higher than a Gaussian's
        assert biases.mean().item() == pytest.approx(2 / n * (d + (d * (d - 1) + 6 * d - d) / 4), rel=0.1)
        assert biases.mean().item() > 1.15 * gaussian_floor


def test_class_distances_leave_out_and_name_what_is_too_small() -> None:
    d = 3
    x, y = draws(605, d, 1), draws(700, d, 2)
    x_labels = torch.tensor([0] * 300 + [1] * 300 + [2] * 5)  # 5 < 2d
    y_labels = torch.tensor([0] * 300 + [1] * 300 + [2] * 100)
    y[y_labels == 1] += 1
    result = class_frechet(x, x_labels, y, y_labels, 4)
    assert result.keys() == {0, 1}
    same, shifted = (result[k].distance - result[k].floor for k in (0, 1))
    assert same is not None and shifted is not None and abs(same) < 0.05 and abs(shifted - d) < 0.6
    own, other = (Embedded(a, a, one_hot(b, 4)) for a, b in ((x, x_labels), (y, y_labels)))
    found = distances(own, other, 4)
    assert found.values["class_fd_excess"].value == pytest.approx((same + shifted) / 2)
    assert "class_fd_excess is without the classes 2, 3, which have too few images" in found.notes
    assert class_frechet(x[:4], x_labels[:4], y, y_labels, 4) == {}
    few = distances(Embedded(x[:4], x[:4], one_hot(x_labels[:4], 4)), other, 4)
    assert "no class_fd_excess: no class has enough images" in few.notes


def test_kid_is_the_mean_over_pairs() -> None:
    x, y, d = correlated(40, 3, 1), correlated(30, 3, 2), 3

    def k(a: Tensor, b: Tensor) -> float:
        return ((a @ b).item() / d + 1) ** 3

    own_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    own_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    assert kid(x, y).value == pytest.approx(own_x + own_y - 2 * np.mean([k(a, b) for a in x for b in y]))


@pytest.mark.parametrize(
    "scale", [pytest.param(1.0, marks=pytest.mark.slow), pytest.param(1.05, marks=pytest.mark.slow), 1.5]
)
def test_kid_is_unbiased_and_its_error_is_its_spread(scale: float) -> None:
    """E k(x, y) for independent centred Gaussians is 1 + 3 tr(AB)/d²; here A = I, B = scale² I."""
    d, repeats = 4, 200
    truth = 3 / d * (1 - 2 * scale**2 + scale**4)
    figures = [kid(draws(200, d, k), scale * draws(150, d, 500 + k)) for k in range(repeats)]
    values, errors = torch.tensor(figures).T
    spread = values.std().item()
    assert abs(values.mean().item() - truth) < 3 * spread / repeats**0.5
    assert 0.8 * spread < errors.square().mean().sqrt().item() < 1.35 * spread


def test_what_is_not_a_number_is_refused() -> None:
    x, bad = draws(20, 3, 1), draws(20, 3, 2)
    bad[4, 1] = torch.nan
    for function in (frechet_bias, kid):
        with pytest.raises(ValueError, match="y: some features are not finite"):
            function(x, bad)
    with pytest.raises(ValueError, match="not finite"):
        gaussian(bad)
    with pytest.raises(ValueError, match="N ≥ 2"):
        gaussian(x[:1])
