"""Signal handlers. The first SIGTERM, SIGINT or SIGHUP is a request to stop, a second one kills at once.

SIGUSR1 is a request to save. A request to stop raises Stopped where the program stands. Within `defer_signals` it is
only noted, so that the training loop can finish its step and save.
"""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ddpm.runtime.world import world_for_errors


class Stopped(BaseException):
    """Raised to end the program because of a signal. `said`: the user has been told already."""

    def __init__(self, number: int, said: bool = False) -> None:
        super().__init__(number)
        self.number, self.said = number, said


STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
FORWARDED = getattr(signal, "SIGHUP", signal.SIGTERM)  # from a sweep to its jobs: never the second signal
PARENT = "DDPM_PARENT_PID"  # environment: the process id with which a job of a sweep ends
FAILED_FILE = "DDPM_FAILED_FILE"  # environment: where a job of a sweep leaves its reason
GRACE = 10  # seconds to save, before the process is killed
_stop: int | None = None
_save = False
_deferring = False
_begun = False


@contextmanager
def handle_signals(program: str) -> Iterator[None]:
    """Install handlers for a command. One that a signal stops prints a line and exits with 128 + the signal's number.

    Only "train" handles SIGUSR1.
    """
    global _deferring
    try:
        _make_streams_safe()
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup`, and `&` in a script, stay in force
                signal.signal(number, _on_stop)
        if program == "train" and hasattr(signal, "SIGUSR1"):
            signal.signal(signal.SIGUSR1, _on_save)
        if (parent := os.environ.pop(PARENT, "")).isdecimal():
            threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
        yield
    except Stopped as stopped:
        _exit(program, stopped.number, stopped.said)
    except Exception:
        if _stop is None:
            raise
        _exit(program, _stop, said=False)  # other code turned Stopped into an error of its own
    finally:
        _deferring = True  # the program ends already


def ignore_stop_signals() -> None:
    """Ignore stop signals in a process that only watches jobs of a sweep, as its whole process group gets them.

    A handler does it, not SIG_IGN, which its jobs would inherit.
    """
    for number in STOPPING:
        signal.signal(number, lambda *_: None)


def _end_with(parent: int) -> None:
    """Save and exit when the parent process is gone (an orphan's result is of no use)."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), FORWARDED)
    time.sleep(GRACE)
    os._exit(1)


def _make_streams_safe() -> None:
    """Let stdout and stderr escape what a terminal cannot show, and write nowhere if they are closed."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        if isinstance(terminal := getattr(sys, stream), io.TextIOWrapper):
            terminal.reconfigure(errors="backslashreplace")


def _exit(program: str, number: int, said: bool) -> None:
    if not said and world_for_errors().local_rank == 0:  # all ranks are stopped: print once per machine
        before = " before the first step" if program == "train" and not _begun else ""
        print(f"ddpm-{program}: stopped by {name(number)}{before}", file=sys.stderr)
    sys.exit(128 + number)


def name(number: int) -> str:
    return signal.Signals(number).name


def stop_requested() -> int | None:
    """Return the number of the first stop signal, or None."""
    return _stop


def of_a_sweep() -> bool:
    """Return whether this process is a job of a sweep, which starts and stops it."""
    return FAILED_FILE in os.environ


def save_requested() -> bool:
    """Return whether SIGUSR1 came since the last call."""
    global _save
    asked, _save = _save, False
    return asked


@contextmanager
def defer_signals() -> Iterator[None]:
    """Only note requests to stop inside the block. Raise Stopped for one whose exception other code has swallowed."""
    global _deferring, _begun
    _deferring = True
    try:
        if _stop is not None:
            raise Stopped(_stop)
        _begun = True
        yield
    finally:
        _deferring = False


def _on_stop(number: int, frame: FrameType | None) -> None:
    global _stop
    _stop = number
    for other in STOPPING:  # now the system itself acts, even where Python cannot
        if signal.getsignal(other) is _on_stop:
            hangup = other not in (signal.SIGTERM, signal.SIGINT)  # which some send beside the first
            signal.signal(other, signal.SIG_IGN if hangup else signal.SIG_DFL)
    if not _deferring:
        raise Stopped(number)


def _on_save(number: int, frame: FrameType | None) -> None:
    global _save
    _save = True
