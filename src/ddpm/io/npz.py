"""Read arrays of whole numbers from an .npz file of unknown origin, with limits on sizes and memory."""

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ddpm.errors import DataError
from ddpm.io.files import open_regular, reason

MAX_BYTES = 1 << 31  # of a file, and of an array in it
MAX_HEADER = 4_096  # bytes of an array's header
MAX_RATIO = 1_032  # to which deflate can compress
MAX_READ = 1 << 20  # bytes at a time; also of the archive's directory
# What zipfile and zlib raise for a damaged archive, a password (RuntimeError) or an unknown compression.
_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    OverflowError,
)


class Header(NamedTuple):
    """Element type and shape that an array in a file declares."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class _BoundedReads:
    """A file with a limit on each read: zipfile reads an archive's directory at once, whatever its length."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > MAX_READ:
            raise ValueError("it holds too many entries")
        return self.file.read(size if size >= 0 else MAX_READ)


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive. Raises DataError that names the file, also for errors within the block."""
    try:
        with open_regular(path, MAX_BYTES) as file, zipfile.ZipFile(_BoundedReads(file)) as archive:
            yield archive
    except _ERRORS as error:
        raise DataError(f"{path}: is no whole .npz file of plain numbers ({reason(error)})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from None


def read(archive: zipfile.ZipFile, name: str, check: Callable[[Header], object]) -> NDArray[Any]:
    """Read the array `name` once `check` accepts its header. Raises ValueError, for `opened` to catch."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"its array '{name}' is packed in another way than numpy's")
    with archive.open(info) as member:
        start = io.BytesIO(member.read(MAX_HEADER))
    header = _read_header(name, start)
    check(header)
    size = math.prod(header.shape) * header.dtype.itemsize
    if not size == info.file_size - start.tell() <= min(MAX_BYTES, MAX_RATIO * info.compress_size):
        raise ValueError(f"its array '{name}' has not as many bytes as its shape {header.shape} says")
    with archive.open(info) as member:
        return npy.read_array(member, allow_pickle=False, max_header_size=MAX_HEADER)


def _read_header(name: str, start: io.BytesIO) -> Header:
    try:
        with warnings.catch_warnings(action="error"):  # about headers that numpy has not written
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[
                npy.read_magic(start)
            ]
            shape, _, dtype = read(start, max_header_size=MAX_HEADER)
    except Exception:  # numpy parses it as Python, and raises what the parser raises
        raise ValueError(
            f"its array '{name}' is no array of numpy with a header of at most {MAX_HEADER} bytes"
        ) from None
    if dtype.kind not in "biu":
        raise ValueError(f"its array '{name}' must be whole numbers (uint8 for images)")
    return Header(dtype, shape)
