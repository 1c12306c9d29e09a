"""The process in which Hydra launches the jobs of a sweep: deaf to signals, so that only `sweep.py` decides.

A terminal's Ctrl-C goes to every process of its group, and a launcher's workers that die of it would take their jobs
along. What is ignored here they ignore, too.
"""

import contextlib
import io
import os
import signal
import sys

from ddpm.config import hydra
from ddpm.config.load_plugins import load_plugins
from ddpm.errors import UserError, printable
from ddpm.runtime import signals
from ddpm.sweep.job import PLUGINS, JobFailed, run


def main() -> int:
    """The exit status: 0 if all jobs finished."""
    for number in signals.STOPPING:
        signal.signal(number, signal.SIG_IGN)
    plugins = os.environ.get(PLUGINS, "")
    said = io.StringIO()  # what Hydra adds to a failed job's own line; jobs have the real stderr
    try:
        load_plugins([f"plugins={plugins}"] if plugins else [])
        with contextlib.redirect_stderr(said):
            hydra.enter_hydra("train", sys.argv[1:], run)
    except JobFailed:  # its own line is printed already; Hydra passes on the first of them after all jobs
        return 1
    except UserError as error:
        return _say(str(error))
    except Exception as error:  # of a launcher or a sweeper, of which there are many
        print(said.getvalue(), end="", file=sys.stderr)
        return _say(f"{type(error).__name__}: {error}")
    return 0


def _say(text: str) -> int:
    print(f"ddpm-train: {printable(' '.join(text.split()))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
