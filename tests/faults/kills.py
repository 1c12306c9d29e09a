"""Killed at any moment, a run goes on as if nothing had happened: bit for bit, not merely about as good."""

import functools
import random
import shutil
import signal
import time
from pathlib import Path

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from tests.faults import processes
from tests.faults.cases import Case
from tests.faults.processes import (
    LAST,
    QUICK,
    as_it_was,
    finished,
    reference,
    refused,
    run,
    same_outcome,
    save_begins,
    saving,
    steps_that_load,
    succeeded,
    train,
)

KILLS_IN_A_CHAIN = 10
PLAIN = (  # two parts of one case, for two cores
    (),
    ("trainer.accumulate=2",),
    ("objective.timesteps=loss_aware", "model.conditional=true", "schedule.num_timesteps=50"),
)
OTHER = (
    ("model.dropout=0.1",),
    ("trainer.precision=bf16",),
    ("trainer.keep=1",),
)
EPOCH = 3  # steps of 479 images: digits has 3 * 479
WHOLE_EPOCHS = (
    *QUICK,
    "trainer.batch_size=479",
    "trainer.max_steps=5",
    "trainer.validate_every=2",
    "trainer.checkpoint_every=1",
    "trainer.keep=9",
    "optimizer.decay=constant",  # so that a shorter run begins like a longer one
)
CHANGES = (
    ("model.channels=[16,48]", "model.channels"),
    ("schedule=cosine", "schedule.name"),
    ("schedule.num_timesteps=500", "schedule.num_timesteps"),
    ("objective.prediction=v", "objective.prediction"),
    ("seed=1", "seed"),
)


def kill(variants: tuple[tuple[str, ...], ...], folder: Path, count: int) -> str:
    """The same command killed and given again up to ten times, then left alone; and another such chain, and so on."""
    kills = inside = chains = 0
    while kills < count:
        chosen = random.Random(chains)
        settings = (*QUICK, *variants[chains % len(variants)])
        whole = reference(*settings)
        run_dir = folder / f"chain-{chains}"
        for _ in range(min(KILLS_IN_A_CHAIN, count - kills)):
            inside += _killed(run_dir, settings, chosen, aim=kills % 2 == 0)
            kills += 1
        finished(run_dir, *settings)
        same_outcome(run_dir, whole)
        shutil.rmtree(run_dir)
        chains += 1
    return f"{kills} kills, {inside} of them inside a save; {chains} runs taken to the end, all bitwise equal"


def _killed(run_dir: Path, settings: tuple[str, ...], chosen: random.Random, aim: bool) -> bool:
    """Kills one process, at any moment or (aim) when a save has begun; returns whether that was inside a save.

    A process that ends before it is killed does not count.
    """
    before = steps_that_load(run_dir)
    while True:
        left_behind = saving(run_dir)
        script = train(run_dir, *settings)
        if aim:
            script.wait_for_line("training and")  # to look that often from the start would take a core
            script.wait_for(save_begins(run_dir, chosen.randint(1, 4)), every=0.0002)
            time.sleep(chosen.uniform(0, 0.004))  # about as long as a save takes
        else:
            time.sleep(chosen.uniform(0, 1.3 * processes.seconds_to_start[0]))
        script.send(signal.SIGKILL)
        if script.finish() == -signal.SIGKILL:
            break
        succeeded(script)
        aim = False
    inside = bool(saving(run_dir) - left_behind)
    after = steps_that_load(run_dir)
    keep = 1 if "trainer.keep=1" in settings else 3
    lost = set(sorted(before | after)[-keep:]) - after
    assert not lost, f"steps {sorted(lost)} were there before the kill of: {script}"
    return inside


def go_on_from(folder: Path, count: int) -> str:
    """From the very first step, from the end of an epoch, and from best in a run that was shorter at first."""
    whole = reference(*WHOLE_EPOCHS)
    places = ("step 1", "the end of an epoch", "best")
    for place in places[:count]:
        run_dir = folder / place.replace(" ", "-")
        if place == "best":
            succeeded(run("train", f"run_dir={run_dir}", *WHOLE_EPOCHS, "trainer.max_steps=4", cwd=folder))
            source = run_dir / "checkpoints" / "best.safetensors"
            assert checkpoint.read_meta(source)[0].step == 4
        else:
            step = 1 if place == "step 1" else EPOCH
            as_it_was(whole, run_dir, step)
            source = run_dir / "checkpoints" / f"step_{step:07d}.safetensors"
        # another length and another log_every are allowed, and change nothing else
        succeeded(
            run("train", f"trainer.resume={source}", "trainer.max_steps=5", "trainer.log_every=1", cwd=folder)
        )
        same_outcome(run_dir, whole)
    return f"gone on from {', '.join(places[:count])}: all bitwise equal"


