"""Optimizers: AdamW, and Muon for the matrices inside a network."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ddpm.checkpoint.verify import ADAMW_STATE

MOMENTUM = 0.95
# singular values above 0.0015 of the norm end within about 0.7 … 1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
SMALLEST = 32  # rows and columns of Muon's matrices; first and last layers and class embeddings have fewer


class Optimizer(torch.optim.Optimizer):
    """Fused AdamW (Loshchilov & Hutter 2019) for a network's parameters; Muon (Jordan et al. 2024) for its `matrices`.

    Muon orthogonalizes the momentum before each update. A convolution's weight counts as a matrix (outputs, inputs ·
    height · width). An update is scaled to a root mean square of 0.2 of the learning rate, about that of AdamW, so
    that both take the same rate (Liu et al. 2025, *Muon is scalable for LLM training*, eq. 4). Where `found_inf` is 1,
    `step` leaves weights and state unchanged, without a synchronization with the host.

    torch.optim.AdamW imports torch's compiler, a third of the time until the first step; so do `add_param_group` and
    `zero_grad` of its base class. Clear gradients with the network's `zero_grad`.
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
        self.matrices = set(matrices)
        equal_side_by_side = sorted(matrices, key=_matrix)  # as `_muon` takes them
        rest = [p for p in network.parameters() if p not in self.matrices]
        groups = [{"params": equal_side_by_side, "muon": True}, {"params": rest, "muon": False}]
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
            if group["muon"]:
                self._muon(parameters, group["lr"], group["weight_decay"])
            else:
                self._adamw(parameters, group)

    def _muon(self, parameters: list[nn.Parameter], lr: float | Tensor, weight_decay: float) -> None:
        """Update all matrices as one flat tensor: on a GPU, a kernel for each takes longer to launch than to run."""
        if not parameters:
            return
        skipped = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [_in_memory_order(self.state[p]["momentum"], p) for p in parameters]
        momentum = torch.cat([m.flatten() for m in momenta])
        gradient = torch.cat(
            [_in_memory_order(p.grad, p).flatten() for p in parameters if p.grad is not None]
        )
        gradient = torch.where(skipped > 0, momentum, gradient)  # then the momentum does not change
        momentum.lerp_(gradient, 1 - MOMENTUM)
        torch._foreach_copy_(momenta, _view_as(torch.split(momentum, [m.numel() for m in momenta]), momenta))

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
        weights = [_in_memory_order(p, p) for p in parameters]
        torch._foreach_sub_(weights, _view_as(updates, weights))

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
    """Orthogonalize stacks of matrices (N, rows, columns): U S V' becomes about U V', singular values near 1.

    Five rounds of a quintic Newton-Schulz iteration (Jordan et al. 2024, after Bernstein & Newhouse 2024). They amount
    to a product with a polynomial of the small square Gram matrix, so stacks with equal short sides share one
    computation.
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
    results = [factors[i] @ y for i, y in enumerate(wide)]
    return [y if y.shape == x.shape else y.mT.contiguous() for x, y in zip(stacks, results, strict=True)]


def _polynomial(gram: Tensor) -> Tensor:
    """Return the factor (N, n, n) of all rounds together for Gram matrices (N, n, n) of norm at most 1."""
    a, b, c = NEWTON_SCHULZ
    factor = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for left in reversed(range(5)):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        factor = step @ factor
        gram = step @ gram @ step if left else gram
    return factor


def _matrix(weight: Tensor) -> torch.Size:
    """Return the shape of a weight as a matrix."""
    return torch.Size((len(weight), weight[0].numel()))


def _in_memory_order(x: Tensor, p: Tensor) -> Tensor:
    """Permute x, of the shape of the weight p, to the order in which p is stored (channels_last or contiguous).

    The order of a matrix's columns does not matter for its orthogonalization.
    """
    last = p.ndim == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if last else x


def _view_as(flat: Iterable[Tensor], shaped: Iterable[Tensor]) -> list[Tensor]:
    return [x.view(y.shape) for x, y in zip(flat, shaped, strict=True)]


def muon(network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
    """Return Muon for the matrices inside a network and AdamW for all other parameters."""
    matrices = [p for p in network.parameters() if p.ndim > 1 and min(_matrix(p)) >= SMALLEST]
    return Optimizer(network, lr, betas, weight_decay, matrices)


def state_names(optimizer: Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """Return the names of the state tensors of a parameter after the first step."""
    return ("momentum",) if parameter in optimizer.matrices else ADAMW_STATE


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": Optimizer, "muon": muon}
