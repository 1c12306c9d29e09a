"""The real commands in processes of their own: started, watched, hit by signals, and judged by what they leave."""

import ctypes
import functools
import json
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from tests import forks

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of prctl(2) and capabilities(7)
PATIENCE = 240.0  # seconds until a command that should have ended counts as hanging
TORCH_WARNS = re.compile(r"W\d{4} .* torch/")  # about the machine (CUDA_HOME, say), while compiling
LAST = 80
QUICK = (
    "model.channels=[16,32]",
    "trainer.batch_size=16",
    f"trainer.max_steps={LAST}",
    "trainer.log_every=4",
    "trainer.validate_every=40",
    "trainer.sample_every=0",
    "trainer.checkpoint_every=2",
    "device=cpu",
)


seconds_to_start: list[float] = []  # until a run's first step, as measured on this machine


class Script:
    """`ddpm-<program> arguments…` while it runs; `out` and `err` hold the lines it has printed so far."""

    def __init__(
        self,
        program: str,
        *arguments: str,
        cwd: Path,
        file_limit: int | None = None,
        like_a_user: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = f"ddpm-{program}"
        self.command = " ".join([self.name, *arguments])
        self.out: list[str] = []
        self.err: list[str] = []
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name(self.name)), *arguments],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=functools.partial(before_exec, file_limit, like_a_user),
        )
        assert self.process.stdout and self.process.stderr
        self._readers = [
            threading.Thread(target=_collect, args=pipe, daemon=True)
            for pipe in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, condition: Callable[[], object], every: float = 0.005) -> bool:
        """True as soon as the condition holds, False if the process ends before it does."""
        while self.running():
            if condition():
                return True
            assert time.monotonic() - self.started < PATIENCE, f"nothing happens in: {self}"
            time.sleep(every)
        return False

    def wait_for_line(self, words: str) -> bool:
        return self.wait_for(lambda: self.said(words))

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def handles_signals(self) -> bool:
        """Whether the command's own handler of SIGTERM is in place; before that, signals find a bare Python."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def finish(self) -> int:
        """Waits for the end; returns the exit status (minus the signal's number if one killed it)."""
        try:
            self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"did not end within {PATIENCE:.0f} s: {self}") from None
        for reader in self._readers:
            reader.join(timeout=10)
        return self.process.returncode

    def said(self, words: str) -> bool:
        return any(words in line for line in list(self.out))

    def __str__(self) -> str:
        return (
            f"{self.command}\n  exit status {self.process.returncode}\n  last lines: {self.out[-3:]}"
            f"\n  stderr: {self.err[-12:]}"
        )


def before_exec(file_limit: int | None = None, like_a_user: bool = False) -> None:
    """In the new process: no file beyond a size; modes of files count, even for root."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background it would be ignored
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if like_a_user and os.geteuid() == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def _collect(pipe: IO[str], lines: list[str]) -> None:
    for line in pipe:
        if not TORCH_WARNS.match(line):
            lines.append(line.rstrip("\n"))


class Forked(Script):
    """A command that nothing disturbs, taken to its end without the price of its imports."""

    def __init__(self, program: str, *arguments: str, cwd: Path) -> None:
        outcome = forks.run(program, *arguments, cwd=cwd, limited=False)
        self.name, self.command = f"ddpm-{program}", outcome.command
        self.out = outcome.stdout.splitlines()
        self.err = [line for line in outcome.stderr.splitlines() if not TORCH_WARNS.match(line)]
        self.process: Any = SimpleNamespace(returncode=outcome.status)


def run(program: str, *arguments: str, cwd: Path, **options: Any) -> Script:
    """The command, taken to its end; with options as a script of its own."""
    if not options:
        return Forked(program, *arguments, cwd=cwd)
    script = Script(program, *arguments, cwd=cwd, **options)
    script.finish()
    return script


def succeeded(script: Script) -> None:
    assert script.process.returncode == 0, f"should have worked: {script}"
    assert not script.err, f"should have been silent on stderr: {script}"


def refused(script: Script, *words: str, status: int = 2) -> None:
    """Ended with this status and one line on stderr, which holds all these words; no traceback anywhere."""
    assert script.process.returncode == status, f"should have ended with {status}: {script}"
    assert len(script.err) == 1 and script.err[0].startswith(f"{script.name}: "), (
        f"should say one line on stderr: {script}"
    )
    no_traceback(script)
    for word in words:
        assert word in script.err[0], f"the line should name {word!r}: {script}"


def no_traceback(script: Script) -> None:
    assert not any("Traceback" in line for line in script.out + script.err), f"a traceback: {script}"


def temporary_files(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.rglob("*.tmp")]


def saving(run_dir: Path) -> set[str]:
    """The names of the checkpoints that are being written this very moment."""
    try:
        return {name for name in os.listdir(run_dir / "checkpoints") if name.endswith(".tmp")}
    except FileNotFoundError:
        return set()


def save_begins(run_dir: Path, number: int) -> Callable[[], bool]:
    """True once the number-th save from now has begun; what a process killed earlier left behind is none."""
    left_behind, seen = saving(run_dir), set[str]()

    def begun() -> bool:
        seen.update(saving(run_dir) - left_behind)
        return len(seen) >= number

    return begun


def step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step_"))


def steps_that_load(run_dir: Path) -> set[int]:
    """The steps of a run's checkpoints; each must load, and best, too, if there is one."""
    files = locate.saved_steps(run_dir)
    best = run_dir / "checkpoints" / "best.safetensors"
    for file in [*files, *([best] if best.exists() else [])]:
        checkpoint.load(file)
    return {step_of(file) for file in files}


