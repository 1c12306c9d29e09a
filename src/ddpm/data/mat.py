"""Read MATLAB files (version 5, `save -v6` or `-v7`) that hold the Hoda set, and nothing else of the format.

scipy reads nested cells and objects, too, which can exhaust the stack or the memory before they can be checked.
Here every size is checked against the bytes of the file before it is used.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.data.hoda import MAX_PIXELS, MAX_RECORDS
from ddpm.errors import DataError
from ddpm.io.files import read_bounded

MAX_BYTES = MAX_PIXELS + 64 * MAX_RECORDS  # of the file, and of its decompressed variables together
MAX_VARIABLES = 100
HEADER = 128  # bytes; the last four hold version and byte order
ORDERS = {b"IM": "<", b"MI": ">"}

# The format's numbers for data types and for classes of arrays
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
INT8, UINT8, INT32, UINT32, MATRIX, COMPRESSED = 1, 2, 5, 6, 14, 15
CELL_CLASS, UINT8_CLASS, NUMBER_CLASSES = 1, 9, range(6, 16)
COMPLEX_OR_LOGICAL = 0x0A00


class _Malformed(Exception):
    """The file is malformed; the text says where."""


@dataclass(frozen=True)
class _Matrix:
    kind: int  # the class; 0 if complex or logical
    shape: tuple[int, int]
    name: bytes
    content: memoryview  # the elements that follow the name


def read_mat(path: Path) -> tuple[list[NDArray[np.uint8]], list[Any]]:
    """Read the images of the cell array `Data`, each uint8 (height, width), and the numbers of `labels`.

    Raises DataError for any other file.
    """
    data = read_bounded(path, MAX_BYTES)
    order = ORDERS.get(data[126:128])
    if order is None or len(data) < HEADER:
        raise DataError(f"{path}: cannot be read as a .mat file (not of version 5 to 7)")
    if data[124:126] != struct.pack(order + "H", 0x0100):
        raise DataError(f"{path}: cannot be read as a .mat file (of a newer version: save it with -v7)")
    reader, found = _Reader(order), dict[bytes, _Matrix]()
    try:
        for matrix in reader.variables(memoryview(data)[HEADER:]):
            found.setdefault(matrix.name, matrix)
            if b"Data" in found and b"labels" in found:
                return reader.images(found[b"Data"]), reader.numbers(found[b"labels"])
    except _Malformed as error:
        raise DataError(f"{path}: cannot be read as a .mat file ({error})") from None
    raise DataError(f"{path}: holds no cell array 'Data' beside 'labels'")


class _Reader:
    def __init__(self, order: str) -> None:
        self.order = order
        self.left = MAX_BYTES  # that may still be decompressed
        self.word = struct.Struct(order + "I")

    def variables(self, data: memoryview) -> Iterator[_Matrix]:
        for number, (kind, content) in enumerate(self._elements(data)):
            if number == MAX_VARIABLES:
                raise _Malformed(f"more than {MAX_VARIABLES} variables")
            if kind == COMPRESSED:
                kind, content, _ = self._element(self._unpack(content), 0)
            yield self._matrix(kind, content)

    def images(self, cells: _Matrix) -> list[NDArray[np.uint8]]:
        count = cells.shape[0] * cells.shape[1]
        if cells.kind != CELL_CLASS or 1 not in cells.shape or not 0 < count <= MAX_RECORDS:
            raise _Malformed(f"'Data' is no cell array of one column with 1 to {MAX_RECORDS} cells")
        images: list[NDArray[np.uint8]] = []
        for kind, content in self._elements(cells.content):
            cell = self._matrix(kind, content)
            if len(images) == count or cell.kind != UINT8_CLASS:
                raise _Malformed(f"cell {len(images)} of {count} in 'Data' is no uint8 image")
            images.append(self._array(cell, {UINT8: "u1"}))
        if len(images) != count:
            raise _Malformed(f"'Data' has {len(images)} cells, not {count}")
        return images

    def numbers(self, labels: _Matrix) -> list[Any]:
        if labels.kind not in NUMBER_CLASSES or 1 not in labels.shape:
            raise _Malformed("'labels' are no column of numbers")
        return self._array(labels, NUMBERS).ravel().tolist()

    def _matrix(self, kind: int, content: memoryview) -> _Matrix:
        if kind != MATRIX:
            raise _Malformed(f"an element of type {kind} where an array must be")
        flags_type, flags, at = self._element(content, 0)
        sizes_type, sizes, at = self._element(content, at)
        name_type, name, at = self._element(content, at)
        if (flags_type, len(flags), sizes_type, len(sizes), name_type) != (UINT32, 8, INT32, 8, INT8):
            raise _Malformed("an array does not begin with flags, height, width and name")
        (word,), (height, width) = self.word.unpack_from(flags), struct.unpack(self.order + "ii", sizes)
        if height < 0 or width < 0:
            raise _Malformed(f"an array of height {height} and width {width}")
        own_kind = 0 if word & COMPLEX_OR_LOGICAL else word & 0xFF
        return _Matrix(own_kind, (height, width), bytes(name), content[at:])

    def _array(self, matrix: _Matrix, types: dict[int, str]) -> NDArray[Any]:
        kind, content, _ = self._element(matrix.content, 0)
        height, width = matrix.shape
        dtype = np.dtype(self.order + types[kind]) if kind in types else None
        if dtype is None or len(content) != height * width * dtype.itemsize:
            raise _Malformed(f"{height}×{width} numbers in {len(content)} bytes of type {kind}")
        return np.frombuffer(content, dtype).reshape(matrix.shape, order="F")

    def _elements(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        at = 0
        while at < len(data):
            kind, content, at = self._element(data, at)
            yield kind, content

    def _element(self, data: memoryview, at: int) -> tuple[int, memoryview, int]:
        """Return the type and content of the element at `at`, and where the next one begins."""
        if len(data) - at < 8:
            raise _Malformed("an element is cut off")
        (kind,), (size,) = self.word.unpack_from(data, at), self.word.unpack_from(data, at + 4)
        if kind >> 16:  # up to four bytes stand in the head itself
            kind, size, start, room, end = kind & 0xFFFF, kind >> 16, at + 4, 4, at + 8
        else:
            start, room = at + 8, len(data) - at - 8
            end = start + size + (0 if kind == COMPRESSED else -size % 8)
        if size > room:
            raise _Malformed(f"an element of {size} bytes where there is room for {room}")
        return kind, data[start : start + size], end

    def _unpack(self, packed: memoryview) -> memoryview:
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(packed, self.left + 1)
        except zlib.error as error:
            raise _Malformed(str(error)) from None
        if len(data) > self.left:
            raise _Malformed(f"its variables unpack to more than {MAX_BYTES} bytes")
        if not stream.eof:
            raise _Malformed("a packed variable is cut off")
        self.left -= len(data)
        return memoryview(data)
