"""Training: one loop, visible from top to bottom.

Every random draw is a function of (seed, stream, step), so a run has no hidden state: what a checkpoint holds is
weights, their average, the optimizer's moments, a step number and the loss since the last line of the log.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config.choices import choose_sampler
from ddpm.data.batches import Batches
from ddpm.data.dataset import Dataset
from ddpm.diffusion.objective import losses
from ddpm.errors import CheckpointError, UserError
from ddpm.io import images
from ddpm.runtime.device import without_cudnn_benchmark
from ddpm.sample.model import Guidance, Model, denoiser, labels
from ddpm.sample.sampling import draw, finite, last
from ddpm.train import metrics_file
from ddpm.train.checkpointing import save
from ddpm.train.cuda_graph import CapturedSteps
from ddpm.train.state import TrainState
from ddpm.train.step import autocast, in_layout, learning_rate, train_step
from ddpm.train.validation import Validation

PREVIEWS = 36
PREVIEW_STEPS = 20
MIN_LOSS_SCALE = 1.0  # of fp16: below this no gradient is left


class Progress(NamedTuple):
    """What `fit` yields after each step: its number, and the line of metrics.jsonl where one was written."""

    step: int
    record: dict[str, float] | None
    note: str = ""  # for the user


def fit(run: TrainState, data: Dataset, run_dir: Path) -> Iterator[Progress]:
    """Train from run.step to run.max_steps; write metrics.jsonl, samples/ and checkpoints/ under `run_dir`.

    The caller may stop, or `keep` a checkpoint, after any step. Several processes go through the same steps and have
    the same figures, and rank 0 writes. Raises UserError when loss or gradients stop being finite (no
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
    captured = CapturedSteps(run, batches) if run.device.type == "cuda" else None
    clock, counted = time.perf_counter(), run.step

    while run.step < run.max_steps:
        loss, grad_norm = captured.step() if captured else train_step(run, *batches.batch(run.step))
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
                "loss": run.loss_sum.item() / (step - run.last_logged_step),
                "lr": learning_rate(config.optimizer, step - 1, run.max_steps),
                "grad_norm": grad_norm.item(),
                "images_per_second": (step - counted) * trainer.batch_size / seconds,
            }
            # a step that fp16 skipped has no finite gradient norm
            record = {name: value for name, value in wanted.items() if math.isfinite(value)}
            if due(trainer.validate_every):
                record |= _validate(run, validation)
            run.loss_sum.zero_()
            run.last_logged_step = step
            if run.world.first and due(trainer.sample_every):
                _preview(run, run_dir / "samples")
            if run.world.first and record.get("val_eps_mse", math.inf) < best:
                # before the step file: where a process is killed in between, this comes again
                best = record["val_eps_mse"]
                save(run, run_dir / "checkpoints" / "best.safetensors", record)
            if run.world.first:  # after `best`: figures in the file show that there was a checkpoint
                metrics_file.append(run_dir / "metrics.jsonl", record)
            if run.world.first and due(trainer.checkpoint_every):
                keep(run, run_dir, record)
            clock, counted = time.perf_counter(), step
        yield Progress(step, record, captured.take_note() if captured else "")


def keep(run: TrainState, run_dir: Path, record: Mapping[str, float]) -> Path:
    """Save a step file of the run as it is now, then delete older ones than the last `trainer.keep`. Returns it."""
    stop_if_not_finite(run)
    with open(run_dir / "metrics.jsonl", "r+b") as file:  # must not be lost where the checkpoint is not
        os.fsync(file.fileno())
    path = run_dir / "checkpoints" / f"step_{run.step:07d}.safetensors"
    save(run, path, record)
    for old in locate.saved_steps(run_dir)[: -run.config.trainer.keep]:
        old.unlink()
    return path


def trial(run: TrainState, n: int) -> None:
    """Run forward and backward for n images, without an update and without an exchange with other processes."""
    c, size = run.facts.channels, run.facts.image_size
    x_0 = torch.zeros(n, c, size, size, device=run.device)
    t = torch.zeros(n, dtype=torch.int64, device=run.device)
    y = torch.zeros_like(t) if run.config.model.params["conditional"] else None
    with nullcontext() if run.parallel is None else run.parallel.no_sync():
        with autocast(run):
            clean = in_layout(x_0, run.config.trainer.channels_last)
            loss = losses(run.parallel or run.network, run.objective, clean, t, torch.zeros_like(x_0), y)
        loss.mean().backward()  # type: ignore[no-untyped-call]
    run.network.zero_grad()


def _validate(run: TrainState, validation: Validation) -> dict[str, float]:
    conditional = bool(run.config.model.params["conditional"])
    with without_cudnn_benchmark():
        figures = validation.measure(run.ema, conditional, world=run.world)
    for name, value in figures.items():
        if not math.isfinite(value):
            lr = f"optimizer.lr={run.config.optimizer.lr:g}: try a smaller one"
            raise UserError(f"{name} is {value} at step {run.step} ({lr})")
    return figures


def _preview(run: TrainState, folder: Path) -> None:
    """Draw a grid with the averaged weights, from the same noise each time. Raises UserError if it is not finite."""
    index = torch.arange(min(PREVIEWS, images.fitting(run.facts.image_size) ** 2), device=run.device)
    model = Model(run.ema, run.schedule, run.config, run.facts, run.device)
    steps = min(PREVIEW_STEPS, run.schedule.num_timesteps)
    sampler = choose_sampler("ddim", {"num_steps": steps, "eta": 1.0})
    y = labels(model, None, index, Guidance())
    steps_taken = draw(model, sampler, denoiser(model, sampler, y, Guidance()), index, run.config.seed)
    with without_cudnn_benchmark():
        x = last(finite(steps_taken, index.cpu()))
    images.save_png(folder / f"step_{run.step:07d}.png", images.grid(images.to_uint8(x)))


def stop_if_not_finite(run: TrainState) -> None:
    """Check all updates since the beginning. Raises UserError if one was not finite. Waits for the device."""
    step, loss, grad_norm = run.first_nonfinite.tolist()
    if step >= 0:
        lr = learning_rate(run.config.optimizer, int(step) - 1, run.max_steps)
        raise UserError(
            f"loss {loss:g} with gradient norm {grad_norm:g} at step {step:.0f}, at a learning rate of {lr:g}: that "
            "update was not made, and nothing was saved since; try a smaller optimizer.lr or trainer.grad_clip, or "
            "trainer.precision=fp32"
        )
    if run.scaler.is_enabled() and run.scaler.get_scale() < MIN_LOSS_SCALE:
        scale = f"the fp16 loss scale fell below {MIN_LOSS_SCALE:g} at step {run.step}"
        raise UserError(f"{scale}: use trainer.precision=bf16 or fp32")


def _best_figure(run_dir: Path, step: int) -> float:
    """Return the val_eps_mse of `best`; inf where it is absent, broken or of a later step than this."""
    best = run_dir / "checkpoints" / "best.safetensors"
    try:
        checkpoint.verify(best)
        meta, _ = checkpoint.read_meta(best)
    except CheckpointError:
        return math.inf
    return meta.figures.get("val_eps_mse", math.inf) if meta.step <= step else math.inf
