"""Ctrl-C, a batch system's SIGTERM and SIGUSR1, at every moment of a command's life."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

from ddpm.checkpoint import locate
from tests.faults import processes
from tests.faults.cases import Case
from tests.faults.processes import (
    LAST,
    QUICK,
    Script,
    finished,
    no_traceback,
    reference,
    refused,
    same_outcome,
    save_begins,
    step_of,
    steps_that_load,
    succeeded,
    temporary_files,
    train,
)

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
LONG_STEPS = ("trainer.batch_size=4096", "trainer.max_steps=50")  # of two seconds and more
PREVIEWS = (*QUICK, "trainer.max_steps=12", "trainer.sample_every=1")
COMPILED = (  # a network that compiles in seconds
    *(setting for setting in QUICK if not setting.startswith("model.")),
    "model=mlp",
    "model.hidden=32",
    "trainer.max_steps=4",
    "trainer.compile=true",
)


@dataclass(frozen=True)
class Moment:
    """`wait` returns whether the moment came before the process had ended."""

    name: str
    settings: tuple[str, ...]
    wait: Callable[[Script, Path, random.Random], bool]


def _within_a_step(script: Script, run_dir: Path, chosen: random.Random) -> bool:
    number = chosen.randint(1, 6)
    came = script.wait_for(lambda: sum(line.startswith("step ") for line in list(script.out)) >= number)
    time.sleep(chosen.uniform(0, 0.1))
    return came


def _within_a_save(script: Script, run_dir: Path, chosen: random.Random) -> bool:
    script.wait_for_line("training and")  # to look that often from the start would take a core
    return script.wait_for(save_begins(run_dir, chosen.randint(1, 4)), every=0.0002)


def _within_a_preview(script: Script, run_dir: Path, chosen: random.Random) -> bool:
    """With sample_every=1 most of the time is spent on previews: right after one of them the next is near."""
    number = chosen.randint(0, 4)
    came = script.wait_for(
        lambda: len(list(run_dir.glob("samples/step_*.png"))) >= number and script.said("step ")
    )
    time.sleep(chosen.uniform(0, 0.2))
    return came


def _at_the_end(script: Script, run_dir: Path, chosen: random.Random) -> bool:
    came = script.wait_for((run_dir / "checkpoints" / f"step_{LAST:07d}.safetensors").exists, every=0.0005)
    time.sleep(chosen.uniform(0, 1.2))
    return came


MOMENTS = (
    Moment("within a save", QUICK, _within_a_save),
    Moment("within a step", QUICK, _within_a_step),
    Moment("within a preview", PREVIEWS, _within_a_preview),
    Moment("at the end", QUICK, _at_the_end),
)


def stop(folder: Path, count: int) -> str:
    """One signal at each moment in turn; then the same command again."""
    complete = 0
    for trial, (moment, signum) in _trials(count, MOMENTS, STATUS):
        run_dir = folder / f"run-{trial}"
        script = train(run_dir, *moment.settings)
        moment.wait(script, run_dir, random.Random(trial))
        script.send(signum)
        script.finish()
        if script.said("done in "):
            assert moment.name == "at the end", f"should have stopped {moment.name}: {script}"
            assert script.process.returncode in (0, STATUS[signum]) and not script.err, (
                f"at its end: {script}"
            )
            complete += 1
        else:
            _stopped(script, run_dir, signum)
        finished(run_dir, *moment.settings)
        same_outcome(run_dir, reference(*moment.settings))
        shutil.rmtree(run_dir)
    return f"{count} signals, {complete} of them after the last step; going on, all ended bitwise equal"


def _stopped(script: Script, run_dir: Path, signum: signal.Signals) -> None:
    """Stopped as promised: status, line, a checkpoint of that very step, nothing half-written."""
    assert script.process.returncode == STATUS[signum], f"should have ended with {STATUS[signum]}: {script}"
    assert not script.err, f"should have been silent on stderr: {script}"
    no_traceback(script)
    newest = locate.saved_steps(run_dir)[-1]
    line = f"stopped by {signum.name} at step {step_of(newest):,}; go on with: ddpm-train trainer.resume={run_dir.name}"
    assert script.out[-1] == line, f"should end with {line!r}: {script}"
    assert line in (run_dir / "train.log").read_text().splitlines(), f"not in train.log: {line}"
    steps_that_load(run_dir)
    assert not temporary_files(run_dir), f"left behind: {temporary_files(run_dir)}"


def stop_before_the_first_step(folder: Path, count: int) -> str:
    """At a random time between exec and the first step. Before the command has begun, Python itself dies of it."""
    bare = within = 0
    reference(*QUICK)  # measures the time to start
    for trial, (early, signum) in _trials(count, (False, True), STATUS):
        run_dir, chosen = folder / f"run-{trial}", random.Random(trial)
        script = train(run_dir, *QUICK, *LONG_STEPS)
        if not early:
            script.wait_for(script.handles_signals)
        time.sleep(chosen.uniform(0, 0.15 if early else 0.6 * processes.seconds_to_start[0]))
        handled = script.handles_signals()
        script.send(signum)
        script.finish()
        if script.said("stopped by "):
            _stopped(script, run_dir, signum)
            within += 1
        else:
            if script.process.returncode == -signum and not handled:
                bare += 1
            else:
                refused(script, f"stopped by {signum.name} before the first step", status=STATUS[signum])
            assert not steps_that_load(run_dir) and not temporary_files(run_dir), f"left behind: {script}"
        if trial == 0:
            finished(run_dir, *QUICK, "trainer.max_steps=2")
        shutil.rmtree(run_dir, ignore_errors=True)
    return (
        f"{count} signals, {bare} of them before the command itself had begun, {within} within the first step"
    )


def twice(folder: Path, count: int) -> str:
    """The second signal comes while the first waits for a long step to end."""
    slowest = 0.0
    run_dir = folder / "run"
    for trial, (signum,) in _trials(count, (signal.SIGINT, signal.SIGTERM)):
        script = train(run_dir, *QUICK, *LONG_STEPS, "overwrite=true", "trainer.resume=null")
        script.wait_for_line("training and")  # the line before the first step
        time.sleep(random.Random(trial).uniform(0, 0.5))
        script.send(signum)
        time.sleep(0.1)
        assert script.running(), f"ended after one signal; the case needs longer steps: {script}"
        script.send(signum)
        sent = time.monotonic()
        status = script.finish()
        slowest = max(slowest, time.monotonic() - sent)
        assert status == -signum, f"should have been killed by the second {signum.name}: {script}"
        no_traceback(script)
        steps_that_load(run_dir)
    assert slowest < 1, f"took {slowest:.1f} s after the second signal"
    return f"{count} second signals: the process was gone after at most {slowest:.2f} s"


def save_now(folder: Path, count: int) -> str:
    """SIGUSR1 at each moment in turn, before the first step, too."""
    early = Moment(
        "before the first step", QUICK, lambda script, _, __: script.wait_for(script.handles_signals)
    )
    for trial, (moment,) in _trials(count, (MOMENTS[1], early, MOMENTS[0], MOMENTS[2])):
        run_dir = folder / f"run-{trial}"
        script = train(run_dir, *moment.settings)
        moment.wait(script, run_dir, random.Random(trial))
        script.send(signal.SIGUSR1)
        script.finish()
        succeeded(script)
        lines = [line for line in script.out if line.endswith("(SIGUSR1)")]
        assert len(lines) == 1, f"one line should say what was saved: {script.out}"
        step = int(lines[0].removeprefix("saved checkpoints/step_").partition(".")[0])
        assert lines[0] == f"saved checkpoints/step_{step:07d}.safetensors (SIGUSR1)", lines[0]
        assert lines[0] in (run_dir / "train.log").read_text().splitlines(), f"not in train.log: {lines[0]}"
        assert step == 1 or moment is not early, f"asked for before the first step, saved at step {step}"
        same_outcome(run_dir, reference(*moment.settings))
        shutil.rmtree(run_dir)
    return f"{count} checkpoints asked for; no run was changed by it"


def stop_sampling(folder: Path, count: int) -> str:
    """While it starts, draws, or writes: one line, and no folder of pictures that looks finished."""
    bare = 0
    ckpt = reference(*QUICK)
    for trial, (moment, signum) in _trials(count, ("drawing", "writing", "starting"), STATUS):
        home, chosen = folder / f"home-{trial}", random.Random(trial)
        home.mkdir()
        steps = 3 if moment == "writing" else 1000
        settings = (
            "n=2000",
            f"sampler.num_steps={steps}",
            "save=[grid,images,npz]",
            "out=drawn",
            "device=cpu",
        )
        script = Script("sample", f"ckpt={ckpt}", *settings, cwd=home)
        if moment == "starting":
            time.sleep(chosen.uniform(0, 1))
        elif moment == "drawing":
            script.wait_for(script.handles_signals)
            time.sleep(processes.seconds_to_start[0] + chosen.uniform(0, 1))
        else:
            script.wait_for(partial(os.listdir, home), every=0.001)
            time.sleep(chosen.uniform(0, 0.05))
        handled = script.handles_signals()
        script.send(signum)
        script.finish()
        if script.process.returncode == -signum and not handled:
            bare += 1
        else:
            refused(script, f"stopped by {signum.name}", status=STATUS[signum])
        assert not list(home.iterdir()), f"left behind: {[path.name for path in home.iterdir()]} by {script}"
    return f"{count} signals, {bare} of them before the command itself had begun: nothing left behind"


def stop_compiling(folder: Path, count: int) -> str:
    """trainer.compile=true: the first step compiles, which takes a while, and is finished all the same."""
    if shutil.which("c++") is None:
        return "not possible here: no C++ compiler"
    for trial, (signum,) in _trials(count, tuple(STATUS)):
        run_dir = folder / f"run-{trial}"
        nothing_compiled = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{trial}")}
        script = train(run_dir, *COMPILED, environment=nothing_compiled)
        assert script.wait_for_line("training and"), f"ended early: {script}"
        time.sleep(random.Random(trial).uniform(0, 8))
        script.send(signum)
        script.finish()
        _stopped(script, run_dir, signum)
        finished(run_dir, *COMPILED)
        same_outcome(run_dir, reference(*COMPILED))
    return f"{count} signals while the first step was compiled; the runs gone on with are bitwise equal"


def _trials(count: int, *choices: Iterable[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The first `count` combinations, in turn, numbered."""
    return enumerate(islice(cycle(product(*choices)), count))


CASES = (
    Case(
        "a signal while training",
        "SIGTERM and SIGINT: the step is finished, a checkpoint saved, status 143 or 130; going on is bitwise equal.",
        short=1,
        long=8,
        run=stop,
    ),
    Case(
        "a signal before the first step",
        "One line, status 143 or 130, no checkpoint; the run can be begun again.",
        short=1,
        long=10,
        run=stop_before_the_first_step,
    ),
    Case(
        "a second signal",
        "It ends the process at once; earlier checkpoints load.",
        short=1,
        long=4,
        run=twice,
    ),
    Case(
        "SIGUSR1 while training",
        "A checkpoint is saved, a line says so, and the run is the same as without.",
        short=0,
        long=4,
        run=save_now,
    ),
    Case(
        "a signal while sampling",
        "One line, status 143 or 130, no half-written folder.",
        short=1,
        long=9,
        run=stop_sampling,
    ),
    Case(
        "a signal while compiling",
        "As in any other step, once the first step is compiled.",
        short=0,
        long=2,
        run=stop_compiling,
    ),
)
