"""A GPU that is not there: fake tensors on it, what would wait for it, kernels that are launched and do nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.train.optimizers import OPTIMIZERS
from ddpm.train.state import TrainState

GPU = torch.device("cuda", 0)


class Waits(TorchDispatchMode):
    """Notes in `found` each function for which the host has to wait, inside of a FakeTensorMode.

    A number that the host asks for is 0. What gives a tensor of unknown size raises RuntimeError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.found += [str(function)] * args[0].is_cuda
            return 0
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        # `where` copies a number that lies on the CPU; other functions hand it to their kernel
        copies = any(word in str(function) for word in ("copy", "lift", "where"))
        goes_on = (kwargs or {}).get("non_blocking") or (
            str(function) == "aten.copy_.default" and args[2:] == (True,)
        )
        if copies and len(devices) > 1 and not goes_on:
            self.found.append(str(function))
        return out


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
    """In place of a kernel of Triton, which needs a GPU: launched like one, does nothing but count."""

    launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    @classmethod
    def launch(cls, *tensors: object, **sizes: object) -> None:
        cls.launches += 1


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
