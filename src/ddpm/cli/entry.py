"""The commands as they are installed: first handle signals, then import the rest."""

from functools import partial
from importlib import import_module

from ddpm.runtime import signals


def _run(program: str, module: str) -> None:
    with signals.handle_signals(program):
        import_module(f"ddpm.cli.{module}").main()


train = partial(_run, "train", "train")
sample = partial(_run, "sample", "sample")
evaluate = partial(_run, "eval", "evaluate")
export = partial(_run, "export", "export")
info = partial(_run, "info", "info")
report = partial(_run, "report", "report")
