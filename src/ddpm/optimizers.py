"""Optimizers: AdamW, and Muon for the matrices inside a network. To add one, write it and put it into `OPTIMIZERS`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # singular values end within about 0.7 … 1.2
SMALLEST = 32  # rows and columns of a matrix; first and last layers, class tables and the like have fewer


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each update (Jordan et al. 2024), AdamW for all the rest.

    A convolution's weight is the matrix of its outputs over its inputs. An update is scaled to 0.2 of the learning
    rate, root mean square, about what AdamW's is, so that one rate serves both (Liu et al. 2025, *Muon is scalable for
    LLM training*, eq. 4). `dtype` is what the matrices are multiplied in. `found_inf`: where this is 1, `step` leaves
    weights and state as they are, without asking the host.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        matrices = [p for p in network.parameters() if p.ndim > 1 and min(_matrix(p).shape) >= SMALLEST]
        own = set(matrices)
        rest = [p for p in network.parameters() if p not in own]
        groups = [{"params": p, "turned": turned} for p, turned in ((matrices, True), (rest, False)) if p]
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.dtype = dtype

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
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for p in parameters:
            assert p.grad is not None
            gradient = torch.where(skipped > 0, 0, p.grad)  # 0 times inf is nan
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(gradient, weight)
            nesterov = _matrix(gradient.lerp(momentum, MOMENTUM))
            by_shape.setdefault(nesterov.shape, []).append((p, nesterov))
        for shape, members in by_shape.items():
            rate = lr * 0.2 * max(shape) ** 0.5 * (1 - skipped)
            updates = orthogonal(torch.stack([update for _, update in members]), self.dtype)
            for (p, _), update in zip(members, updates, strict=True):
                p.mul_(1 - lr * weight_decay * (1 - skipped)).sub_(rate * update.view(p.shape))

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                moments = {key: torch.zeros_like(p) for key in ADAMW_STATE[1:]}
                self.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        states = {key: [self.state[p][key] for p in parameters] for key in ADAMW_STATE}
        beta_1, beta_2 = group["betas"]
        adamw_(
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


def orthogonal(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (N, rows, columns) with their singular values brought near 1: U V' of U S V', roughly.

    Five rounds of a quintic Newton-Schulz iteration (Jordan et al. 2024, after Bernstein & Newhouse 2024).
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = (y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).to(dtype)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    turned: Tensor = y.mT if tall else y
    return turned.to(x.dtype)


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def adamw(
    network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, dtype: torch.dtype
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused. Its arithmetic is float32 whatever `dtype`."""
    parameters = network.parameters()
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def state_names(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """What an optimizer keeps of a parameter, after the first step."""
    turned = any(
        group.get("turned") and any(parameter is p for p in group["params"])
        for group in optimizer.param_groups
    )
    return ("momentum",) if turned else ADAMW_STATE


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "muon": Muon}
