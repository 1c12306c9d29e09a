"""One job of a sweep, as Hydra's launchers call it: run `ddpm-train` as a subprocess and wait for it.

In a subprocess its memory, its GPU and its exit code are its own, and a launcher's worker outlives its death.
"""

import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ddpm.config.load_plugins import load_plugins
from ddpm.config.overrides import quote_path, typed_value
from ddpm.config.schema import NOT_PART_OF_THE_EXPERIMENT, TrainConfig, check
from ddpm.errors import printable
from ddpm.io.files import read_regular, reason
from ddpm.runs import run_dir
from ddpm.runs.resume import same_run
from ddpm.runs.run_dir import FAILED
from ddpm.runtime import signals
from ddpm.runtime.console import duration, tell
from ddpm.train.metrics_file import lowest

PLUGINS = "DDPM_PLUGINS"  # environment: what was typed as plugins=
TOKEN = "DDPM_SWEEP_TOKEN"  # environment: which start of the sweep a job belongs to, as in
OWNER = ".owner"  # a file in the sweep's folder
STOP = ".stop"  # a file in the sweep's folder: all jobs are to end
POLL = 0.2  # seconds
GRACE = 9  # seconds that a job has to save; a step may take a while
TRACEBACK = 1  # the exit code that Python leaves with one
MAX_ERROR = 10_000  # bytes of a traceback
MAX_NAME = 180  # characters of a folder's name; file systems take 255 bytes


class JobFailed(Exception):
    """One job of a sweep that did not finish. It leaves the others running."""


