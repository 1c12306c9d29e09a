"""The training as ddpm-train follows it: a bar or lines, what signals ask for, and what to say when memory ends."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.cli.progress import estimate
from ddpm.errors import RankError, UserError
from ddpm.runtime import signals
from ddpm.runtime.console import Log, typed

if TYPE_CHECKING:
    from ddpm.data.dataset import Dataset
    from ddpm.train.state import TrainState


def follow(run: "TrainState", data: "Dataset", run_dir: Path, log: Log) -> None:
    """The training, with its bar or plain lines; what signals ask for is done between two steps."""
    from ddpm.runtime import memory
    from ddpm.runtime.distributed import raise_on_all_ranks
    from ddpm.train import compile as compiling
    from ddpm.train import tensorboard
    from ddpm.train.loop import fit, keep

    first, clock = run.step, time.perf_counter()
    exhausted = False
    try:
        if note := compiling.begin(run):
            log.say(note)
        with log.bar(run.max_steps, run.step) as bar, tensorboard.events(run, run_dir) as mirror:
            asked = _asked(run)
            for progress in fit(run, data, run_dir):
                bar.update()
                if progress.step == first + 1:  # which also allocated and picked algorithms
                    clock = time.perf_counter()
                elif progress.step == first + 4:
                    log.say(estimate(run, (time.perf_counter() - clock) / 3))
                if progress.note:
                    log.say(progress.note)
                if progress.record:
                    log.record(progress.record, run.max_steps, bar)
                    mirror(progress.record)
                number, save = next(asked)
                if save and run.world.first:
                    path = keep(run, run_dir, progress.record or {})
                    log.say(f"saved {path.relative_to(run_dir)} (SIGUSR1)")
                if number is not None and progress.step < run.max_steps:
                    with raise_on_all_ranks(
                        run.world
                    ):  # nobody leaves before it is saved: torchrun would end the others
                        if run.world.first:
                            keep(run, run_dir, progress.record or {})
                            how = f"; go on with: ddpm-train trainer.resume={typed(run_dir)}"
                            log.say(
                                f"stopped with its sweep at step {progress.step}"
                                if signals.of_a_sweep()
                                else f"stopped by {signals.name(number)} at step {progress.step}{how}"
                            )
                    raise signals.Stopped(number, said=True)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        exhausted = True  # what filled the memory is free only when the error itself is gone
    if exhausted:
        raise _out_of_memory(run)


def _asked(run: "TrainState") -> Iterator[tuple[int | None, bool]]:
    """After each step: the signal that asked to stop, if one came, and whether one asked to save.

    A signal reaches several processes at different steps, or only one of them. So each begins to tell the others
    after one step and hears of them after the next: all act after the same step, and none waits but for processes
    that are a whole step behind.
    """
    from ddpm.runtime.distributed import all_reduce_max_async

    if run.world.size == 1:
        while True:
            yield signals.stop_requested(), signals.save_requested()
    heard = all_reduce_max_async(run.world, (0, 0))
    while True:
        number, save = heard()
        saves = signals.save_requested() and not save  # else it is the same request, come here a moment later
        if not number and run.step < run.max_steps:  # no question is left open at the end
            heard = all_reduce_max_async(run.world, (signals.stop_requested() or 0, int(saves)))
        yield number or None, bool(save)


def _out_of_memory(run: "TrainState") -> UserError:
    import torch

    from ddpm.runtime import memory
    from ddpm.train import compile as compiling
    from ddpm.train import loop

    batch, parts = run.config.trainer.batch_size, run.config.trainer.accumulate
    text = f"out of memory on {run.device} with trainer.batch_size={batch} trainer.accumulate={parts}"
    if run.world.size > 1:  # no trial: its gradients would wait for the other processes
        text += f" in {run.world.size} processes"
        return RankError(f"{text}; a larger trainer.accumulate makes the same batch in smaller parts")
    if run.device.type != "cuda":
        return UserError(f"{text}; a larger trainer.accumulate makes the same batch in smaller parts")
    run.network.zero_grad()
    compiling.undo(run.network)  # batches of other sizes would be compiled anew
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(run.device)
    peak = memory.peak_on_gpu(lambda n: loop.trial(run, n), run.device)
    fits = memory.largest_batch(peak, free, -(-batch // parts))
    if fits is None:
        return UserError(f"{text}; not even 1 image fits: take a smaller model, or free the GPU")
    return UserError(
        f"{text}; about {fits} images fit at once: trainer.accumulate={-(-batch // fits)} keeps the batch, "
        f"trainer.batch_size={fits} makes a smaller one"
    )
