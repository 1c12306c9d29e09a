"""ddpm-train: compose and check a config, prepare the run's folder, train, and say where everything is."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.cli import hydra_app
from ddpm.config import CONFIG_DIR, TrainConfig, check, to_dict
from ddpm.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from ddpm.datasets.types import Dataset
    from ddpm.runs import Run
    from ddpm.training import Progress

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "train.log",
    "result.json",
    "loss.png",
    "forward.png",
    "schedule.png",
)
RUN_FOLDERS = ("checkpoints", "samples")
MUST_MATCH = ("dataset", "model", "schedule", "objective", "seed")  # between a run and its resumption


def main() -> None:
    hydra_app.run("train", TrainConfig, train, sweep_task=_sweep_job, defaults=_before_typed)


def train(config: TrainConfig) -> float:
    """The whole command for one checked config; returns the last val_eps_mse."""
    from ddpm import build

    started = time.perf_counter()
    _set_up_torch(config.trainer.deterministic)
    device = build.device(config.device)
    wanted_dir, source = _where(config)
    data = build.dataset(config.dataset, config.data_root)
    run = _prepare(config, data, device, source)
    run_dir = _make_folder(wanted_dir, config.overwrite, resumed=source is not None)
    log = _Log(run_dir / "train.log")
    if data.notice:
        log.say(data.notice)
    _write_start(run, data, run_dir, log)
    _follow(run, data, run_dir, log)
    return _write_end(run, run_dir, log, time.perf_counter() - started)


def _sweep_job(raw: Any) -> float:
    """One job of a multirun, in the folder that Hydra made for it."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(raw, resolve=True)
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items()}
    hydra = HydraConfig.get()
    print(f"\njob {hydra.job.num}: {hydra.job.override_dirname or 'defaults'}", flush=True)
    try:
        return train(check(TrainConfig, {**settings, "run_dir": hydra.runtime.output_dir}))
    except UserError as error:
        print(f"ddpm-train: {error}", file=sys.stderr, flush=True)
        raise hydra_app.JobFailed(str(error)) from None


def _before_typed(overrides: list[str]) -> list[str]:
    """`trainer.resume=<run>`: what the run was told, before what is typed now."""
    from ddpm import checkpoint

    typed_lengths = [
        hydra_app.typed_value(overrides, f"trainer.{key}") for key in ("max_epochs", "max_steps")
    ]
    if None not in typed_lengths and "null" not in typed_lengths:
        raise UserError(
            "trainer.max_epochs and trainer.max_steps both say how long to train: give one of them"
        )
    typed = hydra_app.typed_value(overrides, "trainer.resume")
    if typed in (None, "auto", "null"):
        return []
    meta, _ = checkpoint.read_meta(checkpoint.find(str(typed)))
    config = check(TrainConfig, meta.config)
    return hydra_app.as_overrides(
        {k: v for k, v in to_dict(config).items() if k not in ("run_dir", "overwrite")}
    )


def _set_up_torch(deterministic: bool) -> None:
    import os

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def _where(config: TrainConfig) -> tuple[str | None, Path | None]:
    """The run folder, and the checkpoint to go on from, if any."""
    from ddpm import checkpoint

    resume = config.trainer.resume
    if resume is None:
        return config.run_dir, None
    if resume == "auto":
        if config.run_dir is None:
            raise UserError("trainer.resume=auto needs run_dir=…, to know which run to go on with")
        files = checkpoint.saved_steps(Path(config.run_dir))
        return config.run_dir, files[-1] if files else None
    source = checkpoint.find(resume)
    return config.run_dir or str(source.parent.parent), source


def _prepare(config: TrainConfig, data: "Dataset", device: Any, source: Path | None) -> "Run":
    from ddpm import checkpoint, runs

    if source is None:
        return runs.prepare(config, data, device)
    meta, tensors = checkpoint.load(source)
    was, now = to_dict(check(TrainConfig, meta.config)), to_dict(config)
    changed = [
        f"{key} was {_brief(a)}, is {_brief(b)}"
        for part in MUST_MATCH
        for key, a, b in _differences(part, was[part], now[part])
    ]
    if changed:
        raise CheckpointError(f"cannot resume {source}: " + "; ".join(changed))
    run = runs.prepare(config, data, device)
    if meta.step >= run.max_steps:
        raise UserError(
            f"{source} has done its {meta.step} steps already: give trainer.max_steps a larger number"
        )
    runs.restore(run, tensors, meta.step)
    return run


