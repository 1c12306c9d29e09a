"""Timesteps: which t each image of a batch is trained at, and the weight that keeps the mean loss unbiased.

Each function takes (seed, step, index, batch_size, num_timesteps, *, …): `index` (n,) int64 holds the places
of n images in the batch of `batch_size`, and the result is (t (n,) int64, weight (n,) float32). It depends on
nothing else, so a rank or a micro-batch draws its own part and the parts make up the same batch as one
process would. Each takes the parameters it knows and lets the others pass. To add one, write it and put it
into `TIMESTEPS`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm.errors import positive
from ddpm.runtime import randomness
from ddpm.runtime.randomness import Step

UNIFORM_PART = 0.001  # of the draws in `loss_aware`, so that no t is forgotten
HISTORY = 10  # losses kept for each t (Nichol & Dhariwal 2021, section 3.3)


def uniform(
    seed: int, step: Step, index: Tensor, batch_size: int, num_timesteps: int, **_: Any
) -> tuple[Tensor, Tensor]:
    """Draw each t alike, each image by itself (Ho et al. 2020, algorithm 1)."""
    t = _bits(seed, step, index) * num_timesteps >> 24
    return t, torch.ones_like(t, dtype=torch.float32)


def stratified(
    seed: int, step: Step, index: Tensor, batch_size: int, num_timesteps: int, **_: Any
) -> tuple[Tensor, Tensor]:
    """Draw one t in each of batch_size equal slices of 0 … T-1: the loss varies less from batch to batch.

    Kingma et al. 2021, appendix I.1, with one draw for each slice. In integers, so that none is rounded into the next.
    """
    t = ((index << 24) + _bits(seed, step, index)) * num_timesteps // (batch_size << 24)
    return t, torch.ones_like(t, dtype=torch.float32)


def logit_normal(
    seed: int,
    step: Step,
    index: Tensor,
    batch_size: int,
    num_timesteps: int,
    *,
    logit_normal_mean: float = 0.0,
    logit_normal_std: float = 1.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Draw t / T = sigmoid(mean + std z), z ~ N(0, 1) (Esser et al. 2024, eq. 19): the middle more often.

    The weight is 1: the preference is wanted. A mean above 0 leans towards noise.
    """
    positive("logit_normal_std", logit_normal_std)
    z = randomness.normal(seed, "timesteps", step, index, ())
    part = torch.sigmoid(logit_normal_mean + logit_normal_std * z)
    t = (part * num_timesteps).long().clamp(max=num_timesteps - 1)
    return t, torch.ones_like(part)


def loss_aware(
    seed: int, step: Step, index: Tensor, batch_size: int, num_timesteps: int, *, history: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Draw t in proportion to the root mean square of its last losses, with weight 1 / (T p_t).

    Nichol & Dhariwal 2021, eq. 18; uniform until each t has 10 losses in `history` (T, 10).
    """
    importance = history.square().mean(dim=1).sqrt()
    share = importance / importance.sum()
    share = torch.where(share.isfinite().all(), share, 1 / num_timesteps)  # nan while a loss is missing
    share = (1 - UNIFORM_PART) * share + UNIFORM_PART / num_timesteps
    ends = (share * 2**38).long().cumsum(0)  # in integers, whose sum has one order-free result on any device
    t = torch.searchsorted(ends, _bits(seed, step, index) * ends[-1] >> 24, right=True)
    probability = ends.diff(prepend=ends.new_zeros(1)) / ends[-1]
    return t, (1 / (num_timesteps * probability))[t].float()


def empty_history(num_timesteps: int, device: torch.device | str) -> Tensor:
    """Make the state of `loss_aware`, (T, 10) float32, oldest loss first, nan where there is none yet."""
    return torch.full((num_timesteps, HISTORY), torch.nan, device=device)


def updated_history(history: Tensor, t: Tensor, losses: Tensor) -> Tensor:
    """Return the history after a whole batch, in the order of the batch, without losses that are not finite.

    Image j, the i-th of the n with its t, goes to column 10 - n + i after the old ones have moved n to the
    left.
    """
    num_timesteps = len(history)
    t, losses = t.flatten(), losses.detach().float().flatten()
    t = torch.where(losses.isfinite(), t, num_timesteps)  # one row more takes what is to be dropped
    t, order = torch.sort(t, stable=True)
    count = torch.zeros(num_timesteps + 1, dtype=torch.int64, device=t.device)
    count.scatter_add_(0, t, torch.ones_like(t))
    place = torch.arange(len(t), device=t.device) - (count.cumsum(0) - count)[t]
    column = HISTORY - count[t] + place  # below 0 where one t has more than 10; one column more takes these
    moved = torch.arange(HISTORY, device=t.device) + count[:-1, None]
    kept = history.gather(1, moved.clamp(max=HISTORY - 1))
    table = torch.cat([kept.new_zeros(num_timesteps, 1), kept], dim=1)
    table = torch.cat([table, table.new_zeros(1, HISTORY + 1)])
    table[t, (column + 1).clamp(min=0)] = losses[order]
    return table[:-1, 1:]


def _bits(seed: int, step: Step, index: Tensor) -> Tensor:
    """24 random bits for each index, int64."""
    return (randomness.uniform(seed, "timesteps", step, index) * 2**24).long()


TIMESTEPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "uniform": uniform,
    "stratified": stratified,
    "logit_normal": logit_normal,
    "loss_aware": loss_aware,
}
