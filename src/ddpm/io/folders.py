"""Make folders so that a mistake leaves none behind, and fill a folder in one step."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from ddpm.errors import UserError
from ddpm.io.files import reason

if sys.platform != "win32":
    import fcntl

UNFINISHED = ".ddpm-"  # what the name of a temporary folder begins with


def make_folder(folder: Path, exist_ok: bool = True, mode: int = 0o777) -> list[Path]:
    """Make a folder and those above it. Return those made here, innermost first. Raises OSError and makes none.

    `mode` is that of new folders, less what the umask takes away; 0o755 lets nobody else write to them.
    """
    made: list[Path] = []
    try:
        for path in reversed([each for each in folder.parents if not each.exists()]):
            path.mkdir(mode, exist_ok=True)  # another process may be as far
            made.insert(0, path)
        if not exist_ok or not folder.is_dir():
            folder.mkdir(mode)
            made.insert(0, folder)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def names_in(folder: Path) -> set[str]:
    """Return what lies in a folder, beside what a killed process left there half done. Raises OSError."""
    return {name for name in os.listdir(folder) if not name.startswith(UNFINISHED)}


def check_can_be_made(folder: Path) -> None:
    """Check that a folder can be made, or written to if it is there. Raises UserError."""
    place = _nearest(folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "no permission" if place.is_dir() else "it is no folder"
        raise UserError(f"cannot make {folder}: cannot write to {place}: {why}; out=… names another folder")


def check_free(out: Path) -> None:
    """Check that `out` is new or empty, and can be made and written to. Raises UserError."""
    if out.is_symlink() and not out.exists():
        raise UserError(f"out={out}: is a link to {os.readlink(out)}, which is not there")
    try:
        if out.exists() and (not out.is_dir() or names_in(out)):
            raise UserError(f"out={out}: exists already, and is no empty folder; choose another name")
    except OSError as error:
        raise UserError(f"cannot make out={out}: {reason(error)}") from None
    check_can_be_made(out)


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files move to `out`, new or empty, unless there is an error. Raises UserError."""
    check_free(out)
    made: list[Path] = []
    try:
        with TemporaryDirectory(prefix=UNFINISHED, dir=_nearest(out)) as folder:
            yield Path(folder)
            made = make_folder(out)
            with _locked(out):
                if names_in(out):  # of another process, which was faster
                    raise UserError(f"out={out}: is no longer empty; choose another name")
                for path in Path(folder).iterdir():
                    shutil.move(path, out)
    except OSError as error:
        remove_empty(made)
        raise UserError(f"cannot write to {out}: {reason(error)}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process fills the folder, where its file system has locks."""
    if sys.platform == "win32":  # cannot open a folder
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
