"""Read files of the Hoda set: the official `.cdb` format, and the output of scripts/convert_persian.py.

Both give `Crops`, images of different sizes stored one after another. Every size in a file is checked before it is
used, and memory is allocated only for bytes that the file holds.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import DataError
from ddpm.io.cache import load_arrays, save_arrays
from ddpm.io.files import read_bounded

INK = 255  # on a background of 0
NUM_CLASSES = 10
MAX_BYTES = 1 << 24  # of an official file; the three have 2 to 7 million
MAX_RECORDS = 200_000  # the whole set has 102,352
MAX_PIXELS = 1 << 28  # of all images together; a run length of one byte stands for up to 255
MAX_SIDE = 255  # a side is stored in one byte

# year, month, day, height, width, records; records of each class; image type; comment; reserved
HEADER = struct.Struct("<HBBBBI 128I B 256s 245s")
BINARY = 0
RECORD_START = 0xFF


@dataclass(frozen=True, eq=False)
class Crops:
    """pixels: uint8 (P,), all images row by row; sizes: int32 (N, 2), (height, width); labels: uint8 (N,)."""

    pixels: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    labels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)

    def images(self) -> Iterator[NDArray[np.uint8]]:
        """Yield views of the images, (height, width) each."""
        start = 0
        for height, width in self.sizes.tolist():
            yield self.pixels[start : start + height * width].reshape(height, width)
            start += height * width


def digest(crops: Crops) -> str:
    """Return a SHA-256 over all images and labels, the same in any order of the images."""
    images = (
        hashlib.sha256(bytes([label, *image.shape]) + image.tobytes()).digest()
        for label, image in zip(crops.labels.tolist(), crops.images(), strict=True)
    )
    return hashlib.sha256(b"".join(sorted(images))).hexdigest()


def pack(images: Sequence[NDArray[np.uint8]], labels: Sequence[int]) -> Crops:
    """Pack images (height, width), ink on 0, sides 1 … 255, and their labels 0 … 9."""
    sizes = np.array([image.shape for image in images], np.int32)
    return Crops(np.concatenate([image.ravel() for image in images]), sizes, np.array(labels, np.uint8))


def save_crops(path: Path, crops: Crops) -> None:
    """Write the three arrays to a safetensors file. Raises OSError."""
    save_arrays(path, vars(crops))


def load_crops(path: Path) -> Crops:
    """Read what `save_crops` wrote. Raises DataError unless labels, sizes and pixels agree."""
    arrays = load_arrays(path, MAX_PIXELS + MAX_BYTES)
    wanted = {"labels": ("uint8", 1), "pixels": ("uint8", 1), "sizes": ("int32", 2)}
    if {name: (array.dtype.name, array.ndim) for name, array in arrays.items()} != wanted:
        raise DataError(f"{path}: not a file that scripts/convert_persian.py made")
    crops = Crops(**arrays)
    if not 0 < len(crops) <= MAX_RECORDS or crops.sizes.shape != (len(crops), 2):
        raise DataError(f"{path}: {len(crops)} labels do not fit sizes of shape {crops.sizes.shape}")
    if crops.labels.max() >= NUM_CLASSES or crops.sizes.min() < 1 or crops.sizes.max() > MAX_SIDE:
        raise DataError(f"{path}: a label is above 9 or a side is not within 1 and {MAX_SIDE}")
    if crops.sizes.astype(np.int64).prod(axis=1).sum() != len(crops.pixels):
        raise DataError(f"{path}: {len(crops.pixels)} pixels are not what the sizes add up to")
    return crops


class _Malformed(Exception):
    """A record is malformed: (byte offset, reason)."""


def read_cdb(path: Path) -> Crops:
    """Read an official file (Khosravi & Kabir 2007), binary images only.

    Raises DataError with the file, the record (from 0) and the byte offset of the first malformed value.
    """
    data = read_bounded(path, MAX_BYTES)
    if len(data) < HEADER.size:
        raise DataError(f"{path}: ends at byte {len(data)}, inside the header of {HEADER.size} bytes")
    _, _, _, height, width, total, *counts, kind, _, _ = HEADER.unpack_from(data)
    if kind != BINARY:
        raise DataError(f"{path}: image type {kind} at byte 522; only binary images (0) are known")
    if (height == 0) != (width == 0):
        raise DataError(f"{path}: height {height} and width {width} at byte 4; both or neither must be 0")
    if not 0 < total <= MAX_RECORDS:
        raise DataError(f"{path}: declares {total} records at byte 6; allowed: 1 to {MAX_RECORDS}")

    pixels, sizes, labels = bytearray(), [], []
    offset = HEADER.size
    for record in range(total):
        try:
            label, size, image, offset = _read_record(data, offset, (height, width))
            if len(pixels) + len(image) > MAX_PIXELS:
                raise _Malformed(offset, f"the images together exceed {MAX_PIXELS} pixels")
        except _Malformed as error:
            at, reason = error.args
            raise DataError(f"{path}: record {record} of {total}, byte {at}: {reason}") from None
        pixels += image
        sizes.append(size)
        labels.append(label)

    if offset != len(data):
        raise DataError(f"{path}: {len(data) - offset} bytes left at byte {offset}, after record {total - 1}")
    found = np.bincount(labels, minlength=len(counts)).tolist()
    if found != counts:
        wrong = next(i for i, (a, b) in enumerate(zip(found, counts, strict=True)) if a != b)
        raise DataError(
            f"{path}: {found[wrong]} records of class {wrong}, but the header at byte {10 + 4 * wrong} "
            f"declares {counts[wrong]}"
        )
    return Crops(np.frombuffer(pixels, np.uint8), np.array(sizes, np.int32), np.array(labels, np.uint8))


def _read_record(
    data: bytes, offset: int, size: tuple[int, int]
) -> tuple[int, tuple[int, int], bytearray, int]:
    """Return label, (height, width), pixels and the next record's offset. A size of (0, 0) is read from the record."""
    own_size = size == (0, 0)
    head = 6 if own_size else 4
    if len(data) - offset < head:
        raise _Malformed(len(data), "the file ends inside the record")
    if data[offset] != RECORD_START:
        raise _Malformed(offset, f"0x{data[offset]:02x} stands where a record must start with 0xff")
    label = data[offset + 1]
    if label >= NUM_CLASSES:
        raise _Malformed(offset + 1, f"label {label}; allowed: 0 to 9")
    if own_size:
        size = data[offset + 3], data[offset + 2]  # the width comes first
        if 0 in size:
            raise _Malformed(offset + 2, f"the image is {size[1]} wide and {size[0]} high")
    start = offset + head
    end = start + int.from_bytes(data[start - 2 : start], "little")
    if end > len(data):
        raise _Malformed(
            start - 2, f"{end - start} bytes of image declared, {len(data) - start} left in the file"
        )
    return label, size, _unpack_runs(data, start, end, size), end


def _unpack_runs(data: bytes, at: int, end: int, size: tuple[int, int]) -> bytearray:
    """Decode run lengths. Each row begins with background (a run of 0 if it has none); ink and background alternate."""
    height, width = size
    pixels = bytearray()
    for _ in range(height):
        filled, value = 0, 0
        while filled < width:
            if at == end:
                raise _Malformed(at, "the run lengths end before the image is full")
            run = data[at]
            filled += run
            if filled > width:
                raise _Malformed(at, f"a run of {run} overflows the row of {width}")
            pixels += bytes((value,)) * run
            value = INK - value
            at += 1
    if at != end:
        raise _Malformed(at, f"{end - at} bytes of run lengths left after the image is full")
    return pixels
