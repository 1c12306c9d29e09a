"""Training: one loop, visible from top to bottom.

Every random draw is a function of (seed, stream, step), so a run has no hidden state: what a checkpoint holds is
weights, their average, the optimizer's moments and a step number.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm import checkpoint, images
from ddpm.config import Choice
from ddpm.config import Optimizer as OptimizerConfig
from ddpm.datasets.batches import Batches
from ddpm.datasets.types import Dataset
from ddpm.diffusion import losses
from ddpm.errors import UserError
from ddpm.randomness import normal, uniform
from ddpm.runs import Run, precision, save
from ddpm.sampling import Guidance, Model, denoiser, draw, labels, last
from ddpm.timesteps import TIMESTEPS, updated_history
from ddpm.validation import Validation

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

    Raises UserError when loss or gradients stop being finite; no such number ever reaches the weights.
    """
    config, trainer = run.config, run.config.trainer
    run_dir.mkdir(parents=True, exist_ok=True)
    batches = Batches(data.train, trainer.batch_size, config.seed, run.device)
    validation = Validation(data.val, run.schedule, run.objective, run.device)
    metrics = _open_metrics(run_dir / "metrics.jsonl", run.step)
    best = _best_figure(run_dir)
    loss_sum = torch.zeros((), device=run.device)
    bad_step = torch.full((), -1, device=run.device)  # the first step that was not finite, kept on the device
    intervals = (trainer.log_every, trainer.validate_every, trainer.sample_every, trainer.checkpoint_every)
    clock, logged = time.perf_counter(), run.step

    while run.step < run.max_steps:
        x_0, y = batches.batch(run.step)
        loss, grad_norm = train_step(run, x_0, y, bad_step)
        loss_sum += loss
        run.step += 1
        step, done = run.step, run.step == run.max_steps

        def due(every: int, step: int = step, done: bool = done) -> bool:
            return done or (every > 0 and step % every == 0)

        record: dict[str, float] | None = None
        if any(due(every) for every in intervals):
            _stop_if_not_finite(run, bad_step, loss)
            mean_loss = loss_sum.item() / (step - logged)
            seconds = time.perf_counter() - clock
            record = {
                "step": step,
                "loss": mean_loss,
                "lr": learning_rate(config.optimizer, step - 1, run.max_steps),
                "grad_norm": grad_norm.item(),
                "images_per_second": (step - logged) * trainer.batch_size / seconds,
            }
            if due(trainer.validate_every):
                figures = validation.measure(run.ema, bool(config.model.params["conditional"]))
                record |= vars(figures)
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            if due(trainer.sample_every):
                _preview(run, run_dir / "samples")
            if due(trainer.checkpoint_every):
                save(run, run_dir / "checkpoints" / f"step_{step:07d}.safetensors", record)
                for old in checkpoint.saved_steps(run_dir)[: -trainer.keep]:
                    old.unlink()
            if record.get("val_eps_mse", math.inf) < best:
                best = record["val_eps_mse"]
                save(run, run_dir / "checkpoints" / "best.safetensors", record)
            loss_sum.zero_()
            clock, logged = time.perf_counter(), step
        yield Progress(step, record)
    metrics.close()


def train_step(run: Run, x_0: Tensor, y: Tensor | None, bad_step: Tensor) -> tuple[Tensor, Tensor]:
    """One update on a batch: noise → loss → backward → unscale → clip → step → EMA. Returns loss and gradient norm.

    Nothing here waits for the GPU. A non-finite update is skipped on the device and its step kept in `bad_step`.
    """
    config, trainer, parameters = run.config, run.config.trainer, list(run.network.parameters())
    run.network.train()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, run.step, run.max_steps)
    run.optimizer.zero_grad(set_to_none=True)

    parts = []
    for index in torch.arange(len(x_0), device=run.device).chunk(trainer.accumulate):
        t, weight, eps, labels = _draw(run, x_0, y, index)
        with torch.autocast(run.device.type, *_autocast(trainer.precision, run.device)):
            clean = _layout(x_0[index], trainer.channels_last)
            loss = losses(run.network, run.objective, clean, t, eps, labels)
        run.scaler.scale((weight * loss).sum() / len(x_0)).backward()  # type: ignore[no-untyped-call]
        parts.append((t, loss.detach(), weight))
    t, loss, weight = (torch.cat(values) for values in zip(*parts, strict=True))
    total = (weight * loss).mean()
    if config.objective.timesteps == "loss_aware":
        run.history = updated_history(run.history, t, loss)

    run.scaler.unscale_(run.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parameters, trainer.grad_clip, foreach=True)
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    else:  # the fused optimizer leaves the weights alone where found_inf is 1, without asking the host
        found_inf = (~torch.isfinite(total + grad_norm)).float()
        bad_step.copy_(torch.where((bad_step < 0) & (found_inf > 0), run.step + 1, bad_step))
        run.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        run.optimizer.step()
    update_ema(run.ema, run.network, trainer.ema_decay, run.step)
    return total, grad_norm


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
def update_ema(ema: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """ema ← decay · ema + (1 - decay) · network, with a smaller decay in the beginning: (1 + step) / (10 + step)."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Linear warm-up, then constant, or half a cosine down to 0 at max_steps (Loshchilov & Hutter 2017, eq. 5)."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.decay == "constant":
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / max_steps))


def _autocast(name: str, device: torch.device) -> tuple[torch.dtype | None, bool]:
    dtype = precision(name, device)
    return (None, False) if dtype == torch.float32 else (dtype, True)


def _preview(run: Run, folder: Path) -> None:
    """A grid from the averaged weights and noise that is the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    index = torch.arange(PREVIEWS, device=run.device)
    model = Model(run.ema, run.schedule, run.config, run.facts, run.device)
    steps = min(PREVIEW_STEPS, run.schedule.num_timesteps)
    sampler = Choice("ddim", {**PREVIEW_SAMPLER, "num_steps": steps})
    y = labels(model, None, index, Guidance())
    x = last(draw(model, sampler, denoiser(model, sampler, y, Guidance()), index, run.config.seed))
    images.save_png(folder / f"step_{run.step:07d}.png", images.grid(images.to_uint8(x)))


def _stop_if_not_finite(run: Run, bad_step: Tensor, loss: Tensor) -> None:
    step, lr = int(bad_step), run.config.optimizer.lr
    if step >= 0:
        raise UserError(
            f"loss or gradient is not finite at step {step} (optimizer.lr={lr:g}); the weights were left as they were. "
            "Try a smaller optimizer.lr or trainer.grad_clip, or trainer.precision=fp32"
        )
    if run.scaler.is_enabled() and run.scaler.get_scale() < MIN_LOSS_SCALE:
        raise UserError(
            f"fp16 loss scale fell below {MIN_LOSS_SCALE:g} at step {run.step}: use trainer.precision=bf16 or fp32"
        )


def _open_metrics(path: Path, step: int) -> Any:
    """metrics.jsonl, open at its end, without the lines past `step` that a resumed run writes again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        checkpoint.write_atomically(path, "".join(line + "\n" for line in kept).encode())
    return open(path, "a", encoding="utf-8")


def _best_figure(run_dir: Path) -> float:
    best = run_dir / "checkpoints" / "best.safetensors"
    return checkpoint.read_meta(best)[0].figures["val_eps_mse"] if best.exists() else math.inf
