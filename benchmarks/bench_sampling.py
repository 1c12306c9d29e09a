"""What a sampler costs on top of the network: time per step over the bare network calls in it.

    python benchmarks/bench_sampling.py                 every sampler, unet_small, batch 64 at 28×28
    python benchmarks/bench_sampling.py --precision bf16 experiment=mnist_cpu

Every step and as many bare calls of the same network, on the same batch and under the same autocast, take turns in the
order ABBA. Two figures of each sampler: the time of a run spent outside of the network, as a part of that inside, with
the range over rounds; and how much longer a step takes than the bare calls, the median of the pairwise ratios with its
quartiles, which other work on the machine blurs more. At the end, what a step's random numbers cost, which belong to
each image. Further arguments are ddpm-train's.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from timing import machine, save, seconds

from ddpm.api import Model
from ddpm.build import network, schedule
from ddpm.config.choices import Component, choices, choose_sampler
from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.data.info import DatasetInfo
from ddpm.runtime import memory
from ddpm.runtime.randomness import normal
from ddpm.sample.model import PRECISIONS, Guidance, denoiser, labels
from ddpm.sample.sampling import draw, drawing, finite


class Costs(NamedTuple):
    """Seconds of each step of a run, of the network calls in it, and of bare ones. The first has the set-up in it."""

    step: list[float]
    inside: list[float]
    bare: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path)
    parser.add_argument("overrides", nargs="*", default=["dataset=mnist", "model=unet_small"])
    options = parser.parse_args()
    memory.keep_freed()  # as the commands do
    device = torch.device(options.device)
    model = make_model(options.overrides, options.precision, device)
    about = machine(device)
    print(f"{about.get('gpu', about['cpu'])}, {about['threads']} threads, torch {about['torch']}")
    print(
        f"{' '.join(options.overrides)}, {options.precision}, batch {options.batch_size}, {options.steps} steps, "
        f"{options.rounds} rounds"
    )
    figures: dict[str, list[dict[str, list[float]]]] = {}
    for name in choices("sampler"):
        sampler = choose_sampler(name, {"num_steps": options.steps})
        with drawing(model):
            calls = evaluations(model, sampler)
            rounds = [run(model, sampler, options.batch_size, calls) for _ in range(options.rounds + 1)][1:]
        print(f"{name:<13} {sum(calls):>3} evaluations, {described(rounds, sum(calls))}", flush=True)
        figures[name] = [costs._asdict() for costs in rounds]
    index = torch.arange(options.batch_size, device=device)
    noise, plain = (
        statistics.median(seconds(work, device) for _ in range(50))
        for work in (
            lambda: normal(0, "sampler", 0, index, model.shape),
            lambda: torch.randn(options.batch_size, *model.shape, device=device),
        )
    )
    print(f"noise of one step: {1000 * noise:.2f} ms by image index, torch.randn {1000 * plain:.2f} ms")
    if options.save:
        asked = {key: value for key, value in vars(options).items() if key != "save"}
        save(options.save, asked, figures, device)


def make_model(overrides: list[str], precision: str, device: torch.device) -> Model:
    config = check(TrainConfig, compose("train", overrides))
    facts = DatasetInfo("mnist", 1, 28, 10, tuple("0123456789"), 256)
    net = network(config.model, config.objective, facts).to(device, memory_format=torch.channels_last).eval()
    return Model(net, schedule(config.schedule), config, facts, device, precision=PRECISIONS[precision])


def evaluations(model: Model, sampler: Component) -> list[int]:
    """Of the network, in each step."""
    index = torch.zeros(1, dtype=torch.int64, device=model.device)
    denoise = denoiser(model, sampler, labels(model, None, index, Guidance()), Guidance())
    so_far = [0, *(denoise.evaluations for _ in draw(model, sampler, denoise, index, 0))]
    return [after - before for before, after in pairwise(so_far)]


def run(model: Model, sampler: Component, batch_size: int, calls: list[int]) -> Costs:
    """One run of a sampler, its steps taking turns with bare calls."""
    device, costs = model.device, Costs([], [], [])
    index = torch.arange(batch_size, device=device)
    y = labels(model, None, index, Guidance())
    x, t = normal(0, "x", 0, index, model.shape), torch.full((batch_size,), 500.0, device=device)
    denoise = denoiser(model, sampler, y, Guidance())
    steps = finite(draw(model, sampler, denoise, index, 0), index.cpu())
    low = model.precision != torch.float32

    def step() -> None:
        with timed_calls(model) as spent:
            costs.step.append(seconds(lambda: next(steps), device))
        costs.inside.append(sum(spent))

    def bare(n: int) -> None:
        with torch.autocast(device.type, model.precision, enabled=low):
            for _ in range(n):
                model.network(x, t, y)

    for k, n in enumerate(calls):
        if k % 2 == 0:
            step()
        costs.bare.append(seconds(lambda n=n: bare(n), device))
        if k % 2 == 1:
            step()
    return costs


@contextmanager
def timed_calls(model: Model) -> Iterator[list[float]]:
    """Gives a list that gets the seconds of each call of the network in the meantime."""
    spent = list[float]()

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    def begin(*_: object) -> None:
        spent.append(-now())

    def end(*_: object) -> None:
        spent[-1] += now()

    hooks = model.network.register_forward_pre_hook(begin), model.network.register_forward_hook(end)
    yield spent
    for hook in hooks:
        hook.remove()


def described(rounds: list[Costs], calls: int) -> str:
    bare = statistics.median(sum(costs.bare) for costs in rounds) / calls
    outside = [sum(costs.step) / sum(costs.inside) - 1 for costs in rounds]
    longer = [a / b - 1 for costs in rounds for a, b in zip(costs.step, costs.bare, strict=True)]
    low, middle, high = statistics.quantiles(longer, n=4)
    return (
        f"{1000 * bare:7.1f} ms each; outside of the network {100 * statistics.median(outside):.2f} % "
        f"({100 * min(outside):.2f} to {100 * max(outside):.2f}), "
        f"over bare calls {100 * middle:+.2f} % ({100 * low:+.2f} to {100 * high:+.2f})"
    )


if __name__ == "__main__":
    main()
