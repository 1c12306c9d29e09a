"""The folder of a run: locked, never overwritten by accident, and cleared of what a killed process left."""

import itertools
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from filelock import FileLock, Timeout

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.errors import DataError, UserError
from ddpm.io.files import leftovers, open_regular, read_regular, reason
from ddpm.io.folders import make_folder, remove_empty
from ddpm.io.plain_data import is_number, parse_json
from ddpm.runs import output_dirs
from ddpm.runtime.console import Log
from ddpm.train import metrics_file

FAILED = "failed.txt"  # one line: why a job of a sweep came to nothing
MAX_JSON = 1 << 16  # bytes of result.json and environment.json
RUN_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "train.log",
    "result.json",
    FAILED,
    "loss.png",
    "forward.png",
    "schedule.png",
)
RUN_FOLDERS = ("checkpoints", "samples", "tensorboard")
ENDED = ("result.json", "loss.png", "schedule.png")  # of RUN_FILES: written at the end
ASIDE = "set_aside"  # a folder for what a run must not go on with, beside it
CONFIG_KEYS = {"seed", "dataset", "model", "schedule", "objective", "optimizer", "trainer"}
LOCK = ".lock"
LOCK_WAIT = 0.5  # seconds: who only asks whether a run is running holds the lock for a moment
# in RUN_FOLDERS
_OURS = re.compile(
    r"((step_[0-9]+|best)\.safetensors|sampler\.yaml|step_[0-9]+\.png|events\.out\.tfevents\..+)"
)


@dataclass
class Claim:
    """A folder that is locked for this process."""

    path: Path
    lock: FileLock
    made: list[Path]  # folders made for this claim, innermost first
    before: set[str]  # what lay in it

    def release(self) -> None:
        """Unlock the folder. Where nothing was written, remove the lock and the folders that were made here."""
        with suppress(OSError):  # it may be gone already
            if LOCK not in self.before and _names(self.path) == self.before:
                (self.path / LOCK).unlink()
                remove_empty(self.made)
        self.lock.release()


def claim(name: str, overwrite: bool, fresh: bool) -> Claim:
    """Lock the folder of a run, before anything in it is read. Raises UserError, and then leaves it as it was.

    `fresh`: for a new run. The folder must be empty or, with `overwrite`, hold a run. Whatever is to be replaced
    must be a run's by its content, and all of the folder writable.
    """
    path = Path(name)
    try:
        if path.exists():
            _check(path, overwrite, fresh)  # before even a lock is put there
        held = lock(path)
    except OSError as error:
        raise UserError(f"cannot use run_dir={path}: {reason(error)}") from None
    try:
        _check(path, overwrite, fresh)  # once more: another process may have been faster
        _check_writable(path)
    except BaseException:
        held.release()
        raise
    return held


def claim_new(base: str = "outputs/train") -> Claim:
    """Make and lock a new folder under `base`."""
    made = output_dirs.dated_folder(base)
    return replace(lock(made[0]), made=made)


def more_than_begun(folder: Path) -> str:
    """Say what a folder without a checkpoint holds that a run killed before its first checkpoint does not leave.

    Return "" where there is nothing of that kind.
    """
    for name in ENDED:
        if (folder / name).exists():
            return f"a run that has ended ({name})"
    if any(folder.glob("checkpoints/**/*.safetensors")):
        return "some that were set aside or are gone"
    try:
        if metrics_file.validated_after(folder / "metrics.jsonl", 0):
            return "a run that was validated (metrics.jsonl)"
    except OSError as error:
        return f"a metrics.jsonl that cannot be read ({reason(error)})"
    foreign = _foreign_files(folder)
    return f"other things than a run ({foreign[0].name})" if foreign else ""


def set_aside_begun(folder: Path) -> list[str]:
    """Move what a run left that was killed before its first checkpoint. Returns a line about it. Raises OSError."""
    files = [
        file
        for part in RUN_FOLDERS
        for file in sorted((folder / part).glob("*"))
        if _OURS.fullmatch(file.name)
    ]
    files += [folder / name for name in reversed(RUN_FILES)]  # last config.yaml, which shows it to be a run
    moved = [_move_aside(file) for file in files if file.exists()]
    return [f"begun before, without a checkpoint: its files are in {folder / ASIDE}"] * bool(moved)


