"""Checkpoints: whole, verified, and read without believing the file."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ddpm import checkpoint
from ddpm.checkpoint import Meta
from ddpm.errors import CheckpointError

META = Meta({"a": 1}, {"name": "digits"}, 7, {"val_loss": 0.5}, {"ddpm": "0"}, "")
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


def test_another_format_version_is_refused_by_name(file: Path) -> None:
    data = file.read_bytes()
    assert data.count(b'format_version\\": 1') == 1
    file.write_bytes(data.replace(b'format_version\\": 1', b'format_version\\": 9'))
    with pytest.raises(CheckpointError, match="format version 9"):
        checkpoint.read_meta(file)


def test_nan_is_not_written_as_a_figure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        checkpoint.save(
            tmp_path / "x", TENSORS, dataclasses.replace(META, figures={"val_loss": float("nan")})
        )
    assert list(tmp_path.iterdir()) == []


def test_header_alone_says_what_it_is(file: Path) -> None:
    meta, tensors = checkpoint.read_meta(file)
    assert meta.step == 7 and tensors["model.w"]["shape"] == [3, 4]
    assert json.dumps(meta.config) == '{"a": 1}'


def test_find(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "train" / "day" / "time"
    (run / "checkpoints").mkdir(parents=True)
    for step in (5, 40):
        checkpoint.save(run / "checkpoints" / f"step_{step:07d}.safetensors", TENSORS, META)
    newest = run / "checkpoints" / "step_0000040.safetensors"
    assert checkpoint.find(str(run)) == checkpoint.find("latest", tmp_path / "outputs") == newest
    assert checkpoint.find(str(file)) == file
    (tmp_path / "old.pt").write_bytes(b"")
    for spec, message in (
        ("nowhere", "does not exist"),
        (str(tmp_path), "holds no checkpoint"),
        (str(tmp_path / "old.pt"), "can run code"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.find(spec)
