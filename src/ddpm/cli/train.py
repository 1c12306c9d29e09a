"""ddpm-train: compose and check a config, then train; the rest is imported only when it is needed."""

from ddpm.cli import app
from ddpm.config.schema import TrainConfig


def main() -> None:
    app.run("train", TrainConfig, train, sweep=_sweep, defaults=_before_typed)


def train(config: TrainConfig) -> float:
    """Train by one checked config. Returns the last val_eps_mse."""
    from ddpm.cli import train_run

    return train_run.train(config)


def _before_typed(overrides: list[str]) -> list[str]:
    """Return the settings of the run to resume. Not for help and TAB."""
    from ddpm.runs import resume_overrides

    return resume_overrides.before_typed(overrides)


def _sweep(overrides: list[str]) -> None:
    """Run the jobs of `-m`. This process needs no torch, and gets none."""
    from ddpm.sweep.sweep import sweep

    sweep(overrides)