def clear(folder: Path) -> list[str]:
    """Delete what a run makes, and nothing else; last config.yaml, which shows it to be one. Raises OSError.

    What other commands have made of it is moved to set_aside/. Returns a line about each.
    """
    made_of_it = [
        path for path in [folder / "evaluations", *(folder / "samples").glob("drawn-*")] if path.exists()
    ]
    notes = [
        f"{path} is of the run before: moved to {_move_aside(path, folder)}" for path in sorted(made_of_it)
    ]
    for part in RUN_FOLDERS:
        if not (folder / part).exists():
            continue
        for file in [*(folder / part).iterdir(), *(folder / part / ASIDE).glob("*.safetensors")]:
            if _OURS.fullmatch(file.name):
                file.unlink()
        for emptied in (folder / part / ASIDE, folder / part):
            with suppress(OSError):  # not empty: files of others stay, and so does the folder
                emptied.rmdir()
    for name in reversed(RUN_FILES):
        (folder / name).unlink(missing_ok=True)
    return notes


def sweep(folder: Path) -> None:
    """Delete temporary files of processes that were killed. Raises OSError."""
    for part in (folder, *(folder / name for name in RUN_FOLDERS)):
        for file in leftovers(part):
            file.unlink()


def set_aside(folder: Path, step: int) -> list[str]:
    """Move what lies ahead of this step to set_aside/ beside it. Returns a line about each file. Raises OSError."""
    ahead = [file for file in locate.saved_steps(folder) if locate.step_of(file) > step]
    best = folder / "checkpoints" / "best.safetensors"
    if os.path.lexists(best) and _step_of(best) > step:
        ahead.append(best)
    notes = [f"{file} lies ahead of step {step}: moved to {_move_aside(file).parent}" for file in ahead]
    for ended in ("result.json", FAILED):  # what they say is of a shorter run
        if (folder / ended).exists():
            _move_aside(folder / ended)
    metrics = folder / "metrics.jsonl"
    if metrics_file.validated_after(metrics, step) or not metrics_file.is_whole(metrics):  # it will be cut
        shutil.copyfile(metrics, _free_name(metrics, folder / ASIDE))
    return notes


def _step_of(best: Path) -> float:
    """Return the step of a checkpoint; inf where it cannot be read."""
    try:
        return checkpoint.read_meta(best)[0].step
    except UserError:
        return math.inf


def _move_aside(path: Path, home: Path | None = None) -> Path:
    """Move a file or folder to set_aside/ beside it, or in `home`. Returns where it is now. Raises OSError."""
    free = _free_name(path, (home or path.parent) / ASIDE)
    path.rename(free)
    return free


def _free_name(path: Path, aside: Path) -> Path:
    aside.mkdir(exist_ok=True)
    numbered = (f"{path.stem}-{i}{path.suffix}" for i in itertools.count(2))
    return next(aside / n for n in itertools.chain([path.name], numbered) if not os.path.lexists(aside / n))


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes; {} where there is none."""
    with suppress(OSError, DataError):
        content = parse_json(read_regular(path, limit))
        if isinstance(content, dict):
            return content
    return {}


def read_result(folder: Path) -> dict[str, float] | None:
    """Read result.json of a finished run: step, seconds, validation figures. None if it is absent or malformed."""
    result = read_json(folder / "result.json")
    whole = result.keys() >= {"step", "val_eps_mse", "val_eps_mse_error"} and all(
        map(is_number, result.values())
    )
    whole = whole and 0 <= result["step"] <= metrics_file.MAX_STEP and 0 <= result.get("seconds", 0) < 1e12
    return {key: float(value) for key, value in result.items()} if whole else None


def is_running(folder: Path) -> bool:
    """Whether a process trains in the folder. Nothing is written, and those who ask do not see one another."""
    import fcntl  # which Windows has not

    try:
        with open_regular(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go where the file is closed
    except BlockingIOError:
        return True
    except OSError:  # no lock was ever there, or it may not be looked at
        return False
    return False


def lock(folder: Path) -> Claim:
    """Make a folder if need be, and lock it until `release` or the end of the process. Raises UserError."""
    taken = FileLock(folder / LOCK, fallback_to_soft=False)  # a soft lock would outlive a killed process
    made: list[Path] = []
    try:
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"run_dir={folder}: is a link to {os.readlink(folder)}, which is not there")
        made = make_folder(folder)
        before = _names(folder, with_lock=True)
        taken.acquire(timeout=LOCK_WAIT, poll_interval=0.05)
    except Timeout:
        raise UserError(f"{folder} is in use by another process, which still trains in it") from None
    except OSError as error:
        remove_empty(made)
        raise UserError(f"cannot use run_dir={folder}: {reason(error)}") from None
    return Claim(folder, taken, made, before)


def _names(folder: Path, with_lock: bool = False) -> set[str]:
    """Return the names in a folder, without temporary files that killed processes left."""
    return (
        set(os.listdir(folder)) - {path.name for path in leftovers(folder)} - (set() if with_lock else {LOCK})
    )


def _check(folder: Path, overwrite: bool, fresh: bool) -> None:
    """Check that what a run will replace or add to is a run's. Raises UserError, OSError."""
    there = _names(folder)
    if fresh and not there:
        return
    if fresh and not overwrite:
        raise UserError(f"{folder} is not empty: overwrite=true replaces it, trainer.resume=auto goes on")
    strangers = _not_of_a_run(folder)
    metrics, is_run = folder / "metrics.jsonl", "config.yaml" in there or locate.saved_steps(folder)
    if not fresh and is_run and strangers == [metrics] and metrics.is_file() and not metrics.is_symlink():
        strangers = []  # `set_aside` keeps what it holds
    if strangers:
        name = strangers[0].name
        raise UserError(f"{folder} holds other things than a run: move {name} away, or name another run_dir")
    if fresh and "config.yaml" not in there:
        raise UserError(f"{folder} holds other things than a run: overwrite=true does not delete those")


