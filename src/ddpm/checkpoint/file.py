"""Write and read checkpoints: a run's tensors by name and, as JSON, its config, data facts and figures.

The format is safetensors, so that no file can run code; header.py describes and checks its header. Files are written
atomically. A SHA-256 over all tensors is verified on load.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ddpm.checkpoint.header import (
    DTYPES,
    MAX_HEADER,
    Entry,
    Meta,
    brought_up_to_date,
    parse_header,
    to_metadata,
)
from ddpm.config.schema import TrainConfig, check
from ddpm.errors import CheckpointError, UserError
from ddpm.io.files import open_regular, reason, write_atomically

if TYPE_CHECKING:  # reading a header needs no torch
    from torch import Tensor

CHUNK = 1 << 20  # bytes read at a time of tensors that are only hashed


def save(path: Path, tensors: Mapping[str, "Tensor"], meta: Meta) -> None:
    """Write the file atomically and verify it. Raises CheckpointError. `meta.sha256` is computed here."""
    from safetensors.torch import save as serialize

    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = serialize(host, metadata=to_metadata(Meta(**{**vars(meta), "sha256": digest(host)})))
    try:
        write_atomically(path, data)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {reason(error)}") from None
    verify(path)


def read_meta(path: Path) -> tuple[Meta, dict[str, Entry]]:
    """Read the metadata and each tensor's entry in the header, but no tensor. Raises CheckpointError."""
    with _opened(path) as file:
        meta, table, _ = _read_header(file)
    return meta, table


def config(path: Path, meta: Meta) -> TrainConfig:
    """Return the file's config, checked like a typed one. Raises CheckpointError."""
    if "${" in str(meta.config):
        raise CheckpointError(f"{path} cannot be used: its config holds '${{', which is no plain value")
    try:
        return check(TrainConfig, brought_up_to_date(meta.config))  # type: ignore[no-any-return]
    except UserError as error:
        raise CheckpointError(f"{path} cannot be used: {reason(error)}") from None


def verify(path: Path) -> None:
    """Read the whole file in chunks. Raises CheckpointError unless its hashes match."""
    _read(path, lambda name: False, lambda meta, table: None)


def load(
    path: Path, *prefixes: str, check: Callable[[Meta, dict[str, Entry]], object] = lambda meta, table: None
) -> tuple[Meta, dict[str, "Tensor"]]:
    """Read the metadata and the tensors named `<prefix>.…` (all if no prefix is given), on the CPU.

    The hash covers the whole file, whichever tensors are read. `check` is called with the header before they are read.
    The file is opened once, so that it may be deleted or replaced meanwhile. Raises CheckpointError.
    """
    starts = tuple(prefix + "." for prefix in prefixes) or ("",)
    return _read(path, lambda name: name.startswith(starts), check)


def part(tensors: Mapping[str, "Tensor"], prefix: str) -> dict[str, "Tensor"]:
    """Return the tensors named `prefix.…`, without the prefix."""
    start = prefix + "."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def digest(tensors: Mapping[str, "Tensor"]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all tensors."""
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file; turn errors within the block into a CheckpointError that names it."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}") from None
    except CheckpointError as error:
        named = str(error).startswith(f"{path} ")
        raise CheckpointError(str(error) if named else f"{path} {error}") from None


def _read_header(file: BinaryIO) -> tuple[Meta, dict[str, Entry], int]:
    """Return metadata, entries by name, and the offset of the tensors."""
    whole = os.fstat(file.fileno()).st_size
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= whole - 8:
        raise CheckpointError("is no checkpoint: it is not a safetensors file, or it is cut off")
    if size > MAX_HEADER:
        raise CheckpointError(f"cannot be used: its header has {size} bytes; allowed: {MAX_HEADER}")
    return *parse_header(file.read(size), whole - 8 - size), 8 + size


def _read(
    path: Path, wanted: Callable[[str], bool], check: Callable[[Meta, dict[str, Entry]], object]
) -> tuple[Meta, dict[str, "Tensor"]]:
    """Read the wanted tensors, and hash the bytes that they are made from with all others."""
    kept: dict[str, bytearray] = {}
    sha = hashlib.sha256()
    with _opened(path) as file:
        meta, table, begin = _read_header(file)
        check(meta, table)
        for name, entry in sorted(table.items()):
            sha.update(f"{name} {entry.title}\n".encode())
            file.seek(begin + entry.start)
            if wanted(name):
                kept[name] = bytearray(entry.stop - entry.start)
                file.readinto(kept[name])  # type: ignore[attr-defined]
                sha.update(kept[name])
            else:
                for at in range(entry.start, entry.stop, CHUNK):
                    sha.update(file.read(min(CHUNK, entry.stop - at)))
        if sha.hexdigest() != meta.sha256:
            raise CheckpointError("is broken: its contents do not match the SHA-256 stored in it")
    return meta, {name: _tensor(data, table[name]) for name, data in kept.items()}


def _tensor(data: bytearray, entry: Entry) -> "Tensor":
    import torch

    dtype = getattr(torch, DTYPES[entry.dtype][0].removeprefix("torch."))
    if not data:  # frombuffer refuses an empty buffer
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)
