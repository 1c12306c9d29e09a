"""Run any command: plug-ins, help and TAB, which import neither Hydra nor the command; else the command.

A mistake is one line and exit status 2.
"""

import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from ddpm.cli.completion import completions
from ddpm.cli.help import show_help
from ddpm.config.load_plugins import load_plugins
from ddpm.errors import RankError, UserError, printable
from ddpm.io.files import reason
from ddpm.runtime.signals import FAILED_FILE
from ddpm.runtime.world import world_for_errors

MODULES = {"eval": "evaluate"}  # where it is not the program's name
MOST = 2000  # characters of a message; what was typed may be longer


def run(program: str) -> None:
    """Run ddpm-<program> as sys.argv says: the `main` of its module, with all arguments but plugins."""
    try:
        arguments = load_plugins(sys.argv[1:])
        if {"-h", "--help"} & set(arguments):
            show_help(program)
        elif arguments == ["-sc", "query=bash"]:  # TAB
            print(" ".join(completions(program, os.environ.get("COMP_LINE", ""))))
        else:
            import_module(f"ddpm.cli.{MODULES.get(program, program)}").main(arguments)
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