def _differences(path: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was | now:
            yield from _differences(f"{path}.{key}", was.get(key), now.get(key))
    elif was != now:
        yield path, was, now


def _brief(value: Any) -> str:
    return json.dumps(value) if len(json.dumps(value)) < 60 else "…"


def _make_folder(name: str | None, overwrite: bool, resumed: bool) -> Path:
    if name is None:
        return hydra_app.run_folder("outputs/train")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed and any(folder.iterdir()):
            if not overwrite:
                raise UserError(
                    f"{folder} is not empty: overwrite=true replaces the run in it, "
                    f"trainer.resume={folder} goes on with it"
                )
            if not (folder / "config.yaml").exists():
                raise UserError(
                    f"{folder} holds other things than a run: overwrite=true does not delete those"
                )
            for file in RUN_FILES:
                (folder / file).unlink(missing_ok=True)
            for part in RUN_FOLDERS:
                shutil.rmtree(folder / part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot use run_dir={folder}: {error.strerror}") from None
    return folder


class _Log:
    """Lines for the screen and for train.log; above the progress bar, if there is one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text)
        sys.stdout.flush()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def _write_start(run: "Run", data: "Dataset", run_dir: Path, log: _Log) -> None:
    from omegaconf import OmegaConf

    from ddpm import plots
    from ddpm.schedules import is_noise

    OmegaConf.save(OmegaConf.create(to_dict(run.config)), run_dir / "config.yaml")
    plots.draw_forward(data.train.images[:8], run.schedule, run_dir / "forward.png")
    facts, parameters = run.facts, sum(p.numel() for p in run.network.parameters())
    log.say(
        f"{facts.name}: {len(data.train.images):,} training and {len(data.val.images):,} validation images, "
        f"{facts.image_size}×{facts.image_size}×{facts.channels}; "
        f"{run.config.model.name} with {parameters:,} parameters; "
        f"{run.config.schedule.name} schedule; {run.device}"
    )
    noisiest = run.schedule.at(run.schedule.num_timesteps - 1)
    if not is_noise(noisiest):
        log.say(
            f"warning: alpha_T is {noisiest.alpha:.2f}: the noisiest images still show the data, so sampling "
            "from pure noise will be off; raise schedule.num_timesteps or take another schedule"
        )
    if run.step:
        log.say(f"going on from step {run.step:,}")


def _follow(run: "Run", data: "Dataset", run_dir: Path, log: _Log) -> None:
    """The training with its bar (on a terminal) or plain lines (elsewhere)."""
    from tqdm import tqdm

    from ddpm.training import fit

    first = run.step
    bar = tqdm(
        total=run.max_steps, initial=first, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
    )
    clock = time.perf_counter()
    with bar:
        for progress in fit(run, data, run_dir):
            bar.update()
            if progress.step == first + 1:
                clock = time.perf_counter()  # the first step also compiles, allocates and picks algorithms
            elif progress.step == first + 4:
                log.say(_estimate(run, (time.perf_counter() - clock) / 3))
            if progress.record:
                r = progress.record
                bar.set_postfix_str(f"loss {r['loss']:.4f}, {r['images_per_second']:.0f} images/s")
                if bar.disable or "val_loss" in r:
                    log.say(_line(progress, run.max_steps))


def _estimate(run: "Run", seconds_per_step: float) -> str:
    seconds = seconds_per_step * (run.max_steps - run.step)
    text = f"about {_duration(seconds)} for {run.max_steps - run.step:,} more steps on this {run.device.type}"
    short = f"{run.facts.name}_cpu"
    if run.device.type == "cpu" and seconds > 900 and (CONFIG_DIR / "experiment" / f"{short}.yaml").exists():
        text += f"; experiment={short} is the short one"
    return text


def _line(progress: "Progress", max_steps: int) -> str:
    r = progress.record or {}
    line = f"step {progress.step:>6}/{max_steps}  loss {r['loss']:.4f}  {r['images_per_second']:.0f} images/s"
    if "val_loss" in r:
        line += "  " + _figures(r)
    return line


def _figures(r: dict[str, float]) -> str:
    return ", ".join(f"{key} {r[key]:.4f} ± {r[key + '_error']:.4f}" for key in ("val_loss", "val_eps_mse"))


def _write_end(run: "Run", run_dir: Path, log: _Log, seconds: float) -> float:
    from ddpm import plots
    from ddpm.checkpoint import write_atomically

    plots.plot_loss(run_dir / "metrics.jsonl", run_dir / "loss.png")
    plots.plot_schedule(run.schedule, run_dir / "schedule.png")
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    result = {
        key: last[key] for key in ("step", "val_loss", "val_loss_error", "val_eps_mse", "val_eps_mse_error")
    }
    write_atomically(run_dir / "result.json", json.dumps({**result, "seconds": seconds}).encode())
    log.say(f"done in {_duration(seconds)}: {_figures(last)}")
    log.say(
        f"{run_dir}: config.yaml metrics.jsonl train.log loss.png forward.png schedule.png samples/ checkpoints/"
    )
    log.say(f"next: ddpm-sample ckpt={run_dir}")
    return float(last["val_eps_mse"])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
