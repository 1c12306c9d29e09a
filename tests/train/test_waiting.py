"""Nothing in a step waits for the GPU: traced on fake tensors of a fake one, which know no number they could hand over.

What is left to a real one, where benchmarks/bench_gpu.py looks: kernels that wait inside themselves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.config.choices import choose_sampler
from ddpm.data.batches import Batches
from ddpm.networks.kernels import group_norm_triton
from ddpm.sample import sampling
from ddpm.sample.model import Guidance, Model, denoiser, levels
from ddpm.train import cuda_graph, optimizers
from ddpm.train.optimizers import OPTIMIZERS
from ddpm.train.state import TrainState, prepare
from tests.train.test_training import CPU, config, tiny_data

GPU = torch.device("cuda", 0)


class Waits(TorchDispatchMode):
    """Raises AssertionError where a tensor goes from one device to another and the host has to wait for it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        # `where` copies a number that lies on the CPU; other functions hand it to their kernel
        copies = any(word in str(function) for word in ("copy", "lift", "where"))
        goes_on = (kwargs or {}).get("non_blocking") or (
            str(function) == "aten.copy_.default" and args[2:] == (True,)
        )
        assert not copies or len(devices) < 2 or goes_on, f"{function} waits"
        return out


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: torch.where(x > 0, x, torch.zeros(())),
    ],
)
def test_waiting_is_seen(work: Callable[[Tensor], object]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises((AssertionError, RuntimeError)):
        x = torch.empty(3, device=GPU)
        with Waits():
            work(x)


class Scaler:
    """In place of a GradScaler that is off: torch's own backward pass runs only where there is a GPU."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def scale(self, loss: Tensor) -> "Scaler":
        assert loss.device == GPU and loss.requires_grad
        return self

    def backward(self) -> None:
        for p in self.network.parameters():
            p.grad = torch.empty_like(p)

    def unscale_(self, optimizer: object) -> None: ...

    def is_enabled(self) -> bool:
        return False


class NoKernel:
    """In place of a kernel of Triton, which needs a GPU: launched like one, does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *tensors, **sizes: None


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(group_norm_triton, name, NoKernel())


def to_gpu(run: TrainState) -> None:
    """All that a run has on its device, inside of a FakeTensorMode."""
    for network in (run.network, run.ema):
        for module in network.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(p.to(GPU), p.requires_grad))
    tables = {name: x.to(GPU) for name, x in vars(run.objective).items() if isinstance(x, Tensor)}
    run.objective, run.device = dataclasses.replace(run.objective, **tables), GPU
    run.loss_history, run.first_nonfinite, run.loss_sum = (
        x.to(GPU) for x in (run.loss_history, run.first_nonfinite, run.loss_sum)
    )
    run.scaler = Scaler(run.network)  # type: ignore[assignment]
    o = run.config.optimizer
    run.optimizer = OPTIMIZERS[o.name](run.network, lr=o.lr, betas=(o.beta_1, o.beta_2), weight_decay=0.1)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "optimizer=muon",
            "model.channels=[8,32]",
            "model.conditional=true",
            "objective.timesteps=stratified",
        ],
        ["objective.timesteps=loss_aware", "trainer.accumulate=3", "model.dropout=0.1"],
        [
            "objective.timesteps=logit_normal",
            "objective.learned_variance=true",
            "trainer.channels_last=false",
        ],
    ],
    ids=str,
)
def test_no_training_step_waits(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    """Over the border of two epochs, too."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # only a GPU's driver can
    fused = optimizers.adamw  # which knows no fake tensors as learning rate
    monkeypatch.setattr(optimizers, "adamw", lambda *all_, lr, **more: fused(*all_, lr=1e-3, **more))
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    data = tiny_data()
    run = prepare(config(*overrides), data, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(run)
        batches = Batches(data.train, 12, 0, GPU)
        steps = cuda_graph.CapturedSteps(run, batches)
        steps.obstacle = "no GPU to capture on"
        monkeypatch.setattr(steps, "_in_side_stream", steps._step)
        with Waits():
            for run.step in range(5):
                loss, _ = steps.step()
                run.loss_sum += torch.where(loss.isfinite(), loss, 0)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_no_sampling_step_waits(name: str) -> None:
    run = prepare(config("model.conditional=true"), tiny_data(), CPU)
    model = Model(run.ema, run.schedule, run.config, run.facts, GPU)
    chosen = choose_sampler(name, {"num_steps": 4})
    path = levels(model, chosen)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(run)
        index = torch.arange(3, device=GPU)
        x = torch.empty(3, *model.shape, device=GPU)
        denoise = denoiser(model, chosen, index, Guidance(2.0))
        steps = sampling.finite(sampling.run(model, chosen, denoise, path, x, index, 0), torch.arange(3))
        with Waits():
            assert [next(steps).level for _ in path[1:]] == path[1:]
