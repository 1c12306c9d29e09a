"""Damaged and foreign checkpoint files: each must be caught, and a run must fall back to the file before."""

import functools
import io
import json
import pickle
import random
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.errors import CheckpointError
from tests import forks
from tests.faults.cases import Case

STEP = 3  # of the base checkpoint, of 6
SETTINGS = (
    "device=cpu",
    "model=mlp",
    "model.hidden=8",
    "model.conditional=true",
    "schedule.num_timesteps=50",
    "sampler.num_steps=2",
    "trainer.max_steps=6",
    "trainer.batch_size=16",
    "trainer.checkpoint_every=3",
    "trainer.validate_every=6",
    "trainer.sample_every=0",
    "trainer.log_every=3",
)


@functools.cache
def base() -> bytes:
    """The checkpoint of a real training, half-way: 25 kB."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = forks.run("train", "run_dir=run", *SETTINGS, cwd=Path(folder))
        assert outcome.status == 0, str(outcome)
        return step_file(Path(folder) / "run", STEP).read_bytes()


def step_file(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:07d}.safetensors"


def a_run(folder: Path) -> tuple[Path, Path]:
    """A run whose newest checkpoint is to be damaged: the good one, and the place of the newer one."""
    good, newest = (step_file(folder / "run", step) for step in (STEP, STEP + 1))
    good.parent.mkdir(parents=True)
    good.write_bytes(base())
    return good, newest


def truncated(folder: Path, count: int) -> str:
    whole = base()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    edges = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1]
    generator = random.Random(1)
    lengths = edges + [generator.randrange(len(whole)) for _ in range(count - len(edges))]
    return _trials(folder, [whole[:length] for length in lengths], [f"cut at {n}" for n in lengths])


def flipped(folder: Path, count: int) -> str:
    """A quarter of the flips each in the length, the texts, the rest of the header, and the tensors."""
    whole = base()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    texts = whole.index(b"__metadata__"), whole.index(b"}", whole.index(b'"sha256":"'))
    parts = [(0, 8), texts, (8, header), (header, len(whole))]
    generator = random.Random(2)
    damaged, names = [], []
    for number in range(count):
        place, bit = generator.randrange(*parts[number % len(parts)]), generator.randrange(8)
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        damaged.append(bytes(broken))
        names.append(f"bit {bit} of byte {place} flipped")
    return _trials(folder, damaged, names)


def _trials(folder: Path, damaged: list[bytes], names: list[str]) -> str:
    """Each as a file by itself and as a run's newest; one in 100 with the commands, which cost more."""
    good, newest = a_run(folder)
    commands = 0
    for number, (data, name) in enumerate(zip(damaged, names, strict=True)):
        newest.write_bytes(data)
        _caught(newest, name)
        found, notes = locate.newest_good(locate.find(str(folder / "run")))
        assert found == good, f"{name}: the run folder means {found}"
        assert len(notes) == 1 and good.name in notes[0] and newest.name in notes[0], f"{name}: says {notes}"
        if number % 100 == 1:
            commands += _commands(folder, newest, name) + _fall_back(folder, newest, name)
    return f"{len(damaged)} files, all caught, the run fell back each time; {commands} of the commands agree"


def _caught(file: Path, name: str) -> str:
    try:
        checkpoint.load(file)
    except CheckpointError as error:
        return str(error)
    raise AssertionError(f"{name}: not caught")


def _commands(folder: Path, file: Path, name: str) -> int:
    """All three refuse the file itself, name it, and write nothing. ddpm-info sees the header alone."""
    before = {
        path for path in folder.rglob("*") if path.name != ".lock"
    }  # which a training takes before it reads
    header_good = _passes(checkpoint.read_meta, file)
    for program, argument in (("info", "ckpt"), ("sample", "ckpt"), ("train", "trainer.resume")):
        outcome = forks.run(program, f"{argument}={file}", *_quick(program), cwd=folder)
        if program == "info" and header_good:
            assert outcome.status == 0, f"{name}: {outcome}"
        else:
            line = forks.refused(outcome)
            assert file.name in line, f"{name}: does not name the file: {outcome}"
    written = sorted({path for path in folder.rglob("*") if path.name != ".lock"} ^ before)
    assert not written, f"{name}: written or gone: {written}"
    return 3


