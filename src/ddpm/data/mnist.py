"""Load MNIST, Fashion-MNIST and KMNIST: 60,000 + 10,000 grey images, 28×28, ten classes, in four IDX files.

Files lie where torchvision puts them, `<data_root>/MNIST/raw/…`. Absent files are downloaded once; all are verified by
hash. To add such a dataset, describe it as a `_Variant` and write its three-line function.
"""

import hashlib
import http.client
import math
import os
import struct
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ddpm.data.dataset import Dataset, Split, check_image_size, hold_out
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError
from ddpm.io.cache import cache_folder, cached_images
from ddpm.io.files import leftovers, read_bounded, read_regular, reason, write_atomically
from ddpm.io.folders import make_folder, remove_empty

SIZES = (28, 32, 64)
HELD_OUT = 5_000  # validation images, taken from the training images
SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
TIMEOUT = 30.0  # seconds without a byte
DEADLINE = 900.0  # seconds for one file from one mirror, which may send a byte every TIMEOUT
MAX_BYTES = 1 << 26  # of any file; the largest has 47 million
CHUNK = 4_096  # images resized at a time, which bounds the float copy


@dataclass(frozen=True)
class _Variant:
    folder: str  # also the name of torchvision's class, which lists the mirrors
    class_names: tuple[str, ...]
    md5: tuple[str, ...]  # of the .gz files, in the order of SHAPES; the same as torchvision's
    sha256: tuple[str, ...] | None = None  # of the decompressed files, where known


