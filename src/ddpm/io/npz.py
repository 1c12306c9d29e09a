"""Arrays in an .npz file of unknown origin: numbers only, and no memory taken before it is known how much is needed."""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import DataError
from ddpm.io.files import open_bounded, reason

MAX_BYTES = 1 << 31  # of a file, and of an array in it
CHUNK = 1 << 20
# What numpy.save writes in front of an array of plain numbers; anything else in there is not read.
_HEADER = re.compile(
    r"\{'descr': '([<|](?:b1|[iu][1248]))', 'fortran_order': False, 'shape': \(((?:\d{1,12}, ?)*\d{0,12})\), \} *\n"
)


class Header(NamedTuple):
    """What an array in a file claims to be."""

    dtype: str
    shape: tuple[int, ...]


class _Careful:
    """A file from which nobody reads more than a chunk at a time: zipfile takes a directory of any length at once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= CHUNK:
            rest = self.file.read(CHUNK + 1)
            if len(rest) > CHUNK:
                raise ValueError("it holds too many entries")
            return rest
        return self.file.read(size)


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Raises DataError that names the file, also for what goes wrong within the block."""
    wrong = (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        RuntimeError,  # zipfile's: a password is asked for, or it does not know the compression
        EOFError,
        ValueError,
        OverflowError,
    )
    with open_bounded(path, MAX_BYTES) as file:
        try:
            with zipfile.ZipFile(_Careful(file)) as archive:
                yield archive
        except wrong as error:
            raise DataError(f"{path}: is no whole .npz file of plain numbers ({reason(error)})") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({reason(error)})") from None


def read(archive: zipfile.ZipFile, name: str, check: Callable[[Header], object]) -> NDArray[np.generic]:
    """The array `name`, once `check` has let its header pass. Raises ValueError, for `opened` to name the file."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"its array '{name}' is packed in another way than numpy's")
    with archive.open(info) as member:
        header, length = _header(name, member)
        check(header)
        expected = math.prod(header.shape) * np.dtype(header.dtype).itemsize
        if not expected == info.file_size - length <= MAX_BYTES:
            raise ValueError(f"its array '{name}' has not as many bytes as its shape {header.shape} says")
        data = bytearray()
        while len(data) < expected and (part := member.read(CHUNK)):
            data += part
    if len(data) != expected:
        raise ValueError(f"its array '{name}' is cut off")
    return np.frombuffer(data, header.dtype).reshape(header.shape)


def _header(name: str, member: IO[bytes]) -> tuple[Header, int]:
    """And its length in bytes. Numpy's own reader would evaluate it as Python."""
    magic = member.read(8)
    digits = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}.get(magic[6:8])
    if magic[:6] != b"\x93NUMPY" or digits is None:
        raise ValueError(f"its array '{name}' is no array of numpy")
    size = int.from_bytes(member.read(digits), "little")
    if size > 4096:
        raise ValueError(f"its array '{name}' has a header of {size} bytes; allowed: 4096")
    text = member.read(size).decode("latin-1")
    if (match := _HEADER.fullmatch(text)) is None:
        raise ValueError(f"its array '{name}' must be whole numbers (uint8 for images), in C order")
    shape = tuple(int(number) for number in match[2].replace(" ", "").split(",") if number)
    return Header(match[1], shape), 8 + digits + size
