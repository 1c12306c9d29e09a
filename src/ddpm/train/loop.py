"""Training: one loop, visible from top to bottom.

Every random draw is a function of (seed, stream, step), so a run has no hidden state: what a checkpoint holds is
weights, their average, the optimizer's moments, a step number and the loss since the last line of the log.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config.choices import Choice
from ddpm.config.schema import Optimizer as OptimizerConfig
from ddpm.data.batches import Batches
from ddpm.data.dataset import Dataset
from ddpm.diffusion.objective import losses
from ddpm.diffusion.timesteps import TIMESTEPS, updated_history
from ddpm.errors import CheckpointError, UserError
from ddpm.io import images
from ddpm.runtime import distributed
from ddpm.runtime.device import precision, without_cudnn_benchmark
from ddpm.runtime.randomness import key, normal, seed_generators, uniform
from ddpm.sample.model import Guidance, Model, denoiser, labels
from ddpm.sample.sampling import draw, finite, last
from ddpm.train import metrics_file
from ddpm.train.checkpointing import save
from ddpm.train.state import Run
from ddpm.train.validation import Validation

PREVIEWS = 36
PREVIEW_STEPS = 20
PREVIEW_SAMPLER = {"spacing": "linspace", "rho": 7.0, "clip": "clip", "dynamic_percentile": 0.995, "eta": 1.0}
MIN_LOSS_SCALE = 1.0  # of fp16: below this no gradient is left


class Progress(NamedTuple):
    """After each step: its number, and every so often the line that went to metrics.jsonl."""

    step: int
    record: dict[str, float] | None


def fit(run: Run, data: Dataset, run_dir: Path) -> Iterator[Progress]:
    """Train from run.step to run.max_steps; write metrics.jsonl, samples/ and checkpoints/ under `run_dir`.

    Whoever iterates may stop, or `keep` a checkpoint, after any step. Of several processes all go through the same
    steps and have the same figures, and rank 0 writes. Raises UserError when loss or gradients stop being finite (no
    such number ever reaches the weights), and OSError where nothing can be written.
    """
    config, trainer, best = run.config, run.config.trainer, math.inf
    if run.world.first:
        for folder in ("checkpoints", "samples"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
        metrics_file.cut(run_dir / "metrics.jsonl", run.step)
        best = _best_figure(run_dir, run.step)
    batches = Batches(data.train, trainer.batch_size, config.seed, run.device)
    validation = Validation(data.val, run.schedule, run.objective, run.device)
    intervals = (trainer.log_every, trainer.validate_every, trainer.sample_every, trainer.checkpoint_every)
    clock, counted = time.perf_counter(), run.step

    while run.step < run.max_steps:
        x_0, y = batches.batch(run.step)
        loss, grad_norm = train_step(run, x_0, y)
        run.loss_sum += torch.where(loss.isfinite(), loss, 0)  # fp16 may skip a step, all others stop
        run.step += 1
        step, done = run.step, run.step == run.max_steps

        def due(every: int, step: int = step, done: bool = done) -> bool:
            return done or (every > 0 and step % every == 0)

        record: dict[str, float] | None = None
        if any(due(every) for every in intervals):
            stop_if_not_finite(run)
            seconds = time.perf_counter() - clock
            wanted = {
                "step": step,
                "loss": run.loss_sum.item() / (step - run.since),
                "lr": learning_rate(config.optimizer, step - 1, run.max_steps),
                "grad_norm": grad_norm.item(),
                "images_per_second": (step - counted) * trainer.batch_size / seconds,
            }
            # a step that fp16 skipped has no finite gradient norm
            record = {name: value for name, value in wanted.items() if math.isfinite(value)}
            if due(trainer.validate_every):
                record |= _validate(run, validation)
            if run.world.first:
                metrics_file.append(run_dir / "metrics.jsonl", record)
            run.loss_sum.zero_()
            run.since = step
            if run.world.first and due(trainer.sample_every):
                _preview(run, run_dir / "samples")
            if run.world.first and record.get("val_eps_mse", math.inf) < best:
                # before the step file: where a process is killed in between, this comes again
                best = record["val_eps_mse"]
                save(run, run_dir / "checkpoints" / "best.safetensors", record)
            if run.world.first and due(trainer.checkpoint_every):
                keep(run, run_dir, record)
            clock, counted = time.perf_counter(), step
        yield Progress(step, record)


def keep(run: Run, run_dir: Path, record: Mapping[str, float]) -> Path:
    """A step file of the run as it is now; older ones than the last `trainer.keep` go when it is safely there."""
    stop_if_not_finite(run)
    with open(run_dir / "metrics.jsonl", "r+b") as file:  # must not be lost where the checkpoint is not
        os.fsync(file.fileno())
    path = run_dir / "checkpoints" / f"step_{run.step:07d}.safetensors"
    save(run, path, record)
    for old in locate.saved_steps(run_dir)[: -run.config.trainer.keep]:
        old.unlink()
    return path


def train_step(run: Run, x_0: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """One update on a batch: noise → loss → backward → unscale → clip → step → EMA. Returns loss and gradient norm.

    Nothing here waits for the GPU. A non-finite update is skipped on the device and noted in `run.bad`. Of several
    processes each is given the whole batch and computes its share; losses and gradients are then those of all.
    """
    config, trainer = run.config, run.config.trainer
    # for dropout, and the one draw that depends on the process: two must not use the same masks
    seed_generators(
        key(config.seed, f"network {run.world.rank}" if run.world.rank else "network", run.step), run.device
    )
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, run.step, run.max_steps)
    for parameter in run.parameters:
        parameter.grad = None

    own = torch.arange(len(x_0), device=run.device)[run.world.share(len(x_0))].chunk(trainer.accumulate)
    each = len(x_0) / run.world.size  # gradients are averaged over processes, so each sum is divided by this
    parts = []
    for number, index in enumerate(own, start=1):
        t, weight, eps, labels = _draw(run, x_0, y, index)
        with nullcontext() if run.parallel is None or number == len(own) else run.parallel.no_sync():
            with torch.autocast(run.device.type, *_autocast(trainer.precision, run.device)):
                clean = _layout(x_0[index], trainer.channels_last)
                loss = losses(run.parallel or run.network, run.objective, clean, t, eps, labels)
            run.scaler.scale((weight * loss).sum() / each).backward()  # type: ignore[no-untyped-call]
        parts.append((t, loss.detach(), weight))
    t, loss, weight = (torch.cat(values) for values in zip(*parts, strict=True))
    if run.world.size > 1:  # of the whole batch, in its order; a float32 holds any t
        t, loss, weight = distributed.gathered(run.world, torch.stack([t, loss, weight]), len(x_0))
        t = t.long()
    total = (weight * loss).mean()
    if config.objective.timesteps == "loss_aware":
        run.history = updated_history(run.history, t, loss)

    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.parameters, trainer.grad_clip, foreach=True)
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:  # the fused optimizer leaves the weights alone where found_inf is 1, without asking the host
        found_inf = (~torch.isfinite(total + grad_norm)).float()
        now = torch.stack([torch.full_like(total, run.step + 1), total, grad_norm])
        run.bad = torch.where((run.bad[0] < 0) & (found_inf > 0), now, run.bad)
        run.optimizer.found_inf = found_inf
        run.optimizer.step()
    update_ema(run.averages, run.parameters, trainer.ema_decay, run.step)
    return total, grad_norm


def trial(run: Run, n: int) -> None:
    """Forward and backward for n images, without an update: what it takes is what they need. Tells no other process."""
    c, size = run.facts.channels, run.facts.image_size
    x_0 = torch.zeros(n, c, size, size, device=run.device)
    t = torch.zeros(n, dtype=torch.int64, device=run.device)
    y = torch.zeros_like(t) if run.config.model.params["conditional"] else None
    with nullcontext() if run.parallel is None else run.parallel.no_sync():
        with torch.autocast(run.device.type, *_autocast(run.config.trainer.precision, run.device)):
            clean = _layout(x_0, run.config.trainer.channels_last)
            loss = losses(run.parallel or run.network, run.objective, clean, t, torch.zeros_like(x_0), y)
        loss.mean().backward()  # type: ignore[no-untyped-call]
    run.network.zero_grad()


def _draw(
    run: Run, x_0: Tensor, y: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Times and their weights, noise and labels of the images `index` of this step's batch."""
    seed, o = run.config.seed, run.config.objective
    t, weight = TIMESTEPS[o.timesteps](
        seed,
        run.step,
        index,
        len(x_0),
        run.schedule.num_timesteps,
        logit_normal_mean=o.logit_normal_mean,
        logit_normal_std=o.logit_normal_std,
        history=run.history,
    )
    eps = normal(seed, "eps", run.step, index, tuple(x_0.shape[1:]))
    if y is None or not run.config.model.params["conditional"]:
        return t, weight, eps, None
    dropped = uniform(seed, "label_dropout", run.step, index) < o.label_dropout
    return t, weight, eps, torch.where(dropped, run.facts.num_classes, y[index])


