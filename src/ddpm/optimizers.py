"""Optimizers: AdamW, and Muon for the matrices inside a network. To add one, write it and put it into `OPTIMIZERS`."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # singular values end within about 0.7 … 1.2
SMALLEST = 32  # rows and columns of a matrix; first and last layers, class tables and the like have fewer


class Optimizer(torch.optim.Optimizer):
    """AdamW, fused (Loshchilov & Hutter 2019), but for `matrices`: those are Muon's (Jordan et al. 2024).

    Muon's momentum is made orthogonal before each update. A convolution's weight is the matrix of its outputs over its
    inputs. An update is scaled to 0.2 of the learning rate, root mean square, about what AdamW's is, so that one rate
    serves both (Liu et al. 2025, *Muon is scalable for LLM training*, eq. 4). `found_inf`: where this is 1, `step`
    leaves weights and state as they are, without asking the host.

    Torch's own AdamW imports torch's compiler, which is a third of the time until the first step; so do
    `add_param_group` and `zero_grad` of its base class. Clear a network's gradients with the network's `zero_grad`.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # torch's GradScaler sets found_inf then, and does not wait

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        matrices: Collection[nn.Parameter] = (),
    ) -> None:
        own = set(matrices)
        rest = [p for p in network.parameters() if p not in own]
        groups = [{"params": list(matrices), "turned": True}, {"params": rest, "turned": False}]
        super().__init__(
            [group for group in groups if group["params"]],
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.param_groups.append({**self.defaults, **param_group})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["turned"]:
                self._turn(parameters, group["lr"], group["weight_decay"])
            else:
                self._adamw(parameters, group)

    def _turn(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        skipped = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        weight = (1 - MOMENTUM) * (1 - skipped)
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in parameters:
            by_shape.setdefault(_matrix(p).shape, []).append(p)
        for shape, members in by_shape.items():
            gradient = torch.stack([_matrix(p.grad) for p in members if p.grad is not None])
            gradient = torch.where(skipped > 0, 0, gradient)  # 0 times inf is nan
            for p in members:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros(p.shape, device=p.device)
            momenta = [self.state[p]["momentum"] for p in members]
            for momentum, own in zip(momenta, gradient, strict=True):
                momentum.lerp_(own.view(momentum.shape), weight)
            nesterov = gradient.lerp(torch.stack([_matrix(momentum) for momentum in momenta]), MOMENTUM)
            updates = orthogonal(nesterov) * (lr * 0.2 * max(shape) ** 0.5 * (1 - skipped))
            for p, update in zip(members, updates, strict=True):
                if weight_decay:
                    p.mul_(1 - lr * weight_decay * (1 - skipped))
                p.sub_(update.view(p.shape))

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                moments = {key: torch.zeros_like(p) for key in ADAMW_STATE[1:]}
                self.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        states = {key: [self.state[p][key] for p in parameters] for key in ADAMW_STATE}
        beta_1, beta_2 = group["betas"]
        adamw(
            list[Tensor](parameters),
            [p.grad for p in parameters if p.grad is not None],
            states["exp_avg"],
            states["exp_avg_sq"],
            [],
            states["step"],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta_1,
            beta2=beta_2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonal(x: Tensor) -> Tensor:
    """Matrices (N, rows, columns) with their singular values brought near 1: U V' of U S V', roughly.

    Five rounds of a quintic Newton-Schulz iteration (Jordan et al. 2024, after Bernstein & Newhouse 2024), on the
    small square Gram matrix: all that the rounds do is multiply by a polynomial of it.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)  # the squares of what is smaller vanish
    gram, factor = y @ y.mT, torch.eye(y.shape[1], dtype=y.dtype, device=y.device).expand(len(y), -1, -1)
    for left in reversed(range(5)):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        factor = step @ factor
        gram = step @ gram @ step if left else gram
    turned: Tensor = factor @ y
    return turned.mT if tall else turned


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def muon(network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
    """Muon for the matrices inside a network, AdamW for all the rest."""
    matrices = [p for p in network.parameters() if p.ndim > 1 and min(_matrix(p).shape) >= SMALLEST]
    return Optimizer(network, lr, betas, weight_decay, matrices)


def state_names(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """What an optimizer keeps of a parameter, after the first step."""
    turned = any(
        group.get("turned") and any(parameter is p for p in group["params"])
        for group in optimizer.param_groups
    )
    return ("momentum",) if turned else ADAMW_STATE


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": Optimizer, "muon": muon}
