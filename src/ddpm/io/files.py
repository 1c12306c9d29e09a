"""Write files atomically, and read regular files of bounded size."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ddpm.errors import DataError, printable

MAX_REASON = 300  # characters of an error's reason
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.[0-9a-f]{8}\.tmp")


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Replace a file in one step: after a crash it holds its old content or all of `data`. Raises OSError.

    Write a temporary file in the same folder, flush it (fsync) and rename it; then flush the folder's entry.
    `durable=False` skips the flushes, for files that can be made again: a crash of the machine, not of the process,
    may then leave an empty file. Permissions follow the umask. Pipes and devices, such as /dev/null, are not replaced.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
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
    """Return temporary files that killed processes left behind in `write_atomically`."""
    return [path for path in folder.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name) and path.is_file()]


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file of at most `limit` bytes for reading. Raises OSError.

    Pipes and devices are refused, as reading them may never end.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a null byte in the path
        raise OSError(errno.EINVAL, str(error)) from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    if limit is not None and about.st_size > limit:
        os.close(descriptor)
        raise OSError(errno.EFBIG, f"{path.name} has {about.st_size} bytes, more than the {limit} allowed")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """Read a whole regular file. Raises OSError, also for more than `limit` bytes."""
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown, or its size is reported as 0, as in /proc
        raise OSError(errno.EFBIG, f"{path.name} has more than the {limit} bytes allowed")
    return data


def read_bounded(path: Path, limit: int) -> bytes:
    """Like `read_regular`, but raise DataError that names the file."""
    try:
        return read_regular(path, limit)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error


def reason(error: Exception) -> str:
    """Return an error's text as one short line that is safe to print on a terminal."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return printable(" ".join(text.split()))[:MAX_REASON]


def try_to_draw(draw: Callable[..., object], *arguments: Any) -> list[str]:
    """Draw a picture, whose path is the last argument. Returns a warning where that fails: results are worth more."""
    try:
        draw(*arguments)
    except Exception as error:  # whatever a drawing library raises
        return [f"warning: {arguments[-1]} could not be drawn: {reason(error)}"]
    return []


def user_path(text: str) -> Path:
    """Expand ~ in a path that a user typed. Raises DataError if there is no such home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{text}: {reason(error)}") from error
