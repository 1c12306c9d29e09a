"""What every command does: compose, check, and only then run. A mistake is one line and exit status 2.

Hydra makes folders before a task starts and answers a mistake with several lines or a traceback, so every job,
of a sweep too, is composed and checked here first. A single run then never enters Hydra's launcher at all.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm.cli import old_install
from ddpm.cli.completion import completions
from ddpm.cli.help import show_help
from ddpm.config.choices import known_keys
from ddpm.config.load_plugins import load_plugins
from ddpm.config.schema import check
from ddpm.config.unused import refuse_unused
from ddpm.errors import RankError, UserError, printable
from ddpm.io.files import reason
from ddpm.runtime.signals import FAILED_FILE
from ddpm.runtime.world import world_for_errors

HYDRA_FLAGS = {"--hydra-help", "--info", "-i", "--shell-completion", "-sc", "--cfg", "-c", "--version"}
MULTIRUN = {"-m", "--multirun"}
MOST = 2000  # characters of a message; what was typed may be longer


def run(
    program: str,
    schema: type,
    task: Callable[[Any], object],
    sweep: Callable[[list[str]], object] | None = None,
    defaults: Callable[[list[str]], list[str]] = lambda overrides: [],
) -> None:
    """Read sys.argv, compose configs/<program>.yaml, check it against `schema`, and run `task` on the result.

    `defaults` gives overrides that come before the user's own; `sweep` takes those of a multirun.
    """
    try:
        arguments = load_plugins(sys.argv[1:])
        if {"-h", "--help"} & set(arguments):
            show_help(program)
        elif arguments == ["-sc", "query=bash"]:  # TAB
            print(" ".join(completions(program, os.environ.get("COMP_LINE", ""))))
        else:
            from ddpm.config import hydra  # not for help and TAB

            if HYDRA_FLAGS & {argument.partition("=")[0] for argument in arguments}:
                hydra.answer_flags(program, arguments)
            elif MULTIRUN & set(arguments):
                _advise()
                if sweep is None:
                    raise UserError(f"-m: ddpm-{program} has no multirun; leave it out")
                sweep(hydra.read_overrides([a for a in arguments if a not in MULTIRUN]))
            else:
                overrides = hydra.read_overrides(arguments)
                if not (of_sweep := FAILED_FILE in os.environ):
                    _refuse_settings_of_sweeps(program, overrides)
                config = check(schema, hydra.compose(program, defaults(overrides) + overrides))
                if not of_sweep:  # a sweep checks its jobs together, before it starts them
                    refuse_unused([(overrides, config)])
                    _advise()
                task(config)
    except UserError as error:
        sys.exit(_failure(program, str(error), alone=isinstance(error, RankError)))
    except BrokenPipeError:  # `ddpm-train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a path too long, a folder of somebody else's
        sys.exit(_failure(program, f"{reason(error)}: {error.filename or 'a file'}"))
    except (RuntimeError, MemoryError) as error:
        from ddpm.runtime import distributed, memory

        if distributed.is_lost(error):
            _failure(program, "another process of this run has ended: see what it, or torchrun, says")
            sys.exit(1)
        if not memory.is_exhausted(error):
            raise
        sys.exit(_failure(program, f"out of memory: {str(error).partition(chr(10))[0]}", alone=True))


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


def _failure(program: str, message: str, alone: bool = False) -> int:
    """Print the error once per machine, or with `alone` for this rank only. Returns exit status 2.

    A job of a sweep leaves the line in a file, too.
    """
    own, line = world_for_errors(), printable(" ".join(message.split()))
    if len(line) > MOST:
        line = f"{line[: MOST // 2]} … {line[-MOST // 2 :]}"
    if alone or own.local_rank == 0:
        print(f"ddpm-{program}: {own.name * alone}{line}", file=sys.stderr)
    if (file := os.environ.get(FAILED_FILE)) and Path(file).parent.is_dir():
        with suppress(OSError):
            Path(file).write_text(line, encoding="utf-8")
    return 2