def _fall_back(folder: Path, newest: Path, name: str) -> int:
    """A run folder means the file before, said in one line with both names; resuming ends as if undamaged."""
    run = newest.parent.parent
    with tempfile.TemporaryDirectory() as other:
        copy = Path(other) / "run"
        shutil.copytree(run, copy)
        for program, argument in (("sample", "ckpt"), ("train", "trainer.resume")):
            outcome = forks.run(program, f"{argument}=run", *_quick(program), cwd=Path(other))
            assert outcome.status == 0, f"{name}: {outcome}"
            good = step_file(run, STEP).name
            told = [line for line in outcome.stdout.splitlines() if newest.name in line and good in line]
            assert len(told) == 1, f"{name}: not one line with both files: {outcome}"
        assert checkpoint.load(step_file(copy, 6))[0].step == 6, f"{name}: did not go on"
    return 2


def _quick(program: str) -> tuple[str, ...]:
    return {
        "info": (),
        "sample": ("n=2", "sampler.num_steps=2", "device=cpu"),
        "train": ("device=cpu",),
    }[program]


def _passes(check: Callable[[Path], object], file: Path) -> bool:
    try:
        check(file)
    except CheckpointError:
        return False
    return True


def _zip() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model.bin", base())
    return archive.getvalue()


def _torch_save() -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"w": torch.ones(3)}}, file)
    return file.getvalue()


def _with_version(version: object) -> bytes:
    """A whole file of another format version, with a hash of its text that fits."""
    import hashlib

    size = struct.unpack("<Q", base()[:8])[0]
    header = json.loads(base()[8 : 8 + size])
    fields = json.loads(header["__metadata__"]["ddpm"])
    text = json.dumps({**fields, "format_version": version})
    header["__metadata__"] = {"ddpm": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + base()[8 + size :]


def _last_bit_flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


# What another program or time left behind, and a word of the message that says so
FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "an empty file": (lambda: b"", "no checkpoint"),
    "a text file": (lambda: b"step: 3\nloss: 0.5\n" * 9, "no checkpoint"),
    "a zip": (_zip, "no checkpoint"),
    "what torch.save writes": (_torch_save, "no checkpoint"),
    "a pickle": (lambda: pickle.dumps({"model": [1.0] * 99}), "no checkpoint"),
    "format version 3": (lambda: _with_version(3), "format version 3"),
    "format version 10^30": (lambda: _with_version(10**30), "format version"),
    "format version '2'": (lambda: _with_version("2"), "format version"),
    "no format version": (lambda: _with_version(None), "format version"),
    "format version 1, a bit flipped": (lambda: _last_bit_flipped(_with_version(1)), "SHA-256"),
}


def foreign(folder: Path, count: int) -> str:
    """`count` of the kinds with the commands, too."""
    file, commands = folder / "file.safetensors", 0
    for number, (name, (content, word)) in enumerate(FOREIGN.items()):
        file.write_bytes(content())
        message = _caught(file, name)
        assert word in message and str(file) in message, f"{name}: says {message}"
        if number < count:
            commands += _commands(folder, file, name)
    save_file({"w": torch.ones(3)}, file)
    assert "without ddpm's metadata" in _caught(file, "another tool's safetensors")
    file.unlink()
    file.mkdir()
    assert "not a regular file" in _caught(file, "a directory")
    old = folder / "old.pt"
    old.write_bytes(_torch_save())
    with pytest.raises(CheckpointError, match="can run code"):
        locate.find(str(old))
    for path in (file, old):
        for program, argument in (("info", "ckpt"), ("train", "trainer.resume"))[: 1 + (count > 3)]:
            forks.refused(forks.run(program, f"{argument}={path}", *_quick(program), cwd=folder))
            commands += 1
    return (
        f"{len(FOREIGN) + 3} kinds of files, all refused by what they are; {commands} of the commands agree"
    )


CASES = (
    Case(
        "truncated checkpoints",
        "a cut-off file is never taken for a checkpoint, and a run falls back to the file before",
        50,
        100,
        truncated,
    ),
    Case(
        "flipped bits",
        "one flipped bit anywhere in a checkpoint is found, and a run falls back to the file before",
        200,
        400,
        flipped,
    ),
    Case(
        "files that are no checkpoints",
        "an empty file, a text, a zip, a pickle, a folder, other formats and versions are refused in one line",
        2,
        len(FOREIGN),
        foreign,
    ),
)
