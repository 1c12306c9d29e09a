"""Three pictures of a run: loss.png, forward.png and schedule.png."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.diffusion.process import add_noise
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.io.images import fitting, grid, normalise, save_png, to_uint8
from ddpm.runtime.randomness import normal
from ddpm.train import metrics_file


def plot_loss(metrics: Path, picture: Path) -> None:
    """Plot training and validation loss from a run's metrics.jsonl. Raises OSError, as all three do."""
    records = list(metrics_file.read(metrics))
    with _plot(picture) as (_, axes):
        axes.plot([r["step"] for r in records], [r["loss"] for r in records], label="training loss", lw=1)
        for key, label in (("val_loss", "validation loss (EMA)"), ("val_eps_mse", "val_eps_mse (EMA)")):
            points = [(r["step"], r[key], abs(r[key + "_error"])) for r in records if key in r]
            if points:
                steps, values, errors = zip(*points, strict=True)
                axes.errorbar(steps, values, errors, label=label, marker=".", lw=1)
        axes.set(xlabel="step", yscale="log")
        axes.legend()


def plot_schedule(schedule: NoiseSchedule, picture: Path) -> None:
    """Plot alpha, sigma and lambda over t."""
    with _plot(picture) as (figure, axes):
        axes.plot(schedule.alpha, label="alpha")
        axes.plot(schedule.sigma, label="sigma")
        axes.set(xlabel="t", ylabel="alpha, sigma")
        right = axes.twinx()
        right.plot(schedule.lambda_, "C2--", lw=1, label="lambda (right)")
        right.set(ylabel="lambda = log(alpha / sigma)")
        figure.legend(loc="center left", bbox_to_anchor=(0.12, 0.5))


def draw_forward(x_0: Tensor, schedule: NoiseSchedule, picture: Path, columns: int = 9) -> None:
    """Draw real images (uint8 (N, C, H, W)), one in a row, more and more noised from left to right."""
    fit = fitting(x_0.shape[-1])
    x_0, columns = x_0[:fit], min(columns, max(2, fit - 1))
    times = [round(i * (schedule.num_timesteps - 1) / (columns - 1)) for i in range(columns)]
    levels = [schedule.at(-1)] + [schedule.at(t) for t in times]
    clean = normalise(x_0.cpu())
    eps = normal(0, "forward", 0, torch.arange(len(x_0)), tuple(x_0.shape[1:]))
    noised = torch.stack([add_noise(clean, eps, level.alpha, level.sigma) for level in levels], dim=1)
    save_png(picture, grid(to_uint8(noised.flatten(0, 1)), nrow=len(levels)))


@contextmanager
def _plot(picture: Path) -> Iterator[tuple[Any, Any]]:
    """Make a figure with axes to draw in, and save it. Without pyplot, which would keep state and look for a screen."""
    # a third of a second that the first step need not wait for
    from ddpm.io import figures

    with figures.default_style():
        figure = figures.Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        yield figure, axes
        figures.save(figure, picture, dpi=120)
