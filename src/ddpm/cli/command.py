"""What every command does: compose, check, and only then run.

Hydra makes folders before a task starts and answers a mistake with several lines or a traceback, so every job,
of a sweep too, is composed and checked here first. A single run then never enters Hydra's launcher at all.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

from ddpm.cli import old_install
from ddpm.config import hydra
from ddpm.config.choices import known_keys
from ddpm.config.schema import SCHEMAS, check
from ddpm.config.unused import refuse_unused
from ddpm.errors import UserError, printable
from ddpm.runtime import signals
from ddpm.runtime.world import world_for_errors

HYDRA_FLAGS = {"--hydra-help", "--info", "-i", "--shell-completion", "-sc", "--cfg", "-c", "--version"}
MULTIRUN = {"-m", "--multirun"}


def run(
    program: str,
    arguments: list[str],
    task: Callable[[Any], object],
    sweep: Callable[[list[str]], object] | None = None,
    defaults: Callable[[list[str]], list[str]] = lambda overrides: [],
) -> None:
    """Compose configs/<program>.yaml with the arguments, check it, and run `task` on the result. Raises UserError.

    `defaults` gives overrides that come before the user's own; `sweep` takes those of a multirun.
    """
    if HYDRA_FLAGS & {argument.partition("=")[0] for argument in arguments}:
        hydra.answer_flags(program, arguments)
        return
    if MULTIRUN & set(arguments):
        _advise()
        if sweep is None:
            raise UserError(f"-m: ddpm-{program} has no multirun; leave it out")
        sweep(hydra.read_overrides([a for a in arguments if a not in MULTIRUN]))
        return
    overrides = hydra.read_overrides(arguments)
    if not signals.of_a_sweep():
        _refuse_settings_of_sweeps(program, overrides)
    config = check(SCHEMAS[program], hydra.compose(program, defaults(overrides) + overrides))
    if not signals.of_a_sweep():  # which checks its jobs together, before it starts them
        refuse_unused([(overrides, config)])
        _advise()
    task(config)


def _advise() -> None:
    """Print on stderr, once on each machine, what is wrong with the installation."""
    if world_for_errors().local_rank == 0 and (line := old_install.advice()):
        print(printable(line), file=sys.stderr)


def _refuse_settings_of_sweeps(program: str, overrides: list[str]) -> None:
    """Raise UserError for what only a sweep reads, such as Hydra's own settings: a single run does without it."""
    folder = "run_dir" if program == "train" else "out"
    named = f"; its folder is named by {folder}=…" if folder in known_keys(program) else ""
    for override in overrides:
        if re.match(r"[+~]*hydra\b", override):
            raise UserError(f"{override}: Hydra's own settings have no effect in a single run{named}")
        if program == "train" and re.match(r"[+]*minimize=", override):
            raise UserError(f"{override}: goes with -m and has no effect in a single run")
