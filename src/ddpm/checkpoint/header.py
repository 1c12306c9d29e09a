"""Parse and check a checkpoint's header, without torch.

A checkpoint is a safetensors file: 8 bytes of length, a JSON header (dtype, shape and offsets of each tensor by name,
and `__metadata__`), then the tensors' bytes. In the metadata, `ddpm` is a JSON text and `sha256` the hash of that
text; the text holds the hash of the tensors. So the two hashes cover the text and all tensors.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ddpm.config.schema import DEFAULTS_FOR_OLD_CHECKPOINTS
from ddpm.data import info
from ddpm.data.info import FACT_LIMITS
from ddpm.errors import CheckpointError, DataError, is_plain
from ddpm.io.plain_data import is_number, parse_json

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 had no hash of the text
MAX_HEADER = 4 * 2**20  # bytes; a network of 250 layers needs 200 thousand
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
MAX_ENTRIES = 64  # of figures, of versions
MAX_TEXT = 512  # characters of each
# safetensors' name: torch's name, bytes of an element
DTYPES = {
    "F64": ("torch.float64", 8),
    "F32": ("torch.float32", 4),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "I64": ("torch.int64", 8),
    "I32": ("torch.int32", 4),
    "U8": ("torch.uint8", 1),
}


@dataclass(frozen=True)
class Meta:
    """The metadata. `config` is plain data, to be checked by `file.config`."""

    config: dict[str, Any]
    facts: dict[str, Any]
    step: int
    figures: dict[str, float]
    versions: dict[str, str]
    sha256: str  # of all tensors: names, dtypes, shapes and bytes


@dataclass(frozen=True)
class Entry:
    """A tensor's entry in the header; its bytes are start … stop - 1 after the header."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def title(self) -> str:
        """Dtype and shape as the hash includes them."""
        return f"{DTYPES[self.dtype][0]} {self.shape}"


def to_metadata(meta: Meta) -> dict[str, str]:
    """Return the two texts of a file's `__metadata__`. Raises ValueError for figures that are not finite."""
    text = json.dumps({**vars(meta), "format_version": FORMAT_VERSION}, allow_nan=False)
    return {"ddpm": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def parse_header(header: bytes, data_size: int) -> tuple[Meta, dict[str, Entry]]:
    """Parse and check a file's header. Raises CheckpointError without the file's name, for `file` to add."""
    top = _parse(header)
    metadata = top.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("ddpm"), str):
        raise CheckpointError("is no checkpoint of ddpm: a safetensors file, but without ddpm's metadata")
    return _meta(metadata), _table(top, data_size)


def _parse(text: bytes | str) -> dict[str, Any]:
    """Parse a JSON object. Raises CheckpointError."""
    with suppress(DataError):
        if isinstance(parsed := parse_json(text), dict):
            return parsed
    raise CheckpointError("is no checkpoint of ddpm: its header cannot be read")


def _meta(metadata: dict[str, Any]) -> Meta:
    text = metadata["ddpm"]
    fields = _parse(text)
    version = fields.pop("format_version", None)
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"has format version {str(version)[:20]}; this ddpm reads versions {', '.join(map(str, READABLE_VERSIONS))}"
        )
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    if version > 1 and metadata.get("sha256") != digest:
        raise CheckpointError("is broken: its metadata does not match the SHA-256 stored in it")
    kinds = {"config": dict, "facts": dict, "step": int, "figures": dict, "versions": dict, "sha256": str}
    if fields.keys() != kinds.keys() or not all(type(fields[key]) is kind for key, kind in kinds.items()):
        raise CheckpointError("is no checkpoint of ddpm: its metadata is not complete")
    figures, versions = fields["figures"], fields["versions"]
    if not (
        0 <= fields["step"] <= 10**12
        and max(len(figures), len(versions)) <= MAX_ENTRIES
        and all(_is_text(text) for text in [*figures, *versions, *versions.values(), fields["sha256"]])
        and all(map(is_number, figures.values()))
    ):
        raise CheckpointError("is no checkpoint of ddpm: its step, figures or versions make no sense")
    _check_facts(fields["facts"])
    return Meta(**fields)


def _check_facts(facts: dict[str, Any]) -> None:
    if facts.keys() != {"name", "class_names", *FACT_LIMITS} or type(facts["class_names"]) is not list:
        raise CheckpointError("is no checkpoint of ddpm: the facts of its data are not complete")
    try:
        info.check_facts(info.facts(facts))
    except DataError as error:
        raise CheckpointError(f"cannot be used: {error}") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and is_plain(value)


def _table(entries: dict[str, Any], data_size: int) -> dict[str, Entry]:
    """Return every tensor's entry. The tensors must fill the data without gap or overlap."""
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"cannot be used: {len(entries)} tensors; allowed: {MAX_TENSORS}")
    table = {name: _entry(name, fields) for name, fields in entries.items()}
    end = 0
    for entry in sorted(table.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            raise CheckpointError("is broken: its tensors overlap, or leave a hole")
        end = entry.stop
    if end != data_size:
        raise CheckpointError(f"is broken: it should have {end} bytes of tensors and has {data_size}")
    return table


def _entry(name: str, fields: Any) -> Entry:
    def is_size(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**48

    wrong = CheckpointError(f"is broken: the header's entry for the tensor '{name[:80]}' makes no sense")
    if (
        not _is_text(name)
        or not isinstance(fields, dict)
        or fields.keys() != {"dtype", "shape", "data_offsets"}
    ):
        raise wrong
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong
    for sizes, limit in ((shape, MAX_DIMENSIONS), (offsets, 2)):
        if not isinstance(sizes, list) or len(sizes) > limit or not all(map(is_size, sizes)):
            raise wrong
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][1]:
        raise wrong
    return Entry(dtype, tuple(shape), *offsets)


def brought_up_to_date(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys that are newer than the checkpoint to its config."""
    config = dict(stored)
    for key, value in DEFAULTS_FOR_OLD_CHECKPOINTS.items():
        part, _, name = key.rpartition(".")
        if not part:
            config.setdefault(name, value)
        elif isinstance(config.get(part), Mapping):
            config[part] = {name: value, **config[part]}
    return config
