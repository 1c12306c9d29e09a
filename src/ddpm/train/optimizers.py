"""Optimizers: AdamW, and Muon for the matrices inside a network. To add one, write it and put it into `OPTIMIZERS`."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ddpm.checkpoint.verify import ADAMW_STATE

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
        matrices = sorted(matrices, key=_matrix)  # equal shapes side by side, as `_turn` has them
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
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("gradients are still scaled: call the scaler's unscale_ first")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["turned"]:
                self._turn(parameters, group["lr"], group["weight_decay"])
            else:
                self._adamw(parameters, group)

    def _turn(self, parameters: list[nn.Parameter], lr: float | Tensor, weight_decay: float) -> None:
        """All matrices at once, end to end: to launch a kernel for each takes a GPU longer than to run it."""
        if not parameters:
            return
        skipped = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [_lying(self.state[p]["momentum"], p) for p in parameters]
        momentum = torch.cat([m.flatten() for m in momenta])
        gradient = torch.cat([_lying(p.grad, p).flatten() for p in parameters if p.grad is not None])
        gradient = torch.where(skipped > 0, momentum, gradient)  # which leaves the momentum as it is
        momentum.lerp_(gradient, 1 - MOMENTUM)
        torch._foreach_copy_(momenta, _like(torch.split(momentum, [m.numel() for m in momenta]), momenta))

        many = Counter(_matrix(p) for p in parameters)  # equal shapes stand side by side
        ends = torch.split(
            gradient.lerp(momentum, MOMENTUM), [n * math.prod(shape) for shape, n in many.items()]
        )
        stacks = [x.view(n, *shape) for x, (shape, n) in zip(ends, many.items(), strict=True)]
        updates = [update for stack in orthogonal(stacks) for update in stack.unbind()]
        if isinstance(lr, Tensor):
            torch._foreach_mul_(updates, [0.2 * max(update.shape) ** 0.5 for update in updates])
            torch._foreach_mul_(updates, lr * (1 - skipped))
        else:
            torch._foreach_mul_(updates, [lr * 0.2 * max(update.shape) ** 0.5 for update in updates])
            torch._foreach_mul_(updates, 1 - skipped)
        if weight_decay:
            torch._foreach_mul_(list[Tensor](parameters), 1 - lr * weight_decay * (1 - skipped))
        weights = [_lying(p, p) for p in parameters]
        torch._foreach_sub_(weights, _like(updates, weights))

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


def orthogonal(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Stacks of matrices (N, rows, columns) with their singular values brought near 1: U V' of U S V', roughly.

    Five rounds of a quintic Newton-Schulz iteration (Jordan et al. 2024, after Bernstein & Newhouse 2024), on the
    small square Gram matrices: all that the rounds do is multiply by a polynomial of them. So stacks that differ in
    their long side only go through the rounds together.
    """
    wide = [x.mT if x.shape[1] > x.shape[2] else x for x in stacks]
    grams = [y @ y.mT for y in wide]
    factors = dict[int, Tensor]()
    for size in {gram.shape[1] for gram in grams}:
        own = [i for i, gram in enumerate(grams) if gram.shape[1] == size]
        gram = torch.cat([grams[i] for i in own])
        square = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-24)[:, None, None]  # of a matrix's norm
        factor = _polynomial(gram / square) / square.sqrt()
        factors |= zip(own, torch.split(factor, [len(grams[i]) for i in own]), strict=True)
    turned = [factors[i] @ y for i, y in enumerate(wide)]
    return [y if y.shape == x.shape else y.mT.contiguous() for x, y in zip(stacks, turned, strict=True)]


def _polynomial(gram: Tensor) -> Tensor:
    """What the rounds multiply matrices by that have these Gram matrices (N, n, n) of norm 1 at most."""
    a, b, c = NEWTON_SCHULZ
    factor = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for left in reversed(range(5)):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        factor = step @ factor
        gram = step @ gram @ step if left else gram
    return factor


def _matrix(weight: Tensor) -> torch.Size:
    """The shape of a weight as a matrix."""
    return torch.Size((len(weight), weight[0].numel()))


def _lying(x: Tensor, p: Tensor) -> Tensor:
    """x, of the shape of the weight p, with its dimensions in the order in which p lies in memory.

    For the orthogonal matrix the order of columns is none.
    """
    last = p.ndim == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if last else x


def _like(flat: Iterable[Tensor], shaped: Iterable[Tensor]) -> list[Tensor]:
    return [x.view(y.shape) for x, y in zip(flat, shaped, strict=True)]


def muon(network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
    """Muon for the matrices inside a network, AdamW for all the rest."""
    matrices = [p for p in network.parameters() if p.ndim > 1 and min(_matrix(p)) >= SMALLEST]
    return Optimizer(network, lr, betas, weight_decay, matrices)


def state_names(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """What an optimizer keeps of a parameter, after the first step."""
    turned = any(
        group.get("turned") and any(parameter is p for p in group["params"])
        for group in optimizer.param_groups
    )
    return ("momentum",) if turned else ADAMW_STATE


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": Optimizer, "muon": muon}
