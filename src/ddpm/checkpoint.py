"""One file that holds everything a run is: tensors by name and, as JSON, the config, the data's facts and figures.

The format is safetensors, so that no file can run code. A SHA-256 over all tensors, stored in the metadata and
verified on load, catches what safetensors does not: flipped bits.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.errors import CheckpointError

if TYPE_CHECKING:  # reading a header needs no torch
    from torch import Tensor

FORMAT_VERSION = 1
MAX_HEADER = 16 * 2**20  # bytes of header that are read before anything is believed


@dataclass(frozen=True)
class Meta:
    """What the file says about itself."""

    config: dict[str, Any]
    facts: dict[str, Any]
    step: int
    figures: dict[str, float]
    versions: dict[str, str]
    sha256: str


def save(path: Path, tensors: Mapping[str, "Tensor"], meta: Meta) -> None:
    """Write the file so that it is either whole or not there. Raises CheckpointError with the reason.

    `meta.sha256` is ignored: the hash is computed here.
    """
    from safetensors.torch import save as serialize

    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fields = {**vars(meta), "sha256": _digest(host), "format_version": FORMAT_VERSION}
    data = serialize(host, metadata={"ddpm": json.dumps(fields, allow_nan=False)})
    write_atomically(path, data)


def write_atomically(path: Path, data: bytes) -> None:
    """A temporary file in the same folder, flushed to the disk and renamed. Raises CheckpointError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None


def read_meta(path: Path) -> tuple[Meta, dict[str, dict[str, Any]]]:
    """The metadata and, by name, dtype and shape of each tensor, without reading any tensor."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(MAX_HEADER, max(path.stat().st_size - 8, 0)):
                raise CheckpointError(
                    f"{path} is no checkpoint: it is not a safetensors file, or it is cut off"
                )
            header = json.loads(file.read(size))
            fields = json.loads(header.pop("__metadata__")["ddpm"])
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is no checkpoint of ddpm: its header cannot be read") from None
    version = fields.pop("format_version", None) if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this ddpm reads version {FORMAT_VERSION}"
        )
    kinds = {"config": dict, "facts": dict, "step": int, "figures": dict, "versions": dict, "sha256": str}
    if fields.keys() != kinds.keys() or not all(isinstance(fields[key], kind) for key, kind in kinds.items()):
        raise CheckpointError(f"{path} is no checkpoint of ddpm: its metadata is not complete")
    return Meta(**fields), header


def load(path: Path) -> tuple[Meta, dict[str, "Tensor"]]:
    """The metadata and all tensors, on the CPU, their hash verified. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    meta, _ = read_meta(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is broken: {error}") from None
    if _digest(tensors) != meta.sha256:
        raise CheckpointError(f"{path} is broken: its contents do not match the SHA-256 stored in it")
    return meta, tensors


def part(tensors: Mapping[str, "Tensor"], prefix: str) -> dict[str, "Tensor"]:
    """The tensors called `prefix.…`, without the prefix."""
    return {
        name.removeprefix(prefix + "."): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix + ".")
    }


def saved_steps(run: Path) -> list[Path]:
    """The step files of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*.safetensors"))


def find(spec: str, outputs: Path = Path("outputs")) -> Path:
    """The checkpoint that `spec` means: a file, a run folder (its last one), or "latest" (of the newest run)."""
    if spec == "latest":
        files = list(outputs.glob("**/checkpoints/step_*.safetensors"))
        if not files:
            raise CheckpointError(
                f"no checkpoint under {outputs}/ yet: run ddpm-train first, or give ckpt=<file or run folder>"
            )
        return max(files, key=lambda file: (file.stat().st_mtime_ns, file.name))
    path = Path(spec)
    if path.is_dir():
        files = saved_steps(path if path.name != "checkpoints" else path.parent)
        if not files:
            raise CheckpointError(f"{path} holds no checkpoint (checkpoints/step_….safetensors)")
        return files[-1]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist (ckpt is a checkpoint file, a run folder, or latest)")
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise CheckpointError(
            f"{path}: pickled checkpoints can run code and are not read; ddpm writes .safetensors"
        )
    return path


def _digest(tensors: Mapping[str, "Tensor"]) -> str:
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
