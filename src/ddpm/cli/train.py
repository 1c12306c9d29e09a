"""ddpm-train: compose and check a config, then train; the rest is imported only when it is needed."""

from ddpm.cli import app
from ddpm.config.schema import TrainConfig
from ddpm.runs import resume_overrides


def main() -> None:
    app.run("train", TrainConfig, train, sweep=_sweep, defaults=resume_overrides.before_typed)


def train(config: TrainConfig) -> float:
    """Train by one checked config. Returns the last val_eps_mse."""
    from ddpm.cli import train_run

    return train_run.train(config)


def _sweep(overrides: list[str]) -> None:
    """Run the jobs of `-m`. This process needs no torch, and gets none."""
    from ddpm.sweep.sweep import sweep

    sweep(overrides)
