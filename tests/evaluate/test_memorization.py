"""Copies are found; images of the same kind that were never seen are not."""

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from ddpm.evaluate.metrics.memorization import memorization, nearest

slow = pytest.mark.slow


def digits(size: int, channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Training, test and further held-out images, uint8: 8×8 as they are, or enlarged with a margin."""
    images = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
    if size != 8:
        inner = F.interpolate(images, size=(size - 8, size - 8), mode="bicubic").clamp(0, 255)
        images = F.pad(inner, (4, 4, 4, 4))
    tints = torch.tensor([1.0, 0.6, 0.3])[:channels, None, None]
    images = (images * tints).round().to(torch.uint8)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:1000], images[1000:1400], images[1400:]


def check_fair(result: dict[str, Any]) -> None:
    """Nothing copied: both shares are what they are expected to be."""
    assert result["expected_error"] == pytest.approx(
        (0.01 * 0.99 * (1 / result["n"] + 1 / result["n_test"])) ** 0.5
    )
    for share in (result["share"], result["relative_share"]):
        assert abs(share - result["expected"]) < 3.5 * result["expected_error"]
    assert result["identical"] == 0


@pytest.mark.parametrize(
    ("size", "channels"), [(8, 1), pytest.param(20, 1, marks=slow), pytest.param(20, 3, marks=slow)]
)
def test_held_out_images_pass_and_copies_do_not(size: int, channels: int) -> None:
    train, test, held = digits(size, channels)
    check_fair(memorization(held, train, test))
    copied = memorization(torch.cat([held[:60], train[:40]]), train, test)
    assert copied["identical"] == 40
    assert 0.4 <= copied["share"] < 0.45 and 0.4 <= copied["relative_share"] < 0.45
    assert copied["share_error"] == pytest.approx((copied["share"] * (1 - copied["share"]) / 100) ** 0.5)
    for pair in copied["pairs"]:
        assert pair["sample"] - 60 == pair["train"] and pair["distance"] == pair["relative"] == 0
    assert copied["samples"]["nearest"] == 0 < copied["test"]["nearest"]


def test_nearest_is_exact_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test, _ = digits(8)
    monkeypatch.setattr("ddpm.evaluate.metrics.memorization.CHUNK_ELEMENTS", 1000)
    x, y = test[:50].flatten(1), train[:300].flatten(1)
    squared, index = nearest(x, y, 2)
    expected = torch.cdist(x.double() / 255, y.double() / 255).square().sort(1)
    assert torch.equal(index, expected.indices[:, :2])
    assert torch.allclose(squared, expected.values[:, :2], rtol=1e-12)


def test_copies_show_though_test_images_are_training_images_too() -> None:
    """One test image in 20 is one: the line is 0, and yet a model that copies all is told from one that does not."""
    train, test, held = digits(8)
    mixed = torch.cat([test[:190], train[500:510]])
    copied, fair = (memorization(x, train[:600], mixed) for x in (train[:100], held[:100]))
    assert copied["test"]["nearest"] == 0 and copied["expected"] == fair["expected"] == 0.05
    assert copied["share"] == copied["relative_share"] == 1 and copied["identical"] == 100
    assert fair["share"] == fair["relative_share"] == 0 and fair["identical"] == 0
    assert any("5.0 % of the test images equal a training image" in note for note in copied["notes"])


def test_what_cannot_be_told_is_said() -> None:
    train, test, held = digits(8)
    assert len(memorization(held[:10], train, test)["notes"]) == 2
    blank = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)  # all distances 0: nothing to divide by
    assert memorization(blank, blank, blank)["identical"] == 5
