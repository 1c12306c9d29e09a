"""Files that are either whole or not there, and nothing but files."""

import os
import re
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

from ddpm.errors import DataError, printable

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """After a crash at any moment `path` holds what it held before, or all of data. Raises OSError.

    A temporary file in the same folder, flushed to the disk and renamed; then the folder's own entry is flushed.
    Not durable: without flushing, for what can be made again and comes in thousands; only a crash of the machine,
    not of the process, can then leave an empty file. Permissions follow the umask.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of `write_atomically` in a folder, which a killed process could not take away."""
    return [path for path in folder.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name) and path.is_file()]


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, also for what is no regular file: a pipe or device may never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


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
