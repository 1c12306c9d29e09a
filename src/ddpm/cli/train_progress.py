"""Show a training: lines on the console and in train.log, and a bar on a terminal."""

import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from ddpm.config.choices import CONFIG_DIR, read_yaml
from ddpm.runtime.console import Log, duration, figures
from ddpm.train.loop import Progress
from ddpm.train.state import TrainState


def show_progress(training: Iterator[Progress], run: TrainState, log: Log) -> None:
    """Run the training to its end, and show each step. Raises OSError where train.log cannot be written."""
    first = last = run.step
    clock = time.perf_counter()
    hidden, records = log.path is None or not sys.stderr.isatty(), 0
    with tqdm(
        total=run.max_steps, initial=first, unit="step", disable=hidden, dynamic_ncols=True, leave=False
    ) as bar:
        for progress in training:
            if progress.step > last:
                bar.update()
                if progress.step == first + 1:  # which also allocated and picked algorithms
                    clock = time.perf_counter()
                elif progress.step == first + 4 and run.device.type == "cpu":
                    log.say(estimate(run, (time.perf_counter() - clock) / 3))
            last = progress.step
            if progress.note:
                log.say(progress.note)
            if record := progress.record:
                short = f"loss {record['loss']:.4f}, {record['images_per_second']:.0f} images/s"
                bar.set_postfix_str(short)
                if hidden or "val_loss" in record:
                    line = f"step {record['step']:>6}/{run.max_steps}  {short.replace(',', ' ')}"
                    log.say(line + (f"  {figures(record)}" if "val_loss" in record else ""))
                records += 1
                if (
                    records == 2 and run.device.type == "cuda"
                ):  # whose first steps are slower, and only then waited for
                    log.say(estimate(run, run.config.trainer.batch_size / record["images_per_second"]))


def estimate(run: TrainState, seconds_per_step: float) -> str:
    """Return how long the rest will take and, if that is long on a CPU, a shorter experiment."""
    seconds = seconds_per_step * (run.max_steps - run.step)
    text = f"about {duration(seconds)} for {run.max_steps - run.step:,} more steps on this {run.device.type}"
    short = CONFIG_DIR / "experiment" / f"{run.facts.name}_cpu.yaml"
    slow = run.device.type == "cpu" and seconds > 900 and short.exists()
    if slow and run.max_steps > read_yaml(short)["trainer"]["max_steps"]:  # else this is the short one
        text += f"; experiment={short.stem} is the short one"
    return text
