"""The folder of a run: nobody else's, never overwritten by accident, and swept of what a killed process left."""

import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from ddpm.cli import hydra_app
from ddpm.errors import UserError
from ddpm.files import leftovers, reason

RUN_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "train.log",
    "result.json",
    "loss.png",
    "forward.png",
    "schedule.png",
)
RUN_FOLDERS = ("checkpoints", "samples")
LOCK = ".lock"


def lock(folder: Path) -> FileLock:
    """Held until it is released or the process ends, however it ends. Raises UserError where another holds it."""
    taken = FileLock(folder / LOCK)
    try:
        taken.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another process, which still trains in it") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"cannot lock {folder}: {error}") from None
    return taken


def lock_if_there(name: str | None) -> FileLock | None:
    """Before anything is read from a run's folder that another process may be writing to."""
    folder = Path(name) if name is not None else None
    return (
        lock(folder)
        if folder and any((folder / part).exists() for part in (*RUN_FILES, *RUN_FOLDERS))
        else None
    )


def make(name: str | None, overwrite: bool, resumed: bool, held: FileLock | None) -> tuple[Path, FileLock]:
    """The folder, ready to be written to, and its lock. Raises UserError where something is in the way."""
    if name is None:
        folder = hydra_app.run_folder("outputs/train")
        return folder, lock(folder)
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed:
            _check_free(folder, overwrite)
        held = held or lock(folder)
        if not resumed:
            _check_free(folder, overwrite)  # once more: another process may have been faster
            _clear(folder)
        for part in (folder, *(folder / name for name in RUN_FOLDERS)):
            for file in leftovers(part):
                file.unlink()
    except OSError as error:
        raise UserError(f"cannot use run_dir={folder}: {reason(error)}") from None
    return folder, held


def set_aside(folder: Path, step: int) -> list[str]:
    """Move step files that lie ahead of this step out of the way, broken or not; a line about each."""
    from ddpm.checkpoint import saved_steps, step_of

    notes, aside = [], folder / "checkpoints" / "set_aside"
    for file in saved_steps(folder):
        if step_of(file) > step:
            aside.mkdir(exist_ok=True)
            file.rename(aside / file.name)
            notes.append(f"{file} lies ahead of step {step}: moved to {aside}")
    return notes


def _check_free(folder: Path, overwrite: bool) -> None:
    there = {path.name for path in folder.iterdir()} - {LOCK} - {path.name for path in leftovers(folder)}
    if not there:
        return
    if not overwrite:
        raise UserError(
            f"{folder} is not empty: overwrite=true replaces the run in it, trainer.resume={folder} goes on with it"
        )
    if "config.yaml" not in there:
        raise UserError(f"{folder} holds other things than a run: overwrite=true does not delete those")


def _clear(folder: Path) -> None:
    """Only what a run makes; last the file that shows it to be one, in case this is cut short."""
    for part in RUN_FOLDERS:
        if (folder / part).exists():
            shutil.rmtree(folder / part)
    for file in reversed(RUN_FILES):
        (folder / file).unlink(missing_ok=True)
