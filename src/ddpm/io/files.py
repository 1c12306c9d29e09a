"""Files that are either whole or not there, and nothing but files."""

import os
import re
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

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


def reason(error: OSError) -> str:
    """What the system says of an error, in words."""
    return error.strerror or str(error) or type(error).__name__
