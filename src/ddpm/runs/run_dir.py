"""The folder of a run: locked, never overwritten by accident, and cleared of what a killed process left."""

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.errors import DataError, UserError
from ddpm.io.files import leftovers, open_regular, read_regular, reason
from ddpm.io.plain_data import is_number, parse_json
from ddpm.runs import output_dirs

FAILED = "failed.txt"  # one line: why a job of a sweep came to nothing
FAILED_FILE = "DDPM_FAILED_FILE"  # environment: where a job of a sweep leaves its reason
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
LOCK = ".lock"
LOCK_WAIT = 0.5  # seconds: who only asks whether a run is running holds the lock for a moment
# in RUN_FOLDERS
_OURS = re.compile(r"((step_\d+|best)\.safetensors|sampler\.yaml|step_\d+\.png|events\.out\.tfevents\..+)")


@dataclass
class Claim:
    """A folder that is locked for this process."""

    path: Path
    lock: FileLock
    made: bool  # for this claim: removed if nothing is written

    def release(self) -> None:
        """Unlock the folder, and remove it where it was made here and holds nothing."""
        with suppress(OSError):  # it may be gone already
            if self.made and {path.name for path in self.path.iterdir()} <= {LOCK}:
                shutil.rmtree(self.path)
        self.lock.release()


def claim(name: str, overwrite: bool, fresh: bool) -> Claim:
    """Lock the folder of a run, before anything in it is read. Raises UserError.

    `fresh`: for a new run. The folder must be empty or, with `overwrite`, hold nothing but a run.
    """
    path = Path(name)
    try:
        made = not path.exists()
        if fresh and not made:
            _check_free(path, overwrite)  # before even a lock is put there
        held = Claim(path, lock(path), made)
    except OSError as error:
        raise UserError(f"cannot use run_dir={path}: {reason(error)}") from None
    try:
        if fresh:
            _check_free(path, overwrite)  # once more: another process may have been faster
    except BaseException:
        held.release()
        raise
    return held


def claim_new() -> Claim:
    """Make and lock a new folder under outputs/train."""
    folder = output_dirs.dated_folder("outputs/train")
    return Claim(folder, lock(folder), made=True)


def is_only_begun(folder: Path) -> bool:
    """Whether a folder holds only what a run leaves that was killed before its first checkpoint."""
    return not any(folder.glob("checkpoints/*.safetensors")) and not _foreign_files(folder)


def clear(folder: Path) -> None:
    """Delete what a run makes, and nothing else; last config.yaml, which shows it to be one. Raises OSError."""
    for part in RUN_FOLDERS:
        if not (folder / part).exists():
            continue
        for file in [*(folder / part).iterdir(), *(folder / part / "set_aside").glob("*.safetensors")]:
            if _OURS.fullmatch(file.name):
                file.unlink()
        for emptied in (folder / part / "set_aside", folder / part):
            with suppress(OSError):  # not empty: files of others stay, and so does the folder
                emptied.rmdir()
    for name in reversed(RUN_FILES):
        (folder / name).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete temporary files of processes that were killed. Raises OSError."""
    for part in (folder, *(folder / name for name in RUN_FOLDERS)):
        for file in leftovers(part):
            file.unlink()


def set_aside(folder: Path, step: int) -> list[str]:
    """Move checkpoints that lie ahead of this step to checkpoints/set_aside/. Returns a line about each."""
    ahead = [file for file in locate.saved_steps(folder) if locate.step_of(file) > step]
    best = folder / "checkpoints" / "best.safetensors"
    if best.exists():
        with suppress(UserError):
            ahead += [best] if checkpoint.read_meta(best)[0].step > step else []
    notes, aside = [], folder / "checkpoints" / "set_aside"
    for file in ahead:
        aside.mkdir(exist_ok=True)
        copies = len(list(aside.glob(f"{file.stem}*")))
        file.rename(aside / (f"{file.stem}-{copies + 1}{file.suffix}" if copies else file.name))
        notes.append(f"{file} lies ahead of step {step}: moved to {aside}")
    return notes


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of at most 64 KiB; {} where there is none."""
    with suppress(OSError, DataError):
        content = parse_json(read_regular(path, MAX_JSON))
        if isinstance(content, dict):
            return content
    return {}


def read_result(folder: Path) -> dict[str, float] | None:
    """Read result.json of a finished run: step, seconds, validation figures. None if it is absent or malformed."""
    result = read_json(folder / "result.json")
    whole = result.keys() >= {"step", "val_eps_mse", "val_eps_mse_error"} and all(
        map(is_number, result.values())
    )
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


def lock(folder: Path) -> FileLock:
    """Make a folder if need be, and lock it until `release` or the end of the process. Raises UserError."""
    taken = FileLock(folder / LOCK, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken.acquire(timeout=LOCK_WAIT, poll_interval=0.05)
    except Timeout:
        raise UserError(f"{folder} is in use by another process, which still trains in it") from None
    except OSError as error:
        raise UserError(f"cannot use run_dir={folder}: {reason(error)}") from None
    return taken


def _check_free(folder: Path, overwrite: bool) -> None:
    there = {path.name for path in folder.iterdir()} - {LOCK} - {path.name for path in leftovers(folder)}
    if not there:
        return
    if not overwrite:
        raise UserError(
            f"{folder} is not empty: overwrite=true replaces the run in it, trainer.resume={folder} goes on with it"
        )
    if "config.yaml" not in there and not is_only_begun(folder):
        raise UserError(f"{folder} holds other things than a run: overwrite=true does not delete those")


def _foreign_files(folder: Path) -> list[Path]:
    """Return what lies there and was not made by a run."""
    known = {LOCK, *RUN_FILES, *RUN_FOLDERS, *(path.name for path in leftovers(folder))}
    found = [path for path in folder.iterdir() if path.name not in known]
    for part in (folder / name for name in RUN_FOLDERS if (folder / name).exists()):
        inside = set(part.iterdir()) - set(leftovers(part)) - {part / "set_aside"}
        found += [path for path in inside if not _OURS.fullmatch(path.name)]
    return found
