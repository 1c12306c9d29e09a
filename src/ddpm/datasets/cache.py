"""The user's cache folder, and tensor files that carry their own hash."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ddpm.datasets.reading import open_bounded, reason, user_path
from ddpm.errors import DataError
from ddpm.files import write_atomically

Arrays = dict[str, NDArray[Any]]
MAX_HEADER = 1 << 16  # bytes; a few arrays take a few hundred


def cache_folder() -> Path:
    """`$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`. It need not exist yet.

    Raises DataError if none of them is known.
    """
    if own := os.environ.get("DDPM_CACHE"):
        return user_path(own)
    try:
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ddpm"
    except DataError as error:
        raise DataError(f"{error}; set DDPM_CACHE to a folder for the cache") from error


def save_arrays(path: Path, arrays: Arrays, **notes: str) -> None:
    """A safetensors file, written atomically, with the SHA-256 of its content and notes in it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # `save` ignores strides
    write_atomically(path, save(arrays, metadata={**notes, "sha256": content_hash(arrays)}))


def load_arrays(path: Path, limit: int) -> Arrays:
    """What `save_arrays` wrote. Raises DataError if the file is absent, broken, altered or above `limit` bytes."""
    try:
        with open_bounded(path, limit) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise DataError(f"{path}: has a header of {header} bytes; allowed: {MAX_HEADER}")
        with safe_open(path, framework="np") as tensors:
            metadata = tensors.metadata() or {}
            arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, TypeError, AttributeError, ValueError) as error:
        # The last three: types and shapes that numpy lacks.
        raise DataError(f"{path}: cannot be read as a safetensors file ({reason(error)})") from error
    if metadata.get("sha256") != content_hash(arrays):
        raise DataError(
            f"{path}: its content does not match the SHA-256 it carries; delete it and make it anew"
        )
    return arrays


def content_hash(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
