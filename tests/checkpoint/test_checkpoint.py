"""Checkpoints: whole, verified, and read without believing the file."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.checkpoint.header import Meta
from ddpm.errors import CheckpointError

FACTS = {
    "name": "digits",
    "channels": 1,
    "image_size": 8,
    "num_classes": 2,
    "class_names": ["no", "نه"],
    "levels": 17,
}
META = Meta({"a": 1}, FACTS, 7, {"val_loss": 0.5}, {"ddpm": "0"}, "")
TENSORS = {
    "model.w": torch.randn(3, 4),
    "model.scalar": torch.tensor(2.0),
    "ema.b": torch.arange(5, dtype=torch.int64),
    "model.half": torch.randn(2).bfloat16(),
    "model.cl": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "step_0000007.safetensors", TENSORS, META)
    return tmp_path / "step_0000007.safetensors"


def test_round_trip(file: Path) -> None:
    meta, tensors = checkpoint.load(file)
    assert dataclasses.replace(meta, sha256="") == META
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # no temporary file left


def test_every_flipped_bit_of_the_tensors_is_found(file: Path) -> None:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data), 7):
        broken = bytearray(data)
        broken[position] ^= 1 << (position % 8)
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match="broken"):
            checkpoint.load(file)


def test_truncated_files_are_found(file: Path) -> None:
    data = file.read_bytes()
    for length in range(0, len(data), 37):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            checkpoint.load(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\xff" * 100,
        b"\x02\0\0\0\0\0\0\0{}",
        (2**40).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04" * 20,
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path / "x.safetensors")


def rewrite(file: Path, change: Callable[[dict[str, Any]], None], seal: bool = True) -> None:
    """Change the metadata as somebody would who knows the format, and seal them again."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    fields = json.loads(header["__metadata__"]["ddpm"])
    change(fields)
    text = json.dumps(fields)
    header["__metadata__"]["ddpm"] = text
    if seal:
        header["__metadata__"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    packed = json.dumps(header).encode()
    file.write_bytes(len(packed).to_bytes(8, "little") + packed + data[end:])


def test_another_format_version_is_refused_by_name(file: Path) -> None:
    for version in (9, 0, "2", 2.0, True, None):
        rewrite(file, lambda fields, version=version: fields.update(format_version=version))
        with pytest.raises(CheckpointError, match=f"format version {version}; this ddpm reads versions 1, 2"):
            checkpoint.read_meta(file)


def test_a_file_of_version_1_is_still_read(file: Path) -> None:
    """It had no hash of its metadata, only that of its tensors."""
    rewrite(file, lambda fields: fields.update(format_version=1), seal=False)
    meta, tensors = checkpoint.load(file)
    assert meta.step == 7 and torch.equal(tensors["model.w"], TENSORS["model.w"])


def test_changed_metadata_are_found(file: Path) -> None:
    rewrite(file, lambda fields: fields.update(step=8), seal=False)
    with pytest.raises(CheckpointError, match="metadata does not match the SHA-256"):
        checkpoint.read_meta(file)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": True},
        {"step": 7.0},
        {"figures": {"val_loss": "low"}},
        {"figures": {"val_loss": 10**400}},
        {"versions": {"torch": 2}},
        {"versions": {"torch": "\x1b[31m2"}},
        {"facts": {}},
        {"facts": {**FACTS, "image_size": 4096}},
        {"facts": {**FACTS, "channels": True}},
        {"facts": {**FACTS, "class_names": ["no"]}},
        {"facts": {**FACTS, "class_names": ["no", "\ud800"]}},
        {"facts": {**FACTS, "name": "a\nb"}},
        {"sha256": None},
        {"more": 1},
    ],
    ids=str,
)
def test_metadata_that_make_no_sense_are_refused(file: Path, change: dict[str, Any]) -> None:
    rewrite(file, lambda fields: fields.update(change))
    with pytest.raises(CheckpointError, match=r"step_0000007.safetensors (is no checkpoint|cannot be used)"):
        checkpoint.read_meta(file)


def test_only_what_is_asked_for_becomes_tensors_but_all_is_verified(file: Path) -> None:
    assert checkpoint.load(file, "ema")[1].keys() == {"ema.b"}
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="do not match"):
        checkpoint.load(file, "ema")


def test_it_is_what_the_safetensors_library_reads(file: Path) -> None:
    theirs = load_file(file)
    assert theirs.keys() == TENSORS.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in checkpoint.load(file)[1].items())


def test_what_was_written_is_read_back_before_anything_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says yes and writes something else."""
    monkeypatch.setattr(checkpoint, "write_atomically", lambda path, data: path.write_bytes(data[:-1] + b"x"))
    with pytest.raises(CheckpointError, match="do not match"):
        checkpoint.save(tmp_path / "a.safetensors", TENSORS, META)


def test_falls_back_to_the_newest_good_one(file: Path) -> None:
    older, newer = file.with_name("step_0000003.safetensors"), file.with_name("step_0000009.safetensors")
    older.write_bytes(file.read_bytes())
    newer.write_bytes(file.read_bytes()[:-5])
    chosen, notes = locate.newest_good([newer, file, older])
    assert chosen == file and len(notes) == 1 and str(newer) in notes[0] and f"trying {file}" in notes[0]
    with pytest.raises(CheckpointError, match="is broken: it should have"):
        locate.newest_good([newer])
    with pytest.raises(CheckpointError, match="nor is any other of the 2"):
        locate.newest_good([newer, newer])


def test_nan_is_not_written_as_a_figure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        checkpoint.save(
            tmp_path / "x", TENSORS, dataclasses.replace(META, figures={"val_loss": float("nan")})
        )
    assert list(tmp_path.iterdir()) == []


def test_header_alone_says_what_it_is(file: Path) -> None:
    meta, tensors = checkpoint.read_meta(file)
    assert meta.step == 7 and tensors["model.w"].shape == (3, 4)
    assert json.dumps(meta.config) == '{"a": 1}'


def test_find(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "train" / "day" / "time"
    (run / "checkpoints").mkdir(parents=True)
    for step in (40, 5, 12_345_678):  # as if the clock had gone backwards
        checkpoint.save(run / "checkpoints" / f"step_{step:07d}.safetensors", TENSORS, META)
    checkpoint.save(run / "checkpoints" / "best.safetensors", TENSORS, META)
    (run / "checkpoints" / "step_copy.safetensors").write_bytes(b"")
    names = [path.name for path in locate.find(str(run))]
    assert names == [f"{n}.safetensors" for n in ("step_12345678", "step_0000040", "best", "step_0000005")]
    assert locate.find("latest", tmp_path / "outputs") == locate.find(str(run / "checkpoints"))
    assert locate.find(str(file)) == [file]
    (tmp_path / "old.pt").write_bytes(b"")
    for spec, message in (
        ("nowhere", "does not exist"),
        (str(tmp_path), "holds no checkpoint"),
        (str(tmp_path / "old.pt"), r"can run code .* scripts/convert_pt.py"),
    ):
        with pytest.raises(CheckpointError, match=message):
            locate.find(spec)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "a.safetensors", TENSORS, META)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
