"""Reading files of unknown origin: regular files alone, never more of them than allowed, errors as one line."""

import os
from pathlib import Path
from typing import BinaryIO

from ddpm.errors import DataError, printable
from ddpm.io.files import open_regular

MAX_REASON = 300  # characters


def read_bounded(path: Path, limit: int) -> bytes:
    """The whole file. Raises DataError if it is absent, no regular file, or has more than `limit` bytes."""
    try:
        with open_bounded(path, limit) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    if len(data) > limit:  # it grew meanwhile, or the system does not know its size, as in /proc
        raise DataError(f"{path}: has more than the {limit} bytes allowed")
    return data


def open_bounded(path: Path, limit: int) -> BinaryIO:
    """Like `read_bounded`, for those who read by themselves."""
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        file.close()
        raise DataError(f"{path}: has {size} bytes, more than the {limit} allowed")
    return file


def reason(error: Exception) -> str:
    """What an error says, in one short line that a terminal can show."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return printable(" ".join(text.split()))[:MAX_REASON]


def user_path(text: str) -> Path:
    """A path as typed, with ~ for a home folder. Raises DataError if there is no such home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{text}: {reason(error)}") from error
