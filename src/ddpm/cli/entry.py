"""The commands as they are installed: first handle signals, then import the rest."""

from functools import partial

from ddpm.runtime import signals


def _run(program: str) -> None:
    with signals.handle_signals(program):
        from ddpm.cli import app

        app.run(program)


train = partial(_run, "train")
sample = partial(_run, "sample")
evaluate = partial(_run, "eval")
export = partial(_run, "export")
info = partial(_run, "info")
report = partial(_run, "report")
