"""One training step: noise → loss → backward → unscale → clip → step → EMA."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm.config.training import Optimizer as OptimizerConfig
from ddpm.diffusion.objective import losses
from ddpm.diffusion.timesteps import TIMESTEPS, updated_history
from ddpm.runtime import distributed
from ddpm.runtime.device import precision
from ddpm.runtime.randomness import key, normal, seed_generators, uniform
from ddpm.train.state import TrainState


class StepNumbers(NamedTuple):
    """What differs from step to step, apart from the data: numbers of the host, or 0-dim tensors on the device."""

    keys: int | Mapping[str, Tensor]  # the step, or the keys of its random streams; see `randomness.key`
    lr: float | Tensor
    ema_weight: float | Tensor  # of the new parameters in their average
    number: int | Tensor  # of this step, from 1


def host_numbers(run: TrainState, step: int) -> StepNumbers:
    """Return the numbers of the step that follows `step` others."""
    lr = learning_rate(run.config.optimizer, step, run.max_steps)
    return StepNumbers(step, lr, 1 - ema_decay(run.config.trainer.ema_decay, step), step + 1)


def train_step(run: TrainState, x_0: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Update once on a batch x_0 (N, C, H, W), y (N,) or None. Returns the loss and the gradient's norm, 0-dim."""
    seed_network(run)
    return update(run, x_0, y, host_numbers(run, run.step))


def seed_network(run: TrainState) -> None:
    """Seed dropout: the one draw that depends on the process, as two must not use the same masks."""
    stream = f"network {run.world.rank}" if run.world.rank else "network"
    seed_generators(key(run.config.seed, stream, run.step), run.device)


def update(run: TrainState, x_0: Tensor, y: Tensor | None, now: StepNumbers) -> tuple[Tensor, Tensor]:
    """Run the part of a step that is on the device. Returns the loss and the gradient's norm, 0-dim.

    Nothing here waits for the GPU. A non-finite update is skipped on the device and noted in `run.first_nonfinite`.
    Each of several processes is given the whole batch and computes its share; loss and gradients are those of all.
    """
    trainer = run.config.trainer
    for group in run.optimizer.param_groups:
        group["lr"] = now.lr
    for parameter in run.parameters:
        parameter.grad = None

    own = torch.arange(len(x_0), device=run.device)[run.world.share(len(x_0))].chunk(trainer.accumulate)
    each = len(x_0) / run.world.size  # gradients are averaged over processes, so each sum is divided by this
    parts = []
    for number, index in enumerate(own, start=1):
        t, weight, eps, labels = _draw(run, x_0, y, index, now.keys)
        with nullcontext() if run.parallel is None or number == len(own) else run.parallel.no_sync():
            with autocast(run):
                clean = in_layout(x_0[index], trainer.channels_last)
                loss = losses(run.parallel or run.network, run.objective, clean, t, eps, labels)
            run.scaler.scale((weight * loss).sum() / each).backward()  # type: ignore[no-untyped-call]
        parts.append((t, loss.detach(), weight))
    t, loss, weight = (torch.cat(values) for values in zip(*parts, strict=True))
    if run.world.size > 1:  # of the whole batch, in its order; a float32 holds any t
        t, loss, weight = distributed.all_gather_columns(run.world, torch.stack([t, loss, weight]), len(x_0))
        t = t.long()
    total = (weight * loss).mean()
    if run.keeps_history:
        run.loss_history.copy_(updated_history(run.loss_history, t, loss))

    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.parameters, trainer.grad_clip, foreach=True)
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:  # the fused optimizer leaves the weights alone where found_inf is 1, without asking the host
        found_inf = (~torch.isfinite(total + grad_norm)).float()
        found = torch.stack([torch.zeros_like(total) + now.number, total, grad_norm])
        run.first_nonfinite.copy_(
            torch.where((run.first_nonfinite[0] < 0) & (found_inf > 0), found, run.first_nonfinite)
        )
        run.optimizer.found_inf = found_inf
        run.optimizer.step()
    update_ema(run.averages, run.parameters, now.ema_weight)
    return total, grad_norm


def _draw(
    run: TrainState, x_0: Tensor, y: Tensor | None, index: Tensor, step: int | Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Draw times and their weights (n,), noise (n, C, H, W) and labels (n,) of the images `index` of a batch."""
    seed, o = run.config.seed, run.config.objective
    t, weight = TIMESTEPS[o.timesteps](
        seed,
        step,
        index,
        len(x_0),
        run.schedule.num_timesteps,
        logit_normal_mean=o.logit_normal_mean,
        logit_normal_std=o.logit_normal_std,
        history=run.loss_history,
    )
    eps = normal(seed, "eps", step, index, tuple(x_0.shape[1:]))
    if y is None or not run.config.model.params["conditional"]:
        return t, weight, eps, None
    dropped = uniform(seed, "label_dropout", step, index) < o.label_dropout
    return t, weight, eps, torch.where(dropped, run.facts.num_classes, y[index])


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def autocast(run: TrainState) -> torch.autocast:
    """Run the network in the precision of the config."""
    dtype = precision(run.config.trainer.precision, run.device)
    low = dtype != torch.float32
    return torch.autocast(run.device.type, dtype if low else None, enabled=low)


def ema_decay(decay: float, step: int) -> float:
    """Return `decay`, or (1 + step) / (10 + step) while that is smaller."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(averages: list[Tensor], parameters: list[Tensor], weight: float | Tensor) -> None:
    """average ← (1 - weight) · average + weight · parameter, in place."""
    if isinstance(weight, Tensor):  # which torch._foreach_lerp_ does not take
        torch._foreach_mul_(averages, 1 - weight)
        torch._foreach_add_(averages, list(torch._foreach_mul(parameters, weight)))
    else:
        torch._foreach_lerp_(averages, parameters, weight)


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Return the rate of a step: linear warm-up, then `decay`.

    "cosine" is half a cosine down to 0 at max_steps (Loshchilov & Hutter 2017, eq. 5). "halving" halves the rate after
    each of `halvings` + 1 equal parts of the run but the last.
    """
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.decay == "constant":
        return config.lr * warm
    if config.decay == "halving":
        return config.lr * warm * 0.5 ** (step * (config.halvings + 1) // max_steps)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / max_steps))
