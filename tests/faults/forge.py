"""Checkpoints made with intent. All hashes in them fit, as an attacker would see to it.

Each function returns a maker, which writes such a file at `place.file`.
"""

import functools
import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddpm.checkpoint import file as checkpoint
from tests.faults.damage import STEP, base, step_file

Maker = Callable[["Place"], None]


@dataclass(frozen=True)
class Place:
    """A user's folder with a run in it, and beside it things that are none of its business."""

    root: Path

    @property
    def here(self) -> Path:
        return self.root / "here"

    @property
    def canary(self) -> Path:
        return self.root / "canary"

    @property
    def file(self) -> Path:
        return step_file(self.here / "run", STEP)


def lay_out(root: Path) -> Place:
    place = Place(root)
    place.file.parent.mkdir(parents=True)
    (place.canary / "hoda").mkdir(parents=True)
    for name in ("config.yaml", "image_1.png", "image_2.png", "image_3.png", "hoda/Train 60000.cdb"):
        (place.canary / name).write_text("canary")
    (root / "other.txt").write_text("none of your business\n")
    plugin = f"import os\nrun = os.mkdir({str(place.canary / 'imported')!r})\n"
    (place.here / "hostile_plugin.py").write_text(plugin)
    return place


def tree(root: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of writing of every file; of folders the kind alone."""
    found = {}
    for path in root.rglob("*"):
        now = path.lstat()
        size = (0, 0) if path.is_dir() else (now.st_size, now.st_mtime_ns)
        found[str(path.relative_to(root))] = (now.st_mode, *size)
    return found


def forget_reads(folder: Path) -> None:
    """Times of reading older than those of writing are the ones that Linux renews with every mount option but one."""
    for file in folder.rglob("*.*"):
        os.utime(file, ns=(0, file.stat().st_mtime_ns))


def check_reads(folder: Path) -> None:
    opened = [file.name for file in folder.rglob("*.*") if file.stat().st_atime_ns]
    assert not opened, f"has read {opened} outside"


@functools.cache
def _base() -> tuple[str, str, bytes]:
    """The text, the rest of the header, and the tensors' bytes of a good checkpoint."""
    size = struct.unpack("<Q", base()[:8])[0]
    header = json.loads(base()[8 : 8 + size])
    text = header.pop("__metadata__")["ddpm"]
    return text, json.dumps(header), base()[8 + size :]


def _write(place: Place, text: str, header: str, body: bytes) -> None:
    """With a hash of the text that fits. `header` is JSON: an object of tensors."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    metadata = json.dumps({"ddpm": text, "sha256": digest})
    encoded = f'{{"__metadata__": {metadata}, {header[1:]}'.encode()
    place.file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


def fields(**edits: Any) -> Maker:
    """Values by path, as config__model__hidden=8; {canary} in them is the folder's path."""

    def make(place: Place) -> None:
        text, header, body = _base()
        whole = json.loads(text)
        for path, value in edits.items():
            node, *keys = whole, *path.split("__")
            for key in keys[:-1]:
                node = node[key]
            node[keys[-1]] = value
        _write(place, json.dumps(whole).replace("{canary}", str(place.canary)), header, body)

    return make


def key(part: str, name: str, value: Any) -> Maker:
    """One more or another key in a part of the config, as `key("model", "_target_", …)`; "" is the config itself."""

    def make(place: Place) -> None:
        text, header, body = _base()
        whole = json.loads(text)
        (whole["config"][part] if part else whole["config"])[name] = value
        _write(place, json.dumps(whole).replace("{canary}", str(place.canary)), header, body)

    return make


def spelled(old: str, new: str) -> Maker:
    """The text with a part of its spelling replaced, for what json.dumps does not write."""

    def make(place: Place) -> None:
        text, header, body = _base()
        assert old in text, f"{old} is not in {text}"
        _write(place, text.replace(old, new, 1), header, body)

    return make


def table(edit: Callable[[dict[str, Any]], object], body: bytes = b"") -> Maker:
    """Other entries in the header; `body` is put behind the tensors."""

    def make(place: Place) -> None:
        text, header, old = _base()
        entries = json.loads(header)
        edit(entries)
        _write(place, text, json.dumps(entries), old + body)

    return make


def entry(**changes: Any) -> Maker:
    """Another dtype, shape or place for the first tensor."""
    return table(lambda entries: entries[min(entries)].update(changes))


def twice() -> Maker:
    """The first tensor's entry a second time under the same name, which a JSON parser would pass over."""

    def make(place: Place) -> None:
        text, header, body = _base()
        name, first = next(iter(json.loads(header).items()))
        _write(place, text, f"{{{json.dumps(name)}: {json.dumps(first)}, {header[1:]}", body)

    return make


def replaced(*where: str, by: Callable[[Tensor], Tensor]) -> Maker:
    """Other tensors in place of those whose names begin or end so, with a hash that fits."""

    def edit(tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if name.startswith(where) or name.endswith(where)]
        assert names, f"no tensor is called {where}"
        tensors.update({name: by(tensors[name]) for name in names})

    return _tensors(edit)


def without(prefix: str) -> Maker:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return _tensors(edit)


def added(name: str, size: int) -> Maker:
    return _tensors(lambda tensors: tensors.update({name: torch.zeros(size, dtype=torch.uint8)}))


def _tensors(edit: Callable[[dict[str, Tensor]], None]) -> Maker:
    def make(place: Place) -> None:
        place.file.write_bytes(base())
        _, tensors = checkpoint.load(place.file)
        edit(tensors)
        whole = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        size = struct.unpack("<Q", whole[:8])[0]
        text = json.dumps({**json.loads(_base()[0]), "sha256": checkpoint.digest(tensors)})
        _write(place, text, whole[8 : 8 + size].decode(), whole[8 + size :])

    return make


def raw(header: Callable[[], bytes], length: int | None = None, file_size: int = 0) -> Maker:
    """Any bytes as header; a file of `file_size` bytes takes no room on the disk."""

    def make(place: Place) -> None:
        encoded = header()
        place.file.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded)
        if file_size:
            os.truncate(place.file, file_size)

    return make


def sparse(name: str, size: int) -> Maker:
    """One more tensor of so many zeros, which take no room on the disk. Its hash is not worked out."""

    def make(place: Place) -> None:
        text, header, body = _base()
        more = {"dtype": "U8", "shape": [size], "data_offsets": [len(body), len(body) + size]}
        _write(place, text, json.dumps({**json.loads(header), name: more}), body)
        os.truncate(place.file, place.file.stat().st_size + size)

    return make


def beside(name: str, make: Callable[[Path], object]) -> Maker:
    """A good checkpoint, in a run folder with another file that is not what it should be."""

    def write(place: Place) -> None:
        place.file.write_bytes(base())
        make(place.here / "run" / name)

    return write


def newer(make: Maker) -> Maker:
    """A good checkpoint, and what `make` makes as the run's next one."""

    def write(place: Place) -> None:
        make(place)
        place.file.rename(step_file(place.here / "run", STEP + 1))
        place.file.write_bytes(base())

    return write


class _Payload:
    """Runs when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.canary / "unpickled"),)


def pickled(place: Place, inside: bool) -> None:
    payload = pickle.dumps(_Payload(place.canary), protocol=0)
    if not inside:
        place.file.write_bytes(payload)
        return
    _, header, body = _base()
    _write(place, payload.decode(), header, body)
