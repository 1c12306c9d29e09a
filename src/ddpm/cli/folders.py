"""New folders with names of their own."""

from datetime import datetime
from pathlib import Path

from ddpm.errors import UserError


def dated_folder(base: str) -> Path:
    """A new folder base/<date>/<time>."""
    now = datetime.now()
    return new_folder(Path(base) / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}", first="")


def numbered_folder(stem: Path) -> Path:
    """A new folder stem-1, stem-2, …"""
    return new_folder(stem, first="-1")


def new_folder(stem: Path, first: str) -> Path:
    """Made here, atomically, so that two starts in one second do not share one. Raises UserError."""
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