def _check_writable(folder: Path) -> None:
    """Write and remove a file in each of a run's folders. Raises UserError."""
    for part in (folder, *(folder / name for name in RUN_FOLDERS)):
        if not os.path.lexists(part):
            continue
        if part.is_symlink() and not part.exists():
            target = f"{os.readlink(part)}, which is not there"
            raise UserError(f"{part} is a link to {target}; is its disk mounted?")
        try:
            with TemporaryFile(dir=part) as file:
                file.write(bytes(1))
        except OSError as error:
            raise UserError(f"cannot use run_dir={folder}: cannot write to {part}: {reason(error)}") from None
    if os.path.lexists(log := folder / "train.log"):
        try:
            Log(log)
        except OSError as error:
            raise UserError(f"cannot use run_dir={folder}: cannot write to {log}: {reason(error)}") from None


def _is_config(path: Path) -> bool:
    """Return whether a file is a run's config.yaml, by its keys."""
    try:
        text = read_regular(path, MAX_JSON).decode()
    except (OSError, ValueError):
        return False
    keys = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    return keys >= CONFIG_KEYS and re.search(r"^  max_steps: ", text, re.MULTILINE) is not None


def _is_metrics(path: Path) -> bool:
    """Return whether a file begins with a line of figures, or half of one."""
    try:
        if next(metrics_file.read(path), None):
            return True
        with open_regular(path) as file:
            return b'{"step": '.startswith(file.read(9))
    except (OSError, ValueError):
        return False


# by what they hold; the rest of RUN_FILES is taken for a run's where there is its config.yaml
_CONTENT: dict[str, Callable[[Path], bool]] = {
    "environment.json": lambda path: "torch" in read_json(path),
    "metrics.jsonl": _is_metrics,
    "result.json": lambda path: read_result(path.parent) is not None,
}


def _not_of_a_run(folder: Path) -> list[Path]:
    """Return what has the name of a run's file, and is not one."""
    there = [folder / name for name in RUN_FILES if os.path.lexists(folder / name)]
    if not _is_config(folder / "config.yaml"):
        return there
    return [path for path in there if not _CONTENT.get(path.name, Path.is_file)(path)]


def _foreign_files(folder: Path) -> list[Path]:
    """Return what lies there and was not made by a run."""
    known = {ASIDE, *RUN_FILES, *RUN_FOLDERS}
    found = [folder / name for name in sorted(_names(folder) - known)] + _not_of_a_run(folder)
    for part in (folder / name for name in RUN_FOLDERS if (folder / name).exists()):
        inside = set(part.iterdir()) - set(leftovers(part)) - {part / ASIDE}
        found += [path for path in inside if not _OURS.fullmatch(path.name)]
    return found