def _layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@torch.no_grad()
def update_ema(averages: Sequence[Tensor], parameters: Sequence[Tensor], decay: float, step: int) -> None:
    """average ← decay · average + (1 - decay) · parameter, in place.

    The decay is smaller in the beginning: (1 + step) / (10 + step).
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averages, parameters, 1 - decay)


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Linear warm-up, then constant, or half a cosine down to 0 at max_steps (Loshchilov & Hutter 2017, eq. 5).

    Or halved after each of `halvings` + 1 equal parts of the run but the last.
    """
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.decay == "constant":
        return config.lr * warm
    if config.decay == "halving":
        return config.lr * warm * 0.5 ** (step * (config.halvings + 1) // max_steps)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / max_steps))


def _autocast(name: str, device: torch.device) -> tuple[torch.dtype | None, bool]:
    dtype = precision(name, device)
    return (None, False) if dtype == torch.float32 else (dtype, True)


def _validate(run: Run, validation: Validation) -> dict[str, float]:
    conditional = bool(run.config.model.params["conditional"])
    with without_cudnn_benchmark():
        figures = vars(validation.measure(run.ema, conditional, world=run.world))
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value} at step {run.step} (optimizer.lr={run.config.optimizer.lr:g}): the weights have "
                "grown beyond use; try a smaller optimizer.lr"
            )
    return figures


