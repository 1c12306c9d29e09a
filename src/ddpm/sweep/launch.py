"""Run Hydra and its launcher for `sweep.py`, in a process that ignores signals, so that only `sweep.py` decides.

A terminal's Ctrl-C goes to every process of its group, and launcher's workers that die of it would take their jobs
along. They inherit that signals are ignored.
"""

import contextlib
import io
import signal
import sys

from ddpm.config import hydra
from ddpm.config.load_plugins import load_plugins
from ddpm.errors import UserError, printable
from ddpm.runtime import signals
from ddpm.sweep import job


def main() -> int:
    """Return the exit status: 0 if all jobs finished."""
    for number in signals.STOPPING:
        signal.signal(number, signal.SIG_IGN)
    said = io.StringIO()  # what Hydra adds to a failed job's own line; jobs have the real stderr
    try:
        load_plugins(job.plugins())
        with contextlib.redirect_stderr(said):
            hydra.enter_hydra("train", sys.argv[1:], job.run)
    except job.JobFailed:  # its own line is printed already; Hydra passes on the first of them after all jobs
        return 1
    except Exception as error:  # UserError, or of a launcher or a sweeper, of which there are many
        text = str(error)
        if not isinstance(error, UserError):
            print(said.getvalue(), end="", file=sys.stderr)
            text = f"{type(error).__name__}: {error}"
        print(f"ddpm-train: {printable(' '.join(text.split()))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
