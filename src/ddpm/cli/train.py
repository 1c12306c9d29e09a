"""ddpm-train: compose and check a config, prepare the run's folder, train, and say where everything is."""

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.cli import app
from ddpm.config.schema import TrainConfig, to_dict
from ddpm.errors import UserError
from ddpm.io.files import reason, write_atomically
from ddpm.runtime import signals
from ddpm.runtime.console import Log, duration, figures, tell, typed
from ddpm.runtime.world import World, world

if TYPE_CHECKING:
    import torch

    from ddpm.data.dataset import Dataset
    from ddpm.runs import resume
    from ddpm.train.state import TrainState


def main() -> None:
    app.run("train", TrainConfig, train, sweep=_sweep, defaults=_before_typed)


def _sweep(overrides: list[str]) -> None:
    from ddpm.sweep.sweep import sweep

    sweep(overrides)


def train(config: TrainConfig) -> float:
    """The whole command for one checked config; returns the last val_eps_mse.

    One of several processes (torchrun) may be running this: then rank 0 alone decides where, from what, and writes.
    """
    from ddpm.runtime import device as runtime_device
    from ddpm.runtime.distributed import process_group
    from ddpm.sweep import gpu_locks
    from ddpm.train import tensorboard

    started, own = time.perf_counter(), world()
    tensorboard.check(config)
    _check_size(config, own)
    _set_up_torch(config.trainer.deterministic, config.trainer.precision == "tf32")
    lease = gpu_locks.take(config, tell)  # until the process ends, and its memory on the GPU is free
    device = runtime_device.device(lease.device if lease else config.device, own)
    with process_group(own, device):
        return _train_on(config, own, device, started)


def _train_on(config: TrainConfig, own: World, device: "torch.device", started: float) -> float:
    from ddpm import build
    from ddpm.runs import elastic, resume
    from ddpm.runs import run_dir as run_folder
    from ddpm.runtime.distributed import broadcast_object, raise_on_all_ranks, rank_zero_first
    from ddpm.train import state

    place, claim, source = resume.Place(None, False, []), None, None
    try:
        with raise_on_all_ranks(own):
            if own.first:
                place = elastic.again(config) or resume.place(config)
                if place.folder is not None:
                    claim = run_folder.claim(place.folder, config.overwrite, fresh=not place.in_place)
                source = resume.choose(place, config)
                if claim is not None and place.in_place and source is None:
                    run_folder.check_begun(claim.path)
        data = rank_zero_first(own, lambda: build.dataset(config.dataset, config.data_root))
        with raise_on_all_ranks(own):
            run = _prepare(config, data, device, source, own)
            figure = None if source is None else _done_already(place, source.path, run)
            if own.first and figure is None:
                claim = claim or run_folder.claim_new()
        run_dir, figure = broadcast_object(own, (claim.path if claim else Path(), figure))
        if figure is not None:
            return figure
        state.join(run, own)
        return _train_in(run_dir, run, data, source, place.in_place, started)
    finally:
        if claim is not None:
            claim.release()


def _check_size(config: TrainConfig, own: World) -> None:
    """Raises UserError where not every process would have an image in every part of every batch, or a GPU."""
    if own.size > 1 and config.gpus is not None:
        raise UserError(
            f"gpus={config.gpus}: torchrun gives each process a GPU of its own; CUDA_VISIBLE_DEVICES says which"
        )
    batch, parts = config.trainer.batch_size, config.trainer.accumulate
    if own.size > 1 and batch < own.size * parts:
        raise UserError(
            f"trainer.batch_size={batch}: it is shared by {own.size} processes with trainer.accumulate={parts} parts "
            f"each, and must be at least {own.size * parts}"
        )


def _prepare(
    config: TrainConfig, data: "Dataset", device: "torch.device", source: "resume.Source | None", own: World
) -> "TrainState":
    from ddpm.networks.kernels import group_norm
    from ddpm.runtime.device import slow_in_bf16
    from ddpm.train import checkpointing, environment, state

    run = state.prepare(config, data, device)
    if note := slow_in_bf16("trainer.precision", config.trainer.precision, device):
        run.notes.append(note)
    if (
        device.type == "cpu"
        and getattr(run.network, "own_group_norm", False)
        and (why := group_norm.missing())
    ):
        run.notes.append(f"GroupNorm is PyTorch's own, and takes longer: {why}")
    if source is not None:
        checkpointing.restore(run, source.path)
    elif own.first and config.trainer.init_from is not None:
        run.notes += checkpointing.init_from(run, config.trainer.init_from)
    run.environment.update(environment.commits())
    return run


