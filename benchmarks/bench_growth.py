"""How the time of a training step, and of a network call in sampling, grows with batch, image size, width and T.

    python benchmarks/bench_growth.py                      float32, about five minutes
    python benchmarks/bench_growth.py --precision bf16

One factor at a time is varied from unet_small at 28×28 and batch 32, on random images. All settings take turns, forth
and back, in rounds that begin until --seconds are over. Quoted are medians (and ranges), the arithmetic of a step
(forward and backward, as torch's FlopCounterMode knows it) and the time for it, and exponents: the slope in the
factor's logarithm by least squares, ± its standard error; of the image size in pixels. What takes longer for the same
arithmetic than the setting above it, in most rounds, is marked. For T also the set-up of schedule and objective.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from timing import machine, save, seconds
from torch.utils.flop_counter import FlopCounterMode

from ddpm import build
from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.data.batches import Batches
from ddpm.data.dataset import Dataset, Split
from ddpm.data.info import DatasetInfo
from ddpm.evaluate.table import aligned
from ddpm.runtime import memory
from ddpm.sample.model import PRECISIONS, Model
from ddpm.sample.sampling import drawing
from ddpm.train.state import prepare
from ddpm.train.step import train_step

CHANNELS = (32, 64, 64)  # of unet_small
SLACK = 0.05  # of the time for the same arithmetic: what is not more counts as linear


@dataclass(frozen=True)
class Setting:
    batch: int = 32
    image_size: int = 28
    width: int = 1  # factor of all channels
    T: int = 1000


BASE = Setting()
VARIED = {
    "batch": (8, 16, 32, 64, 128, 256),
    "image_size": (28, 32, 64),
    "width": (1, 2, 4),
    "T": (10, 100, 1000, 4000),
}


class Work(NamedTuple):
    """A training step and a network call of one setting; both give the seconds they took."""

    step: Callable[[], float]
    call: Callable[[], float]
    gflop: float  # of a step


class Times(NamedTuple):
    """Seconds, one of each round."""

    step: list[float]
    call: list[float]


class Slope(NamedTuple):
    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--factors", nargs="+", choices=VARIED, default=list(VARIED))
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    memory.keep_freed()  # as the commands do
    device = torch.device(options.device)
    about = machine(device)
    print(f"{about.get('gpu', about['cpu'])}, {about['threads']} threads, torch {about['torch']}")
    settings = {
        factor: [replace(BASE, **{factor: value}) for value in VARIED[factor]] for factor in options.factors
    }
    works = {
        setting: make(setting, options.precision, device) for each in settings.values() for setting in each
    }
    times = measured(works, options.seconds)
    print(f"{options.precision}, medians of {len(times[BASE].step)} rounds")
    for factor, varied in settings.items():
        print("\n".join(["", *report(factor, varied, works, times)]))
    set_up = {T: set_up_seconds(T, device) for T in VARIED["T"]} if "T" in settings else {}
    for T, spent in set_up.items():
        print(f"schedule and objective for T = {T}: {1000 * spent:.2f} ms, once a run")
    if options.save:
        rows = [{**vars(each), "gflop": works[each].gflop, **times[each]._asdict()} for each in works]
        asked = {key: value for key, value in vars(options).items() if key != "save"}
        save(options.save, asked, {"settings": rows, "set_up": set_up}, device)


def composed(setting: Setting, precision: str) -> TrainConfig:
    channels = ",".join(str(setting.width * width) for width in CHANNELS)
    overrides = [
        "dataset=mnist",
        "model=unet_small",
        f"model.channels=[{channels}]",
        f"schedule.num_timesteps={setting.T}",
        f"trainer.batch_size={setting.batch}",
        f"trainer.precision={precision}",
    ]
    config: TrainConfig = check(TrainConfig, compose("train", overrides))
    return config


def make(setting: Setting, precision: str, device: torch.device) -> Work:
    config, size = composed(setting, precision), setting.image_size
    images = torch.randint(0, 256, (512, 1, size, size), dtype=torch.uint8)
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    data = Dataset(DatasetInfo("mnist", 1, size, 10, tuple("0123456789"), 256), split, split, split)
    run, batches = prepare(config, data, device), Batches(split, setting.batch, 0, device)

    def update() -> None:
        train_step(run, *batches.batch(run.step))
        run.step += 1

    low = PRECISIONS[precision]
    model = Model(run.network, run.schedule, config, run.facts, device, precision=low)
    x = torch.randn(setting.batch, *model.shape, device=device)
    t = torch.full((setting.batch,), setting.T / 2, device=device)

    def evaluate() -> None:
        with torch.autocast(device.type, low, enabled=low != torch.float32):
            model.network(x, t, None)

    def call() -> float:
        model.network.eval()
        with drawing(model):
            evaluate()  # the first one casts the weights, as in sampling
            return seconds(evaluate, device)

    with FlopCounterMode(display=False) as counter:
        update()  # and all that the first one makes
    return Work(lambda: seconds(update, device), call, counter.get_total_flops() / 1e9)


def measured(works: Mapping[Setting, Work], budget: float) -> dict[Setting, Times]:
    """Whole rounds, the last begun within `budget` seconds."""
    times, order, begun = {setting: Times([], []) for setting in works}, list(works), time.perf_counter()
    while not times[BASE].step or time.perf_counter() - begun < budget:
        for setting in order:
            times[setting].step.append(works[setting].step())
            times[setting].call.append(works[setting].call())
        order.reverse()
    return times


def report(
    factor: str,
    varied: Sequence[Setting],
    works: Mapping[Setting, Work],
    times: Mapping[Setting, Times],
) -> list[str]:
    """The table of one factor, and its exponents."""
    head = [factor, "step", "(range)", "images/s", "GFLOP", "ms/GFLOP", "", "network call", "(range)"]
    lines, before = [head], None
    for setting in varied:
        rates = [1000 * step / works[setting].gflop for step in times[setting].step]
        lines.append(
            [
                str(getattr(setting, factor)),
                *_timed(times[setting].step),
                f"{setting.batch / statistics.median(times[setting].step):.1f}",
                f"{works[setting].gflop:.2f}",
                f"{statistics.median(rates):.2f}",
                _marked(rates, before) if before else "",
                *_timed(times[setting].call),
            ]
        )
        before = rates
    steps, calls = ([statistics.median(times[each][k]) for each in varied] for k in range(2))
    gflop = [works[each].gflop for each in varied]
    size = [getattr(each, factor) ** (2 if factor == "image_size" else 1) for each in varied]
    slopes = {"step": slope(size, steps), "arithmetic": slope(size, gflop), "call": slope(size, calls)}
    text = "exponents: " + ", ".join(f"{name} {each}" for name, each in slopes.items())
    if len(set(gflop)) > 1:
        text += f"; of the step in its arithmetic {slope(gflop, steps)}"
    return [*aligned(lines), text]


def _marked(rates: Sequence[float], before: Sequence[float]) -> str:
    """Where three of four rounds take more than SLACK longer for the same arithmetic than the setting above."""
    growth = sorted(a / b - 1 for a, b in zip(rates, before, strict=True))
    return (
        f"worse than linear: +{100 * statistics.median(growth):.0f} %"
        if growth[len(growth) // 4] > SLACK
        else ""
    )


def _timed(values: Sequence[float]) -> list[str]:
    low, high = 1000 * min(values), 1000 * max(values)
    return [f"{1000 * statistics.median(values):.1f} ms", f"({low:.1f} to {high:.1f})"]


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Of log y over log x."""
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    line = statistics.linear_regression(log_x, log_y)
    off = sum((b - line.intercept - line.slope * a) ** 2 for a, b in zip(log_x, log_y, strict=True))
    middle = statistics.fmean(log_x)
    return Slope(line.slope, math.sqrt(off / (len(x) - 2) / sum((a - middle) ** 2 for a in log_x)))


def set_up_seconds(T: int, device: torch.device) -> float:
    config = composed(replace(BASE, T=T), "fp32")

    def set_up() -> None:
        build.objective(config.objective, build.schedule(config.schedule), device)

    return statistics.median(seconds(set_up, device) for _ in range(9))


if __name__ == "__main__":
    main()