def same_outcome(run_dir: Path, wanted: Path) -> None:
    """Two finished runs: the last and the best checkpoint bitwise equal, the same figures, each step once."""
    last = locate.saved_steps(wanted)[-1].name
    for name in (last, "best.safetensors"):
        a, b = (checkpoint.load(folder / "checkpoints" / name)[0] for folder in (run_dir, wanted))
        assert a.sha256 == b.sha256, f"{run_dir.name}: the tensors of {name} (step {a.step}, {b.step}) differ"
        assert a.step == b.step, f"{run_dir.name}: {name} is of step {a.step}, not {b.step}"
    mine, theirs = _metrics(run_dir), _metrics(wanted)
    steps = [record["step"] for record in mine]
    assert steps == [record["step"] for record in theirs], (
        f"{run_dir.name}: metrics.jsonl has the steps {steps}"
    )
    for record, other in zip(mine, theirs, strict=True):
        assert record == other, f"{run_dir.name}: metrics.jsonl says {record}, undisturbed {other}"
    assert not temporary_files(run_dir), f"left behind: {temporary_files(run_dir)}"
    assert (run_dir / "result.json").exists(), f"{run_dir.name}: no result.json"


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["images_per_second"]
    return records


_references = threading.Lock()


def reference(*settings: str) -> Path:
    """The folder of a run with these settings that was never disturbed: made once for all cases, never changed."""
    with _references:
        return _reference(settings)


@functools.cache
def _reference(settings: tuple[str, ...]) -> Path:
    folder = Path(_reference_folder().name) / f"{secrets.token_hex(4)}"
    command = ("train", f"run_dir={folder}", *settings)
    if seconds_to_start:
        script = run(*command, cwd=folder.parent)
    else:
        script = Script(*command, cwd=folder.parent)
        script.wait_for_line("step ")
        seconds_to_start.append(time.monotonic() - script.started)
        script.finish()
    succeeded(script)
    assert not temporary_files(folder), f"left behind: {temporary_files(folder)}"
    return folder


@functools.cache
def _reference_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ddpm-references-")


def as_it_was(finished: Path, run_dir: Path, step: int) -> None:
    """`run_dir` becomes a copy of a finished run as if it had been stopped right after a checkpoint of `step`."""
    shutil.copytree(finished, run_dir)
    for file in (run_dir / "checkpoints").iterdir():
        if checkpoint.read_meta(file)[0].step > step:
            file.unlink()
    (run_dir / "result.json").unlink()
    assert step in steps_that_load(run_dir)


def train(run_dir: Path, *settings: str, **options: Any) -> Script:
    """The command that begins a run, and goes on with it when it is given again; it is not waited for."""
    return Script(*_train(run_dir, settings), cwd=run_dir.parent, **options)


def _train(run_dir: Path, settings: tuple[str, ...]) -> tuple[str, ...]:
    return ("train", f"run_dir={run_dir.name}", "trainer.resume=auto", *settings)


def finished(run_dir: Path, *settings: str) -> Script:
    """The same command, taken to the end of the run."""
    script = run(*_train(run_dir, settings), cwd=run_dir.parent)
    succeeded(script)
    return script