def _train_in(
    run_dir: Path,
    run: "TrainState",
    data: "Dataset",
    source: "resume.Source | None",
    in_place: bool,
    started: float,
) -> float:
    """All that is written is written here, by rank 0."""
    from ddpm.cli.follow import follow
    from ddpm.runs import resume
    from ddpm.runs import run_dir as run_folder
    from ddpm.runs.run_dir import FAILED

    try:
        with signals.defer_signals():
            if not run.world.first:
                follow(run, data, run_dir, Log(None))
                return math.nan  # which only a sweep would ask for, and that has one process
            if source is None or not in_place:
                run_folder.clear(run_dir)
            run_folder.sweep(run_dir)
            for ended in ("result.json", FAILED):  # what they say is of a shorter run
                (run_dir / ended).unlink(missing_ok=True)
            log = _write_start(run, data, run_dir)
            for note in [*run.notes, *(resume.notes(source, run) if source else [])]:
                log.say(note)
            for note in run_folder.set_aside(run_dir, run.step) if source and in_place else []:
                log.say(note)
            follow(run, data, run_dir, log)
            figure = _write_end(run, run_dir, log, time.perf_counter() - started)
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {reason(error)}{_last_good(run_dir)}") from None
    except UserError as error:
        raise type(error)(f"{error}{_last_good(run_dir)}") from None
    number = signals.stop_requested()
    if number is not None:  # too late for this run, but a sweep must not go on
        log.say(f"{signals.name(number)} came when all was done")
        raise signals.Stopped(number, said=True)
    return figure


def _before_typed(overrides: list[str]) -> list[str]:
    """`trainer.resume=<run>`: what the run was told, before what is typed now."""
    from ddpm.runs import resume_overrides

    resume_overrides.check_lengths(overrides)
    return resume_overrides.before_typed(overrides)


def _set_up_torch(deterministic: bool, tf32: bool) -> None:
    import os

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from ddpm.runtime import device as runtime_device
    from ddpm.runtime import memory

    memory.keep_freed()
    runtime_device.set_up_cuda(tf32=tf32)
    # only where it is a change: to set it imports the compiler, which takes a second
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def _done_already(place: "resume.Place", source: Path, run: "TrainState") -> float | None:
    """The last figure of a run that is over. With auto, that is fine; a checkpoint that is named was meant to go on."""
    from ddpm.runs import run_dir as run_folder

    if run.step < run.max_steps:
        return None
    result = run_folder.read_result(source.parent.parent) if place.in_place else None
    if place.in_place and (result is None or result["step"] != run.step):
        return None  # the end is written once more
    if not (place.again or run.config.trainer.resume == "auto") or result is None:
        key = "max_epochs" if run.config.trainer.max_epochs is not None else "max_steps"
        raise UserError(f"{source} has done its {run.step} steps already: give trainer.{key} a larger number")
    tell(f"{source.parent.parent}: done already, {run.step:,} steps, val_eps_mse {result['val_eps_mse']:.4f}")
    return result["val_eps_mse"]


def _last_good(run_dir: Path) -> str:
    from ddpm.checkpoint import locate

    files = locate.of_run(run_dir)
    return f"; the last checkpoint is {files[0]}" if files else ""


def _write_start(run: "TrainState", data: "Dataset", run_dir: Path) -> Log:
    from omegaconf import OmegaConf

    from ddpm.diffusion.schedules import is_noise
    from ddpm.runs import elastic
    from ddpm.train import plots

    log = Log(run_dir / "train.log")
    write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(to_dict(run.config)).encode())
    about = {**run.environment, "seed": run.config.seed, **elastic.recorded()}
    write_atomically(run_dir / "environment.json", json.dumps(about, indent=2).encode())
    plots.draw_forward(data.train.images[:8], run.schedule, run_dir / "forward.png")
    if data.notice:
        log.say(data.notice)
    facts, parameters = run.facts, sum(p.numel() for p in run.network.parameters())
    log.say(
        f"{facts.name}: {len(data.train.images):,} training and {len(data.val.images):,} validation images, "
        f"{facts.image_size}×{facts.image_size}×{facts.channels}; "
        f"{run.config.model.name} with {parameters:,} parameters; "
        f"{run.config.schedule.name} schedule; {run.device}, {run.environment['precision']}"
        + (f", {run.world.size} processes" if run.world.size > 1 else "")
    )
    noisiest = run.schedule.at(run.schedule.num_timesteps - 1)
    if not is_noise(noisiest):
        log.say(
            f"warning: alpha_T is {noisiest.alpha:.2f}: the noisiest images still show the data, so sampling "
            "from pure noise will be off; raise schedule.num_timesteps or take another schedule"
        )
    return log


def _write_end(run: "TrainState", run_dir: Path, log: Log, seconds: float) -> float:
    """What the last checkpoint says goes into result.json: a run killed just before this needs only this again."""
    from ddpm.checkpoint.file import read_meta
    from ddpm.checkpoint.locate import of_run
    from ddpm.runs.run_dir import RUN_FILES
    from ddpm.train import plots
    from ddpm.train.metrics_file import VALIDATED

    plots.plot_loss(run_dir / "metrics.jsonl", run_dir / "loss.png")
    plots.plot_schedule(run.schedule, run_dir / "schedule.png")
    final = of_run(run_dir)[0]
    last = read_meta(final)[0].figures
    if not last.keys() >= set(VALIDATED):
        raise UserError(f"{final} holds no figures of its last step: give trainer.max_steps a larger number")
    result = {"step": run.step, **{key: last[key] for key in VALIDATED}, "seconds": seconds}
    write_atomically(run_dir / "result.json", json.dumps(result).encode())
    log.say(f"done in {duration(seconds)}: {figures(last)}")
    written = [name for name in RUN_FILES if (run_dir / name).exists()]
    log.say(f"{run_dir}: {' '.join(written)} samples/ checkpoints/")
    log.say(f"next: ddpm-sample ckpt={typed(run_dir)}")
    return last["val_eps_mse"]