def _preview(run: Run, folder: Path) -> None:
    """A grid from the averaged weights and noise that is the same each time. Raises UserError if it is not finite."""
    index = torch.arange(PREVIEWS, device=run.device)
    model = Model(run.ema, run.schedule, run.config, run.facts, run.device)
    steps = min(PREVIEW_STEPS, run.schedule.num_timesteps)
    sampler = Choice("ddim", {**PREVIEW_SAMPLER, "num_steps": steps})
    y = labels(model, None, index, Guidance())
    steps_taken = draw(model, sampler, denoiser(model, sampler, y, Guidance()), index, run.config.seed)
    with without_cudnn_benchmark():
        x = last(finite(steps_taken, index.cpu()))
    images.save_png(folder / f"step_{run.step:07d}.png", images.grid(images.to_uint8(x)))


def stop_if_not_finite(run: Run) -> None:
    """Raises UserError if an update since the beginning was not finite. Waits for the device."""
    step, loss, grad_norm = run.bad.tolist()
    if step >= 0:
        lr = learning_rate(run.config.optimizer, int(step) - 1, run.max_steps)
        raise UserError(
            f"loss {loss:g} with gradient norm {grad_norm:g} at step {step:.0f}, at a learning rate of {lr:g}: that "
            "update was not made, and nothing was saved since; try a smaller optimizer.lr or trainer.grad_clip, or "
            "trainer.precision=fp32"
        )
    if run.scaler.is_enabled() and run.scaler.get_scale() < MIN_LOSS_SCALE:
        raise UserError(
            f"fp16 loss scale fell below {MIN_LOSS_SCALE:g} at step {run.step}: use trainer.precision=bf16 or fp32"
        )


def _best_figure(run_dir: Path, step: int) -> float:
    """The figure to beat: that of `best`, unless it lies ahead of this step, or is broken."""
    best = run_dir / "checkpoints" / "best.safetensors"
    try:
        checkpoint.verify(best)
        meta, _ = checkpoint.read_meta(best)
    except CheckpointError:
        return math.inf
    return meta.figures.get("val_eps_mse", math.inf) if meta.step <= step else math.inf
