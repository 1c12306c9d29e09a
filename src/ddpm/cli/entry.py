"""The commands as they are installed: first listen to signals, then import the rest."""

from ddpm.cli import signals


def train() -> None:
    """ddpm-train"""
    signals.install(save=True)
    from ddpm.cli.train import main

    main()


def sample() -> None:
    """ddpm-sample"""
    signals.install(save=False)
    from ddpm.cli.sample import main

    main()


def info() -> None:
    """ddpm-info"""
    signals.install(save=False)
    from ddpm.cli.info import main

    main()
