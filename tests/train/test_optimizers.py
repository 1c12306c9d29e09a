"""Muon against the singular value decomposition it stands for, and AdamW against torch's."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from ddpm.train.optimizers import MOMENTUM, OPTIMIZERS, Optimizer, orthogonal, state_names


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(256, 32))


def with_gradients(net: nn.Module, scale: float = 1.0) -> nn.Module:
    for number, p in enumerate(net.parameters()):
        p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    return net


def muon(net: nn.Module, lr: float = 0.01, weight_decay: float = 0.0) -> Optimizer:
    return OPTIMIZERS["muon"](net, lr, (0.9, 0.99), weight_decay)


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


@pytest.mark.parametrize(("name", "others"), [("adamw", ()), ("muon", ("1.weight", "3.weight"))])
def test_adamw_is_torchs_and_so_is_muon_but_for_the_matrices(name: str, others: tuple[str, ...]) -> None:
    ours, theirs = with_gradients(network()), with_gradients(network())
    optimizer = OPTIMIZERS[name](ours, 0.01, (0.9, 0.99), 0.1)
    adamw = torch.optim.AdamW(theirs.parameters(), 0.01, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for found_inf in (0, 0, 1, 0):  # as a skipped step does not count
        optimizer.found_inf = adamw.found_inf = torch.tensor(float(found_inf))  # type: ignore[attr-defined]
        optimizer.step()
        adamw.step()
    for parameter, p in ours.named_parameters():
        same = torch.equal(p, theirs.get_parameter(parameter))
        assert same == (parameter not in others), parameter
        assert set(optimizer.state[p]) == set(state_names(optimizer, p)), parameter


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_scaler_skips_what_overflowed_and_does_not_wait(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, scaler = with_gradients(network(), float("inf")), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = OPTIMIZERS[name](net, 0.01, (0.9, 0.99), 0.1)
    before = deepcopy(net.state_dict())
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("asked the device"))
        scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    assert scaler.get_scale() == 2.0


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
