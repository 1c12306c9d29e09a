"""The user's cache folder, files that are whole or absent, and tensor files that carry their own hash."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ddpm.errors import DataError

Arrays = dict[str, NDArray[Any]]


def cache_folder() -> Path:
    """`$DDPM_CACHE`, else `$XDG_CACHE_HOME/ddpm`, else `~/.cache/ddpm`. It need not exist yet."""
    if own := os.environ.get("DDPM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ddpm"


def write_atomically(path: Path, data: bytes) -> None:
    """After a crash at any moment `path` holds what it held before, or all of data. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: Arrays) -> None:
    """A safetensors file, written atomically, with the SHA-256 of its content in it. Raises OSError."""
    write_atomically(path, save(arrays, metadata={"sha256": _content_hash(arrays)}))


def load_arrays(path: Path) -> Arrays:
    """What `save_arrays` wrote. Raises DataError if the file is absent, broken or altered."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, TypeError, AttributeError) as error:  # the last two: types numpy lacks
        raise DataError(f"{path}: cannot be read as a safetensors file ({error})") from error
    if metadata.get("sha256") != _content_hash(arrays):
        raise DataError(
            f"{path}: its content does not match the SHA-256 it carries; delete it and make it anew"
        )
    return arrays


def _content_hash(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
