"""Locate the user's cache folder, and keep arrays there in safetensors files with a hash of their content."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ddpm.errors import DataError
from ddpm.io.files import open_regular, reason, user_path, write_atomically
from ddpm.io.folders import make_folder

Arrays = dict[str, NDArray[Any]]
MAX_HEADER = 1 << 16  # bytes; a few arrays take a few hundred
MAX_KEPT = 1 << 31  # bytes of images
DRAWING = 1  # version of decoding and scaling: increase it when their result changes, so that no older cache is used
WORTH = 1.0  # seconds; images made in less are not cached


def cache_folder() -> Path:
    """Return `$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`. It need not exist yet.

    Raises DataError if there is no home folder either.
    """
    if own := os.environ.get("DDPM_CACHE"):
        return user_path(own)
    try:
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ddpm"
    except DataError as error:
        raise DataError(f"{error}; set DDPM_CACHE to a folder for the cache") from error


def save_arrays(path: Path, arrays: Arrays, **notes: str) -> None:
    """Write a safetensors file atomically, with notes and the SHA-256 of its content. Raises OSError."""
    make_folder(path.parent, mode=0o755)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # `save` ignores strides
    write_atomically(path, save(arrays, metadata={**notes, "sha256": content_hash(arrays)}))


def load_arrays(path: Path, limit: int) -> Arrays:
    """Read what `save_arrays` wrote. Raises DataError for any other file, and above `limit` bytes."""
    try:
        with open_regular(path, limit) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise DataError(f"{path}: has a header of {header} bytes; allowed: {MAX_HEADER}")
        with safe_open(path, framework="np") as tensors:
            metadata = tensors.metadata() or {}
            arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, TypeError, AttributeError, ValueError) as error:
        # safetensors raises the last three for types and shapes that numpy lacks
        raise DataError(f"{path}: cannot be read as a safetensors file ({reason(error)})") from error
    if metadata.get("sha256") != content_hash(arrays):
        raise DataError(f"{path}: its content does not match the SHA-256 it carries; delete it")
    return arrays


def content_hash(arrays: Arrays) -> str:
    """Return the SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def cached_images(
    name: str, key: str, count: int, size: int, make: Callable[[], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """Return images uint8 (count, C, size, size) from the cache, else make them.

    They are cached if making them took longer than WORTH. `key` identifies the images' sources; the file holds it, too,
    as its name may be changed. Only the images of a name's last key are cached. Where no cache can be written, the
    images are made at each start.
    """
    source = as_array(f"{name} {key}")
    try:
        path = cache_folder() / f"{name}-v{DRAWING}-{key}.safetensors"
    except DataError:
        return make()
    with suppress(DataError):
        arrays = load_arrays(path, MAX_KEPT + MAX_HEADER)
        images: NDArray[np.uint8] = arrays.get("images", np.empty(0))
        fits = images.dtype == np.uint8 and images.shape[:1] + images.shape[2:] == (count, size, size)
        if fits and np.array_equal(arrays.get("source", ()), source):
            return images
    begun = time.monotonic()
    images = make()
    if time.monotonic() - begun >= WORTH and images.nbytes <= MAX_KEPT:
        with suppress(OSError, MemoryError):
            save_arrays(path, {"images": images, "source": source})
            for other in path.parent.glob(f"{name}-*.safetensors"):
                if other != path:
                    other.unlink()
    return images


def as_array(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def fingerprint(files: Iterable[Path]) -> str:
    """Hash paths, sizes, numbers and times of files. Raises DataError if one is gone.

    The time of the last change of status is not kept by programs that copy a file with its size and its time.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            about = os.stat(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({reason(error)})") from error
        numbers = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        digest.update(os.fsencode(f"{os.path.abspath(file)}\0{numbers}\0"))
    return digest.hexdigest()