def change(folder: Path, count: int) -> str:
    """Another network, schedule or seed is another run: refused, nothing is touched."""
    run_dir = folder / "run"
    as_it_was(reference(*QUICK), run_dir, LAST - 4)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for setting, key in CHANGES[:count]:
        for resume in ("auto", str(run_dir)):
            settings = (*QUICK, setting) if resume == "auto" else (setting,)
            script = run("train", f"run_dir={run_dir}", f"trainer.resume={resume}", *settings, cwd=folder)
            refused(script, f"{key} was ")
            after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
            assert after == before, f"changed files: {script}"
    return f"{2 * count} resumptions with another setting, each refused by the key's name"


def truncate(folder: Path, count: int) -> str:
    """The newest checkpoint cut off anywhere: the one before is taken, and the run ends as if nothing had been."""
    whole = reference(*QUICK)
    chosen = random.Random(0)
    for trial in range(count):
        run_dir = folder / f"run-{trial}"
        as_it_was(whole, run_dir, LAST - 2)
        older, newest = locate.saved_steps(run_dir)
        data = newest.read_bytes()
        cut = chosen.choice([0, 1, 7, 8, 100, chosen.randrange(len(data)), len(data) - 1])
        newest.write_bytes(data[:cut])
        script = finished(run_dir, *QUICK)
        lines = [line for line in script.out if newest.name in line and older.name in line]
        assert len(lines) == 1, f"one line should name {newest.name} and {older.name}: {script.out}"
        assert lines[0] in (run_dir / "train.log").read_text(), f"not in train.log: {lines[0]}"
        same_outcome(run_dir, whole)
        shutil.rmtree(run_dir)
    return f"{count} newest checkpoints cut off: each run fell back to the one before and ended bitwise equal"


def at_once(folder: Path, count: int) -> str:
    """Two commands on one folder, a moment apart: to go on with a run, and to begin one."""
    whole, by_lock = reference(*QUICK), 0
    for trial in range(count):
        run_dir = folder / f"run-{trial}"
        settings: tuple[str, ...] = QUICK
        if going_on := trial % 2 == 0:
            as_it_was(whole, run_dir, LAST - 2)
        else:
            settings = (*QUICK, "trainer.resume=null")
        pair = [train(run_dir, *settings)]
        time.sleep(random.Random(trial).uniform(0, 0.3))
        pair.append(train(run_dir, *settings))
        for script in pair:
            script.finish()
        winner, loser = sorted(pair, key=lambda script: script.process.returncode)
        succeeded(winner)
        refused(loser)
        locked = "is in use by another process" in loser.err[0]
        assert locked or (not going_on and "is not empty" in loser.err[0]), (
            f"refused for another reason: {loser}"
        )
        by_lock += locked
        same_outcome(run_dir, whole)
        shutil.rmtree(run_dir)
    return f"{count} pairs started at once: one trained, the other was refused ({by_lock} by the lock)"


CASES = (
    *(
        Case(
            f"kill -9 at any moment ({name})",
            "The latest checkpoint always loads; the same command with trainer.resume=auto ends bitwise equal.",
            short=short,
            long=100,
            run=functools.partial(kill, variants),
        )
        for name, variants, short in (
            ("plain, accumulate, loss-aware", PLAIN, 1),
            ("dropout, bf16, keep=1", OTHER, 0),
        )
    ),
    Case(
        "going on from any checkpoint",
        "From the first step, an epoch's end or best, with another max_steps and log_every: bitwise equal.",
        short=0,
        long=3,
        run=go_on_from,
    ),
    Case(
        "going on with other settings",
        "Another network, schedule, objective or seed is refused by the key's name; no file changes.",
        short=0,
        long=len(CHANGES),
        run=change,
    ),
    Case(
        "newest checkpoint cut off",
        "The run goes on from the one before, says so, and ends bitwise equal.",
        short=1,
        long=4,
        run=truncate,
    ),
    Case(
        "one folder, two processes",
        "One trains, the other exits with 2 and touches nothing.",
        short=0,
        long=5,
        run=at_once,
    ),
)