_MNIST = _Variant(
    "MNIST",
    tuple("0123456789"),
    ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
     "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
    ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
     "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
     "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
     "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)  # fmt: skip
_FASHION_MNIST = _Variant(
    "FashionMNIST",
    ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
     "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
)  # fmt: skip
_KMNIST = _Variant(
    "KMNIST",
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ("bdb82020997e1d708af4cf47b453dcf7", "e144d726b3acfaa3e44228e80efcd344",
     "5c965bf0a639b31b8f53240b1b52f4d7", "7320c461ea6c1c855c0b718fb2a4b134"),
)  # fmt: skip


def mnist(data_root: Path, *, image_size: int = 28) -> Dataset:
    """Load handwritten digits.

    LeCun et al. 1998, *Gradient-based learning applied to document recognition*. Images uint8 (N, 1, S, S), ink 255 on
    0: 55,000 to train on, 5,000 for validation, 10,000 for test. S = 28 is as published, 32 adds a border of 2, 64 is
    scaled up. Raises DataError for another size, a file that is not the published one, or a failed download.
    """
    return _load("mnist", _MNIST, data_root, image_size)


def fashion_mnist(data_root: Path, *, image_size: int = 28) -> Dataset:
    """Load photographs of clothes (Xiao et al. 2017, *Fashion-MNIST*); everything else as in `mnist`."""
    return _load("fashion_mnist", _FASHION_MNIST, data_root, image_size)


def kmnist(data_root: Path, *, image_size: int = 28) -> Dataset:
    """Load cursive hiragana (Clanuwat et al. 2018, *Deep Learning for Classical Japanese Literature*)."""
    return _load("kmnist", _KMNIST, data_root, image_size)


def _load(name: str, variant: _Variant, data_root: Path, image_size: int) -> Dataset:
    check_image_size(image_size, SIZES)
    raw = data_root / variant.folder / "raw"
    if not all(os.path.exists(raw / file) for file in SHAPES):
        _download(variant, raw)
    arrays = [torch.from_numpy(_read(variant, raw, index)) for index in range(len(SHAPES))]
    rest = Split(_resize(f"{name}-train", arrays[0][:, None], image_size), arrays[1].long())
    test = Split(_resize(f"{name}-test", arrays[2][:, None], image_size), arrays[3].long())
    train, val = hold_out(rest, HELD_OUT)
    facts = DatasetInfo(name, 1, image_size, len(variant.class_names), variant.class_names, levels=256)
    return Dataset(facts, train, val, test)


def _resize(name: str, images: Tensor, size: int) -> Tensor:
    if size == 28:
        return images
    if size == 32:
        return F.pad(images, (2, 2, 2, 2))

    def scaled() -> NDArray[np.uint8]:
        return torch.cat([_scale(part, size) for part in torch.split(images, CHUNK)]).numpy()

    key = f"{torch.__version__}-{hashlib.sha256(images.numpy().data).hexdigest()}"
    return torch.from_numpy(cached_images(f"{name}-{size}", key, len(images), size, scaled))


def _scale(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)


def _read(variant: _Variant, raw: Path, index: int) -> NDArray[np.uint8]:
    """Read and verify one file. Where its SHA-256 is not known, compare it with its .gz, whose MD5 is known.

    The .gz is downloaded where it is absent. The cache keeps the hash of a file that has passed, so that the .gz is
    needed only once.
    """
    file, shape = list(SHAPES.items())[index]
    path, packed = raw / file, raw / f"{file}.gz"
    data = read_bounded(path, MAX_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    if variant.sha256 is not None:
        if sha256 != variant.sha256[index]:
            raise DataError(f"{path}: its SHA-256 is not that of the published file; delete it")
    elif not _has_passed(f"{variant.folder}-{file}", sha256):
        if not os.path.exists(packed):
            _download(variant, raw)
        source = read_bounded(packed, MAX_BYTES)
        if _md5(source) != variant.md5[index] or _unpack(source, packed, shape) != data:
            raise DataError(f"{path}: it is not the published {packed.name}; delete both and start again")
        with suppress(OSError, DataError):  # if it cannot be kept, the .gz is read at each start
            note = cache_folder() / f"{variant.folder}-{file}.sha256"
            make_folder(note.parent, mode=0o755)
            write_atomically(note, sha256.encode())
    return parse_idx(data, str(path), shape)


def _has_passed(name: str, sha256: str) -> bool:
    with suppress(OSError, DataError):
        return read_regular(cache_folder() / f"{name}.sha256", 64) == sha256.encode()
    return False


def parse_idx(data: bytes, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read the unsigned bytes of an IDX file as a writable array of this shape.

    LeCun's format: magic number, sizes (big-endian), bytes. Raises DataError, beginning with `name`, for any other
    shape or length.
    """
    header, magic = 4 + 4 * len(shape), bytes([0, 0, 8, len(shape)])
    if len(data) < header:
        raise DataError(f"{name}: ends at byte {len(data)}, inside the header of {header} bytes")
    if data[:4] != magic:
        raise DataError(f"{name}: magic number {data[:4].hex()} at byte 0; must be {magic.hex()}")
    found = struct.unpack_from(f">{len(shape)}I", data, 4)
    if found != shape:
        said, wanted = ("×".join(map(str, sizes)) for sizes in (found, shape))
        raise DataError(f"{name}: sizes {said} at byte 4 are not {wanted}")
    if len(data) != header + math.prod(shape):
        raise DataError(f"{name}: has {len(data)} bytes, not {header + math.prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _download(variant: _Variant, raw: Path) -> None:
    """Download and decompress the absent files under a lock, so that one process does.

    Where the SHA-256 of the decompressed files is not known, the .gz files are downloaded, too, to compare them with.
    """
    names = list(SHAPES) if variant.sha256 else [f"{file}.gz" for file in SHAPES]
    made: list[Path] = []
    try:
        made = make_folder(raw)
        with FileLock(raw / "download.lock"):
            for left_by_a_killed_process in leftovers(raw):
                left_by_a_killed_process.unlink()
            for (file, shape), md5 in zip(SHAPES.items(), variant.md5, strict=True):
                packed = raw / f"{file}.gz"
                is_there = os.path.exists(raw / file)  # another process may have written it
                if is_there and (variant.sha256 or os.path.exists(packed)):
                    continue
                if not os.path.exists(packed) or _md5(read_bounded(packed, MAX_BYTES)) != md5:
                    write_atomically(packed, _from_mirrors(_mirrors(variant), packed.name, md5))
                if not is_there:
                    write_atomically(raw / file, _unpack(read_bounded(packed, MAX_BYTES), packed, shape))
    except (OSError, DataError) as error:
        if made:  # a mistyped data_root, say
            (raw / "download.lock").unlink(missing_ok=True)
            remove_empty(made)
        text = str(error) if isinstance(error, DataError) else reason(error)
        raise DataError(
            f"{raw} lacks files that cannot be downloaded ({text}); put {', '.join(names)}"
            f"{' (or the same as .gz)' if variant.sha256 else ', whose MD5 are known,'} there, or use dataset=digits, "
            "which needs no download"
        ) from error


def _mirrors(variant: _Variant) -> list[str]:
    import torchvision.datasets  # takes seconds; needed for downloads only

    return list(getattr(torchvision.datasets, variant.folder).mirrors)


def _from_mirrors(mirrors: Sequence[str], file: str, md5: str) -> bytes:
    """Download a file from the first mirror that has it. Raises DataError with what each mirror said."""
    reasons = []
    for address in (mirror + file for mirror in mirrors):
        try:
            data = _get(address)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a bad redirect
            reasons.append(f"{address}: {reason(error)}")
            continue
        if _md5(data) == md5:
            return data
        reasons.append(f"{address}: wrong MD5 of {len(data)} bytes")
    raise DataError("; ".join(reasons))


def _get(address: str) -> bytes:
    """Download at most MAX_BYTES within DEADLINE. Raises OSError, HTTPException or ValueError.

    torchvision's download has neither limit, and prints its progress.
    """
    data, end = bytearray(), time.monotonic() + DEADLINE
    with urlopen(Request(address, headers={"User-Agent": "ddpm"}), timeout=TIMEOUT) as answer:
        while len(data) < MAX_BYTES and (part := answer.read1(1 << 16)):
            data += part
            if time.monotonic() > end:
                raise OSError(f"not complete within {DEADLINE:.0f} seconds")
    return bytes(data)


def _unpack(packed: bytes, path: Path, shape: tuple[int, ...]) -> bytes:
    """Decompress at most one byte more than the file should have, so that a wrong file cannot fill the memory."""
    limit = 4 + 4 * len(shape) + math.prod(shape)
    try:
        return zlib.decompressobj(wbits=31).decompress(packed, limit + 1)
    except zlib.error as error:
        raise DataError(f"{path}: cannot be unpacked ({error})") from error


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
