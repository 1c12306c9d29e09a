"""New folders with names of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ddpm.errors import UserError
from ddpm.io.folders import check_can_be_made, check_free, make_folder, new_folder, remove_empty


def dated_folder(base: str) -> list[Path]:
    """Make a new folder base/<date>/<time>. Return it and those above it that were made. Raises UserError."""
    return _numbered_folder(Path(base) / f"{datetime.now():%Y-%m-%d/%H-%M-%S}", first="")


def _numbered_folder(stem: Path, first: str) -> list[Path]:
    """Make the folder stem + first, stem-2, stem-3, …: the first that is not there yet. Raises UserError.

    Made atomically, so that two starts in one second do not share one.
    """
    for suffix in (first, *(f"-{i}" for i in range(2, 100_000))):
        folder = stem.with_name(stem.name + suffix)
        try:
            return make_folder(folder, exist_ok=False)
        except FileExistsError:
            if not folder.parent.is_dir():  # a file, or a link to a disk that is not mounted
                raise UserError(f"cannot make the folder {folder}: {folder.parent} is no folder") from None
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    raise UserError(f"no free folder name beside {stem}")


def of_run(checkpoint_file: Path) -> Path:
    """Return the folder of the run that a checkpoint is of; for a file elsewhere, the one it lies in."""
    home = checkpoint_file.parent
    return home.parent if home.name == "checkpoints" else home


def check_results(out: str | None, stem: Path) -> None:
    """Check before hours of work whether `results` can be written. Raises UserError."""
    if out is not None:
        check_free(Path(out))
    else:
        check_can_be_made(stem.with_name(f"{stem.name}-1"))


@contextmanager
def results(out: str | None, stem: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary folder for the files, and where they will lie: in `out`, or a new folder stem-1, stem-2, …

    `out` must be new or empty. If the block fails nothing is left. Raises UserError.
    """
    made = [] if out is not None else _numbered_folder(stem, first="-1")
    final = Path(out) if out is not None else made[0]
    try:
        with new_folder(final) as folder:
            yield folder, final
    except BaseException:
        remove_empty(made)
        raise
