"""Run ddpm-train for a checked config: open the run, set up the training, train, and write the results."""

import json
import math
import time

from omegaconf import OmegaConf

from ddpm import build
from ddpm.checkpoint.file import read_meta
from ddpm.checkpoint.locate import of_run
from ddpm.cli.train_progress import show_progress
from ddpm.config.schema import TrainConfig, to_dict
from ddpm.data.dataset import Dataset, in_order_of
from ddpm.data.info import listed
from ddpm.diffusion.schedules import is_noise
from ddpm.errors import UserError
from ddpm.io.files import try_to_draw, write_atomically
from ddpm.runs import resume
from ddpm.runs.open_run import OpenRun, notes, open_run
from ddpm.runs.run_dir import RUN_FILES
from ddpm.runtime import signals
from ddpm.runtime.console import Log, duration, figures, typed
from ddpm.runtime.session import open_session
from ddpm.runtime.world import World, world
from ddpm.train import interruptible, loggers, plots
from ddpm.train.metrics_file import VALIDATED
from ddpm.train.setup import set_up
from ddpm.train.state import TrainState


def train(config: TrainConfig) -> float:
    """Train by one checked config, in one of several processes (torchrun) or alone. Returns the last val_eps_mse.

    Rank 0 chooses the folder and the checkpoint to go on from, and writes; the others return nan.
    """
    started, own, trainer = time.perf_counter(), world(), config.trainer
    loggers.check(config.logger)
    _check_size(config, own)
    with (
        open_session(
            own,
            config.device,
            gpus=config.gpus,
            sharing=config.jobs_per_gpu,
            deterministic=trainer.deterministic,
            tf32=trainer.precision == "tf32",
        ) as session,
        open_run(config, own) as run,
    ):
        data = session.rank_zero_first(lambda: build.dataset(config.dataset, config.data_root))
        data = in_order_of(data, run.class_names)
        state = set_up(config, data, session, run.source.path if run.source else None)
        if (figure := run.settle(state)) is not None:
            return figure
        with run.name_last_checkpoint(), signals.defer_signals():
            log = _start(run, state, data)
            show_progress(interruptible.fit(state, data, run.path), state, log)
            figure = _finish(run, state, log, time.perf_counter() - started) if own.first else math.nan
        if own.first and (number := signals.stop_requested()) is not None:
            # too late for this run, but a sweep must end
            log.say(f"{signals.name(number)} came when all was done")
            raise signals.Stopped(number, said=True)
        return figure


def _check_size(config: TrainConfig, own: World) -> None:
    """Raise UserError where a process would lack an image in a part of a batch, or a GPU."""
    if own.size > 1 and config.gpus is not None:
        raise UserError(f"gpus={config.gpus}: under torchrun CUDA_VISIBLE_DEVICES chooses; leave it out")
    resume.check_batch(config.trainer, own.size)


def _start(run: OpenRun, state: TrainState, data: Dataset) -> Log:
    """Write config.yaml, environment.json and forward.png, and say what begins. Rank 0 alone writes and speaks."""
    if not state.world.first:
        return Log(None)
    moved = run.begin(state.step)
    # first, as it shows the other files to be a run's
    write_atomically(run.path / "config.yaml", OmegaConf.to_yaml(to_dict(state.config)).encode())
    log = Log(run.path / "train.log")
    about = {**state.environment, "seed": state.config.seed}
    write_atomically(run.path / "environment.json", json.dumps(about, indent=2).encode())
    shown = (data.train.images[:8], state.schedule, run.path / "forward.png")
    for line in [
        *try_to_draw(plots.draw_forward, *shown),
        *_describe(state, data),
        *state.notes,
        *(notes(run.source, state) if run.source else []),
        *moved,
    ]:
        log.say(line)
    return log


def _describe(state: TrainState, data: Dataset) -> list[str]:
    """Say what is trained on what; warn where the schedule does not end in noise."""
    facts, parameters = state.facts, sum(p.numel() for p in state.network.parameters())
    lines = data.notice.splitlines()
    lines.append(
        f"{facts.name}: {len(data.train.images):,} training and {len(data.val.images):,} validation images, "
        f"{facts.image_size}×{facts.image_size}×{facts.channels}; "
        f"{state.config.model.name} with {parameters:,} parameters; "
        f"{state.config.schedule.name} schedule; {state.device}, {state.environment['precision']}"
        + (f", {state.world.size} processes" if state.world.size > 1 else "")
    )
    if facts.class_names:
        lines.append(f"{facts.num_classes:,} classes: {listed(facts.class_names)}")
    noisiest = state.schedule.at(state.schedule.num_timesteps - 1)
    if not is_noise(noisiest):
        alpha = f"warning: alpha_T is {noisiest.alpha:.2f}, but samplers start from pure noise, where it is 0"
        lines.append(f"{alpha}: raise schedule.num_timesteps or take another schedule")
    return lines


def _finish(run: OpenRun, state: TrainState, log: Log, seconds: float) -> float:
    """Write result.json, then the plots, and return val_eps_mse.

    The figures are the last checkpoint's: a run killed just before this needs only this again.
    """
    final = of_run(run.path)[0]
    last = read_meta(final)[0].figures
    if not last.keys() >= set(VALIDATED):
        raise UserError(f"{final} holds no figures of its last step: give trainer.max_steps a larger number")
    result = {"step": state.step, **{key: last[key] for key in VALIDATED}, "seconds": seconds}
    write_atomically(run.path / "result.json", json.dumps(result).encode())
    for warning in (
        *try_to_draw(plots.plot_loss, run.path / "metrics.jsonl", run.path / "loss.png"),
        *try_to_draw(plots.plot_schedule, state.schedule, run.path / "schedule.png"),
    ):
        log.say(warning)
    log.say(f"done in {duration(seconds)}: {figures(last)}")
    written = [name for name in RUN_FILES if (run.path / name).exists()]
    log.say(f"{run.path}: {' '.join(written)} samples/ checkpoints/")
    log.say(f"next: ddpm-sample ckpt={typed(run.path)}")
    return last["val_eps_mse"]
