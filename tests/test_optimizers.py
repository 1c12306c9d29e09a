"""Muon against the singular value decomposition it stands for, and against AdamW where it is AdamW."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from ddpm.optimizers import MOMENTUM, Muon, orthogonal, state_names


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(256, 32))


def with_gradients(net: nn.Module, scale: float = 1.0) -> nn.Module:
    for number, p in enumerate(net.parameters()):
        p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    return net


def muon(net: nn.Module, lr: float = 0.01, weight_decay: float = 0.0) -> Muon:
    return Muon(net, lr, (0.9, 0.99), weight_decay)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 288), (2, 288, 32)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_sizes(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    (y,) = orthogonal([x])
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ v.mT  # diagonal: the same singular vectors
    size = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(size)).abs().max() < 1e-9
    assert size.flatten().quantile(0.05) > 0.6 and size.max() < 1.3


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-25, 1e-20])
def test_orthogonal_of_almost_nothing_is_no_more(size: float) -> None:
    """A gradient that has ended leaves a momentum that fades through all sizes."""
    assert orthogonal([torch.full((1, 32, 40), size)])[0].abs().max() < 1e-3


def test_small_weights_and_all_biases_are_adamws() -> None:
    ours, theirs = with_gradients(network()), with_gradients(network())
    optimizer, adamw = (
        muon(ours, weight_decay=0.1),
        torch.optim.AdamW(theirs.parameters(), 0.01, betas=(0.9, 0.99), weight_decay=0.1, fused=True),
    )
    for _ in range(3):
        optimizer.step()
        adamw.step()
    for name, p in ours.named_parameters():
        same = torch.equal(p, theirs.get_parameter(name))
        assert same == (name not in ("1.weight", "3.weight")), name
        assert set(optimizer.state[p]) == set(state_names(optimizer, p)), name


def test_first_update_of_a_matrix_is_the_orthogonal_gradient() -> None:
    net = with_gradients(network())
    weight = net.get_parameter("1.weight")
    before, gradient = weight.detach().clone(), weight.grad
    assert gradient is not None
    muon(net).step()
    after_momentum = (
        (1 - MOMENTUM) * (1 + MOMENTUM) * gradient
    )  # Nesterov's, of which only the direction counts
    update = orthogonal([after_momentum.flatten(1)[None]])[0].view(weight.shape)
    expected = before - 0.01 * 0.2 * 288**0.5 * update
    assert torch.allclose(weight, expected, atol=1e-6)
    size = (weight.detach() - before).square().mean().sqrt().item()
    assert size == pytest.approx(0.2 * 0.01, rel=0.2)


def test_what_is_not_finite_leaves_weights_and_state_alone() -> None:
    net = with_gradients(network())
    optimizer = muon(net, weight_decay=0.1)
    optimizer.step()
    before, states = deepcopy(net.state_dict()), deepcopy(list(optimizer.state.values()))
    with_gradients(net, float("inf"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    for state, old in zip(optimizer.state.values(), states, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in state.items())
    optimizer.found_inf = torch.zeros(())
    with_gradients(net)
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in net.state_dict().items())


def test_a_gradscaler_has_a_step_skipped_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("asked"))
    net, scaler = network(), torch.amp.GradScaler("cpu")
    optimizer = muon(net)
    for scale, moved in ((float("inf"), False), (1.0, True)):
        before = deepcopy(net.state_dict())
        scaler.scale(torch.zeros(()))
        with_gradients(net, scale)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.found_inf is None
        assert all(torch.equal(p, before[name]) != moved for name, p in net.state_dict().items())


def test_stacks_of_one_long_or_short_side_go_through_together_and_come_out_alone() -> None:
    shapes = [(2, 32, 40), (1, 32, 288), (3, 64, 32), (1, 64, 96)]
    stacks = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    for stack, turned in zip(stacks, orthogonal(stacks), strict=True):
        alone = torch.cat([orthogonal([x[None]])[0] for x in stack])
        assert turned.shape == stack.shape and torch.allclose(turned, alone, atol=1e-5)


def test_memory_layout_changes_nothing() -> None:
    ours, theirs = with_gradients(network()), network().to(memory_format=torch.channels_last)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    muon(ours).step()
    muon(theirs).step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
