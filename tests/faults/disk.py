"""Disks that are full, cannot be written or vanish, and clocks that are wrong."""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ddpm.checkpoint import locate
from tests.faults.cases import Case
from tests.faults.processes import (
    LAST,
    QUICK,
    Script,
    as_it_was,
    before_exec,
    finished,
    reference,
    refused,
    run,
    same_outcome,
    step_of,
    steps_that_load,
    succeeded,
    temporary_files,
    train,
)

BEFORE_THE_END = LAST - 2  # a step of which a finished run of QUICK still has the checkpoint
SAMPLE = ("n=64", "sampler.num_steps=3", "device=cpu")


def no_longer_files(folder: Path, count: int) -> str:
    """The kernel refuses (EFBIG) to let a file grow past a limit, chosen so that each file of a run comes to it."""
    whole = reference(*QUICK)
    sizes = {
        path.name: path.stat().st_size for path in whole.rglob("*") if path.is_file() and path.stat().st_size
    }
    chosen = random.Random(0)
    for trial in range(count):
        run_dir = folder / f"run-{trial}"
        as_it_was(whole, run_dir, BEFORE_THE_END)
        before = steps_that_load(run_dir)
        name = f"step_{LAST:07d}.safetensors" if trial == 0 else chosen.choice(sorted(sizes))
        script = train(run_dir, *QUICK, file_limit=sizes[name] // 2)
        script.finish()
        refused(script)
        _nothing_lost(run_dir, before, script)
        finished(run_dir, *QUICK)
        same_outcome(run_dir, whole)
        shutil.rmtree(run_dir)
    return f"{count} runs stopped by a file that could not grow, and gone on with: all bitwise equal"


def full_disk(folder: Path, count: int) -> str:
    """A file system that is smaller than the run; then room is made."""
    whole = reference(*QUICK)
    need = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    chosen = random.Random(0)
    with _small_disk(folder) as disk:
        if disk is None:
            return "not possible here: mounting is not permitted"
        for trial in range(count):
            _remount(disk, f"size={chosen.randint(8 * 1024, need - 64 * 1024)}")
            run_dir = disk / f"run-{trial}"
            script = train(run_dir, *QUICK)
            script.finish()
            refused(script, "No space left on device")
            _nothing_lost(run_dir, set(), script)
            _remount(disk, "size=64m")
            finished(run_dir, *QUICK)
            same_outcome(run_dir, whole)
            shutil.rmtree(run_dir)
    return f"{count} disks of 8 kB to {need / 1e6:.0f} MB filled up; with room made, each run ended bitwise equal"


def _nothing_lost(run_dir: Path, before: set[int], script: Script) -> None:
    after = steps_that_load(run_dir)
    assert len(after) >= len(before) and max(after, default=0) >= max(before, default=0), (
        f"{before} lost: {script}"
    )
    assert not temporary_files(run_dir), f"{temporary_files(run_dir)} left by: {script}"


def read_only(folder: Path, count: int) -> str:
    """A new run, one to go on with, and pictures: refused in folders that cannot be written, which stay as they are."""
    possible = []
    for forbidden in (_without_permission, _on_a_read_only_disk)[:count]:
        with forbidden(folder) as (home, options):
            if home is None:
                continue
            before = _contents(home)
            refused(run("train", "run_dir=new", *QUICK, cwd=home, **options), "run_dir=new")
            refused(run("train", "run_dir=run", "trainer.resume=auto", *QUICK, cwd=home, **options), "run")
            refused(run("sample", "ckpt=run", "out=drawn", *SAMPLE, cwd=home, **options), "out=drawn")
            refused(run("sample", "ckpt=run", *SAMPLE, cwd=home, **options), "drawn-1")
            assert _contents(home) == before, f"files changed in {home}"
            possible.append(forbidden.__name__.replace("_", " ").strip())
    return f"four commands refused {' and '.join(possible)}" if possible else "not possible here"


@contextmanager
def _without_permission(folder: Path) -> Iterator[tuple[Path | None, dict[str, Any]]]:
    home, options = folder / "home", {"like_a_user": True}
    as_it_was(reference(*QUICK), home / "run", BEFORE_THE_END)
    for path in (home, *home.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    touched = subprocess.run(
        ["touch", home / "new"], preexec_fn=partial(before_exec, **options), capture_output=True
    )
    yield (home if touched.returncode else None), options
    for path in (home, *home.rglob("*")):
        path.chmod(0o755)


@contextmanager
def _on_a_read_only_disk(folder: Path) -> Iterator[tuple[Path | None, dict[str, Any]]]:
    with _small_disk(folder) as disk:
        if disk is not None:
            as_it_was(reference(*QUICK), disk / "run", BEFORE_THE_END)
            _remount(disk, "ro")
        yield disk, {}


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system in memory; None where mounting is not permitted."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], capture_output=True)
    if mounted.returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def _remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def vanish(folder: Path, count: int) -> str:
    """The run's folder is moved away or deleted while it trains."""
    for trial in range(count):
        run_dir, elsewhere = folder / f"run-{trial}", folder / f"elsewhere-{trial}"
        script = train(run_dir, *QUICK)
        assert script.wait_for_line("step "), f"ended early: {script}"
        time.sleep(random.Random(trial).uniform(0, 0.3))
        if moved := trial % 2 == 0:
            run_dir.rename(elsewhere)
        while not moved and run_dir.exists():  # again while the run still writes into it
            shutil.rmtree(run_dir, ignore_errors=True)
        script.finish()
        refused(script, run_dir.name)
        assert not run_dir.exists(), f"the folder is back: {list(run_dir.rglob('*'))}"
        if moved:
            assert steps_that_load(elsewhere) and not temporary_files(elsewhere), (
                f"left in the moved folder: {script}"
            )
    return f"{count} folders moved away or deleted: one line each, and no folder came back"


def full_out(folder: Path, count: int) -> str:
    """Pictures that do not fit on the disk: no folder that looks finished."""
    ckpt = reference(*QUICK)
    for trial in range(count):
        out = ("out=drawn",) if trial % 2 == 0 else ()
        run_dir = folder / f"run-{trial}"
        as_it_was(ckpt, run_dir, BEFORE_THE_END)
        before = _contents(folder)
        save = "save=[grid,images,npz,trajectory]"
        limit = random.Random(trial).choice([100, 1000, 3000])  # the grid alone is larger
        script = run("sample", f"ckpt={run_dir}", *SAMPLE, save, *out, cwd=folder, file_limit=limit)
        refused(script, "File too large")
        assert _contents(folder) == before, (
            f"left behind: {_contents(folder).keys() - before.keys()} by {script}"
        )
    return f"{count} sets of pictures that did not fit: one line each, nothing left behind"


def wrong_clocks(folder: Path, count: int) -> str:
    """Times of files in any order, and in the future: inside a run the highest step counts."""
    outputs = folder / "outputs"
    run_dir = outputs / "train" / "day" / "time"
    run_dir.parent.mkdir(parents=True)
    as_it_was(reference(*QUICK), run_dir, BEFORE_THE_END)
    files = locate.saved_steps(run_dir)
    chosen = random.Random(0)
    for _ in range(count):
        times = chosen.sample(range(-400, 400), len(files))
        for file, hours in zip(files, times, strict=True):
            os.utime(file, (time.time() + 3600 * hours,) * 2)
        for spec in (str(run_dir), "latest"):
            found = [step_of(file) for file in locate.find(spec, outputs)[: len(files)]]
            assert found == [step_of(file) for file in reversed(files)], (
                f"ckpt={spec} with the times {times}: {found}"
            )
    for hours, file in enumerate(reversed(files)):  # the oldest step looks the youngest, and is of tomorrow
        os.utime(file, (time.time() + 3600 * (24 + hours),) * 2)
    drawn = run("sample", "ckpt=latest", "out=drawn", *SAMPLE, cwd=folder)
    succeeded(drawn)
    assert json.loads((folder / "drawn" / "sample.json").read_text())["step"] == BEFORE_THE_END, str(drawn)
    script = finished(run_dir, *QUICK)
    assert script.said(f"going on from step {BEFORE_THE_END}"), f"should go on from the newest: {script.out}"
    same_outcome(run_dir, reference(*QUICK))
    return f"{count} orders of times, of {len(files)} files each; a run gone on with tomorrow's files is bitwise equal"


CASES = (
    Case(
        "a file that cannot grow",
        "Exit 2 with one line, no temporary file, earlier checkpoints load; going on is bitwise equal.",
        short=0,
        long=4,
        run=no_longer_files,
    ),
    Case(
        "a full disk",
        "Exit 2 with one line, no temporary file, checkpoints load; with room made, going on is bitwise equal.",
        short=0,
        long=3,
        run=full_disk,
    ),
    Case(
        "a disk or folder that cannot be written",
        "Exit 2 with one line that names it; nothing is changed.",
        short=0,
        long=2,
        run=read_only,
    ),
    Case(
        "a folder that vanishes",
        "Exit 2 with one line; the folder is not made anew.",
        short=1,
        long=6,
        run=vanish,
    ),
    Case(
        "no room for pictures",
        "ddpm-sample exits with 2 and one line and leaves nothing behind.",
        short=0,
        long=4,
        run=full_out,
    ),
    Case(
        "clocks that go backwards",
        "Inside a run the highest step is the newest, whatever the times of the files.",
        short=0,
        long=200,
        run=wrong_clocks,
    ),
)
