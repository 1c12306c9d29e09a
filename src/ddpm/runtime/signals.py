"""Signals. The first SIGTERM, SIGINT or SIGHUP asks, a second one kills at once; SIGUSR1 asks a training to save.

Without `patient()` a request takes effect where the program stands, as Stopped; within it, it is only noted, for
the training loop to finish its step and save.
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
    """On the way out because of a signal. `said`: the user has been told already."""

    def __init__(self, number: int, said: bool = False) -> None:
        super().__init__(number)
        self.number, self.said = number, said


STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
FORWARDED = getattr(signal, "SIGHUP", signal.SIGTERM)  # from a sweep to its jobs: never the second signal
PARENT = "DDPM_PARENT_PID"  # environment: whom a job of a sweep does not outlive
GRACE = 10  # seconds to save, then
_stop: int | None = None
_save = False
_patient = False
_begun = False
_in_sweep = False


@contextmanager
def handle_signals(program: str, save: bool = False) -> Iterator[None]:
    """For the whole of a command: what a signal stops ends in one line and the status that shells expect.

    SIGUSR1 is listened to only where there is something to `save`.
    """
    global _patient, _in_sweep
    try:
        _keep_the_screen()
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup`, and `&` in a script, stay in force
                signal.signal(number, _on_stop)
        if save and hasattr(signal, "SIGUSR1"):
            signal.signal(signal.SIGUSR1, _on_save)
        if (parent := os.environ.pop(PARENT, "")).isdecimal():
            _in_sweep = True
            threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
        yield
    except Stopped as stopped:
        _leave(program, stopped.number, stopped.said)
    except Exception:
        if _stop is None:
            raise
        _leave(program, _stop, said=False)  # other people's code turned our Stopped into an error of its own
    finally:
        _patient = True  # on the way out there is nothing left to stop


def pass_over() -> None:
    """For whoever only watches jobs of a sweep: a signal to the whole group is not for it.

    A handler, and not "ignored", which its jobs would inherit.
    """
    for number in STOPPING:
        signal.signal(number, lambda *_: None)


def _end_with(parent: int) -> None:
    """Save and end when that process is gone: nobody waits for the result any more."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), FORWARDED)
    time.sleep(GRACE)
    os._exit(1)


def _keep_the_screen() -> None:
    """What a terminal cannot show is spelled out, and one that is not there is no reason to fail."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        if isinstance(terminal := getattr(sys, stream), io.TextIOWrapper):
            terminal.reconfigure(errors="backslashreplace")


def _leave(program: str, number: int, said: bool) -> None:
    if (
        not said and world_for_errors().speaks
    ):  # of several processes, which are all stopped, one on each machine
        before = " before the first step" if program == "train" and not _begun else ""
        print(f"ddpm-{program}: stopped by {name(number)}{before}", file=sys.stderr)
    sys.exit(128 + number)


def name(number: int) -> str:
    return signal.Signals(number).name


def stop_requested() -> int | None:
    """The number of the signal that asked to stop, if one came."""
    return _stop


def of_a_sweep() -> bool:
    """Whether this process is a job, which is begun and stopped by its sweep."""
    return _in_sweep


def save_requested() -> bool:
    """Whether SIGUSR1 came since this was last asked."""
    global _save
    asked, _save = _save, False
    return asked


@contextmanager
def defer_signals() -> Iterator[None]:
    """Requests are noted and nothing else. One that came before, but got lost in foreign code, is raised here."""
    global _patient, _begun
    _patient = True
    try:
        if _stop is not None:
            raise Stopped(_stop)
        _begun = True
        yield
    finally:
        _patient = False


def _on_stop(number: int, frame: FrameType | None) -> None:
    global _stop
    _stop = number
    for other in STOPPING:  # now the system itself acts, even where Python cannot
        if signal.getsignal(other) is _on_stop:
            hangup = other not in (signal.SIGTERM, signal.SIGINT)  # which some send beside the first
            signal.signal(other, signal.SIG_IGN if hangup else signal.SIG_DFL)
    if not _patient:
        raise Stopped(number)


def _on_save(number: int, frame: FrameType | None) -> None:
    global _save
    _save = True
