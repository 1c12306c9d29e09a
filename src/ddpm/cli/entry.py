"""The commands as they are installed: first listen to signals, then import the rest."""

from ddpm.runtime import signals


def train() -> None:
    """ddpm-train"""
    with signals.handle_signals("train", save=True):
        from ddpm.cli.train import main

        main()


def sample() -> None:
    """ddpm-sample"""
    with signals.handle_signals("sample"):
        from ddpm.cli.sample import main

        main()


def export() -> None:
    """ddpm-export"""
    with signals.handle_signals("export"):
        from ddpm.cli.export import main

        main()


def evaluate() -> None:
    """ddpm-eval"""
    with signals.handle_signals("eval"):
        from ddpm.cli.evaluate import main

        main()


def info() -> None:
    """ddpm-info"""
    with signals.handle_signals("info"):
        from ddpm.cli.info import main

        main()


def report() -> None:
    """ddpm-report"""
    with signals.handle_signals("report"):
        from ddpm.cli.report import main

        main()
