"""ddpm-train: compose and check a config, then train; what needs torch is imported only then."""

from ddpm.cli import command
from ddpm.config.schema import TrainConfig
from ddpm.runs import resume


def main(arguments: list[str]) -> None:
    command.run("train", arguments, train, sweep=_sweep, defaults=resume.before_typed)


def train(config: TrainConfig) -> float:
    """Train by one checked config. Returns the last val_eps_mse."""
    from ddpm.cli import train_run

    return train_run.train(config)


def _sweep(overrides: list[str]) -> None:
    """Run the jobs of `-m`. This process needs no torch, and gets none."""
    from ddpm.sweep.sweep import sweep

    sweep(overrides)
