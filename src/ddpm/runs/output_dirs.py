"""New folders with names of their own."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ddpm.errors import UserError
from ddpm.io.files import reason


def dated_folder(base: str) -> Path:
    """Make a new folder base/<date>/<time>. Raises UserError."""
    return _new_folder(Path(base) / f"{datetime.now():%Y-%m-%d/%H-%M-%S}", first="")


def _new_folder(stem: Path, first: str) -> Path:
    """Make the folder stem + first, stem-2, stem-3, …: the first that is not there yet. Raises UserError.

    Made atomically, so that two starts in one second do not share one.
    """
    for suffix in (first, *(f"-{i}" for i in range(2, 100_000))):
        folder = stem.with_name(stem.name + suffix)
        try:
            folder.mkdir(parents=True, exist_ok=False)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
        return folder
    raise UserError(f"no free folder name beside {stem}")


def of_run(checkpoint_file: Path) -> Path:
    """Return the folder of the run that a checkpoint is of; for a file elsewhere, the one it lies in."""
    home = checkpoint_file.parent
    return home.parent if home.name == "checkpoints" else home


def check_results(out: str | None, stem: Path) -> None:
    """Check before hours of work whether `results` can be written. Raises UserError."""
    place = Path(out) if out is not None else stem.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "no permission" if place.is_dir() else "it is no folder"
        raise UserError(f"cannot write to {place}: {why}; out=… names another folder")


@contextmanager
def results(out: str | None, stem: Path) -> Iterator[Path]:
    """Yield the folder for the files: `out`, or a new one stem-1, stem-2, …

    Remove a folder made here if the block fails. Raises UserError.
    """
    if out is None:
        folder, new = _new_folder(stem, first="-1"), True
    else:
        folder, new = Path(out), not Path(out).exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make out={out}: {reason(error)}") from None
    try:
        yield folder
    except BaseException as error:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {folder}: {reason(error)}") from None
        raise
