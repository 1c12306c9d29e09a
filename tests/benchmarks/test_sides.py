"""benchmarks/sides.py: what the benchmarks time does what it says."""

import pytest
import torch
from benchmarks import sides

CPU = torch.device("cpu")


@pytest.mark.slow
def test_our_training_has_the_losses_of_diffusers() -> None:
    """diffusers' network, its way to add noise and torch's AdamW, fed with our images, times and noise."""
    pytest.importorskip("diffusers")
    found = sides.losses(30, 4, CPU)
    assert all(ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in found)
    assert found[-1][0] < 0.8 * found[0][0], "the weights moved"
    apart, largest = sides.difference(CPU)
    assert largest > 0.1 and apart < 1e-5 * largest


@pytest.mark.parametrize("side", ["ours", *sides.PEERS])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_side_trains(side: str, precision: str) -> None:
    if side != "ours":
        pytest.importorskip(side.replace("-", "_"))
    made = sides.make(sides.Setting(side, precision, channels_last=True), 8, CPU)
    before = [parameter.detach().clone() for parameter in made.network.parameters()]
    losses = [made.step().item() for _ in range(4)]
    assert all(0 < loss < 10 for loss in losses)
    assert any(not torch.equal(a, b) for a, b in zip(before, made.network.parameters(), strict=True))
