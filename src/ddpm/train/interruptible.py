"""Train until the end or a signal: save where one asks for it, and say what fits where memory ends."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from ddpm.config.schema import settings_of
from ddpm.data.dataset import Dataset
from ddpm.errors import RankError, UserError
from ddpm.runtime import memory, signals
from ddpm.runtime.console import typed
from ddpm.runtime.distributed import all_reduce_max_async, raise_on_all_ranks
from ddpm.train import compile as compiling
from ddpm.train import loop
from ddpm.train.loggers import LOGGERS, log_record
from ddpm.train.loop import Progress
from ddpm.train.state import TrainState


def fit(run: TrainState, data: Dataset, run_dir: Path) -> Iterator[Progress]:
    """Train as `loop.fit` does. Between two steps, save on SIGUSR1; save and raise signals.Stopped on a stop signal.

    Further items, with the step of the last one and a note, say what was done beside the steps. Raises UserError
    where memory ends, also with the batch that would fit.
    """
    exhausted = False
    try:
        if note := compiling.begin(run):
            yield Progress(run.step, None, note)
        make = LOGGERS[run.config.logger if run.world.first else "files"]
        with closing(make(run_dir, settings_of(run.config), run.step, run.max_steps)) as logger:
            requests = _requests(run)
            for progress in loop.fit(run, data, run_dir):
                yield progress
                if progress.record:
                    log_record(logger, run_dir, progress.record)
                number, save = next(requests)
                if save and run.world.first:
                    path = loop.keep(run, run_dir, progress.record or {})
                    yield Progress(run.step, None, f"saved {path.relative_to(run_dir)} (SIGUSR1)")
                if number is not None and run.step < run.max_steps:
                    # nobody leaves before it is saved and said: torchrun would end the others
                    with raise_on_all_ranks(run.world):
                        if run.world.first:
                            loop.keep(run, run_dir, progress.record or {})
                            yield Progress(run.step, None, _stopped(run, run_dir, number))
                    raise signals.Stopped(number, said=True)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        exhausted = True  # what filled the memory is free only when the error itself is gone
    if exhausted:
        raise _out_of_memory(run)


def _stopped(run: TrainState, run_dir: Path, number: int) -> str:
    if signals.of_a_sweep():
        return f"stopped with its sweep at step {run.step}"
    how = f"go on with: ddpm-train trainer.resume={typed(run_dir)}"
    return f"stopped by {signals.name(number)} at step {run.step}; {how}"


def _requests(run: TrainState) -> Iterator[tuple[int | None, bool]]:
    """After each step, yield the signal that asked to stop, or None, and whether one asked to save.

    A signal reaches several processes at different steps, or only one of them. So each starts an all-reduce of its
    requests after one step and reads the result after the next: all act after the same step, and none waits except
    for processes that are a whole step behind.
    """
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


def _out_of_memory(run: TrainState) -> UserError:
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