def run(raw: Any) -> float:
    """Run the job that Hydra has composed. Returns its `minimize`, at its lowest. Raises JobFailed."""
    load_plugins(plugins())  # a worker may be another process than the one that loaded them
    hydra = HydraConfig.get()
    sweep, overrides, number = Path(hydra.sweep.dir), list(hydra.overrides.task), hydra.job.num
    folder, far = sweep / name(overrides), is_far(launcher := hydra.runtime.choices["hydra/launcher"])
    plain: Any = OmegaConf.to_container(raw, resolve=True)
    config: TrainConfig = check(TrainConfig, {**plain, "run_dir": str(folder)})
    _wait_for_others(sweep, folder, number, far)
    if not config.overwrite and run_dir.read_result(folder) is not None and same_run(folder, config):
        tell(f"job {number}: done already: {folder}")
        return figure(folder, config.minimize)
    tell(f"job {number}: begins: {folder}")
    try:
        folder.mkdir(exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
    except OSError as error:  # a file, or a link to a disk that is not mounted
        tell(f"job {number}: failed: cannot write to {folder}: {reason(error)}")
        raise JobFailed(f"cannot write to {folder}") from None
    started = time.perf_counter()
    resume = [] if typed_value(overrides, "trainer.resume") or config.overwrite else ["trainer.resume=auto"]
    arguments = [*plugins(), *overrides, *resume, quote_path(f"run_dir={folder}")]
    status, stopped = _train(arguments, sweep, folder, quiet=launcher != "basic", far=far)
    if status != 0:
        why = _why(folder, status, stopped)
        tell(f"job {number}: {why}: {folder}")
        raise JobFailed(why)
    best = figure(folder, config.minimize)
    took = duration(time.perf_counter() - started)
    tell(f"job {number}: done in {took}, {config.minimize} {best:.5f}: {folder}")
    return best


def plugins() -> list[str]:
    """Return what was typed as plugins=…, an argument or none."""
    return [f"plugins={value}"] if (value := os.environ.get(PLUGINS)) else []


def of_experiment(overrides: list[str]) -> list[str]:
    """Return the overrides that say what a run is, not where or how it is made."""
    return [o for o in overrides if o.partition("=")[0].lstrip("+") not in NOT_PART_OF_THE_EXPERIMENT]


def name(overrides: list[str]) -> str:
    """Return a folder name for a job: what was typed for it, so that the same command finds it again."""
    text = ",".join(sorted(of_experiment(overrides))) or "defaults"
    plain = "".join(c if c.isalnum() or c in "=,.+-_[]~" else "_" for c in text)
    if plain == text and len(plain.encode()) <= MAX_NAME:
        return plain
    return (
        f"{plain.encode()[:MAX_NAME].decode(errors='ignore')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def figure(folder: Path, key: str) -> float:
    """Return the lowest of a run's figures `key`. Raises JobFailed if there is none."""
    best = lowest(folder / "metrics.jsonl", key)
    if best is None:
        tell(f"{folder}: metrics.jsonl holds no {key}")
        raise JobFailed(f"{folder} holds no {key}")
    return best


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is a sweep's, by its file with the token of the last start."""
    try:
        return re.fullmatch(rb"[0-9a-f]{16}", read_regular(folder / OWNER, 16)) is not None
    except OSError:
        return False


def is_far(launcher: str) -> bool:
    """Return whether a launcher runs jobs on other machines, which go on when the sweep's process has ended."""
    return "slurm" in launcher


def _wait_for_others(sweep: Path, folder: Path, number: int, far: bool) -> None:
    """Wait while a process works in the folder: of a sweep that has just been killed, or the same job drawn twice.

    Raises JobFailed where the sweep ends meanwhile.
    """
    for attempt in itertools.count():
        if (sweep / STOP).exists() or (not far and _orphaned(sweep)):
            raise JobFailed("stopped before it began")
        if not run_dir.is_running(folder):
            return
        if attempt == 0:
            tell(f"job {number}: waits for another process to end in {folder}")
        time.sleep(POLL)


def _train(arguments: list[str], sweep: Path, folder: Path, quiet: bool, far: bool) -> tuple[int, bool]:
    """Run ddpm-train and wait. Returns its exit status and whether the sweep asked it to stop."""
    command = [sys.executable, "-P", "-c", "from ddpm.cli.entry import train; train()", *arguments]
    environment = {signals.PARENT: str(os.getpid()), signals.FAILED_FILE: str(folder / FAILED)}
    signals.ignore_stop_signals()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else None,  # it is in train.log, too
            stderr=errors if quiet else None,
            start_new_session=True,
        )
        stopped = _wait(child, sweep, far)
        if child.returncode == TRACEBACK:  # an error of ours, or of a plug-in: print all of it
            errors.seek(0)
            said = errors.read()[-MAX_ERROR:].decode(errors="replace").strip()
            tell(said)
            with suppress(OSError):
                (folder / FAILED).write_text(said.rpartition("\n")[2] or "ended with a fault of its own")
    return child.returncode, stopped


def _wait(child: "subprocess.Popen[bytes]", sweep: Path, far: bool) -> bool:
    """Wait until it ends; ask it to stop when the sweep ends. Returns whether it was asked."""
    asked: float | None = None
    try:
        while child.poll() is None:
            stop, orphan = (sweep / STOP).exists(), not far and _orphaned(sweep)
            if asked is None and (stop or orphan):
                asked = _ask(child)
            elif asked is not None and ((stop and orphan) or time.monotonic() - asked > GRACE):
                child.kill()
            time.sleep(POLL)
    finally:  # submitit ends a job by an exception in here
        if child.poll() is None:
            _ask(child)
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            child.kill()
            child.wait()
    return asked is not None


def _orphaned(sweep: Path) -> bool:
    """Return whether the sweep's process is gone; another sweep may hold the folder by now."""
    with suppress(OSError):
        if (sweep / OWNER).read_text() != os.environ.get(TOKEN):
            return True
    return not run_dir.is_running(sweep)


def _ask(child: "subprocess.Popen[bytes]") -> float:
    """Ask it to save and end, by a signal that never counts as a second one. Returns the time."""
    child.send_signal(signals.FORWARDED)
    return time.monotonic()


def _why(folder: Path, status: int, stopped: bool) -> str:
    """Return why a job did not finish, in a few words; write it to failed.txt where it is not there yet."""
    if stopped or status - 128 in signals.STOPPING:
        return "stopped"
    why = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
    with suppress(OSError):
        if not (folder / FAILED).exists():
            (folder / FAILED).write_text(why)
        why = (folder / FAILED).read_text(errors="replace") or why
    return f"failed: {printable(why)}"
