"""What each trick of a recipe gains: the time of a training step with it and without.

python benchmarks/bench_recipe.py [--recipe mnist_cpu] [--rounds 3] [--steps 20]

Every variant runs in a process of its own, one after the other, all of them again in each round; quoted is the median
over rounds of the median step, and its ratio to the recipe as it is. Data: $DDPM_DATA.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

VARIANTS = {
    "as it is": [],
    "memory given back": ["--give-back"],
    "AdamW": ["optimizer=adamw"],
    "float32": ["trainer.precision=fp32"],
    "channels first": ["trainer.channels_last=false"],
}
WARM_UP = 4


def step_seconds(recipe: str, steps: int, overrides: list[str]) -> float:
    """The median step of one process, this one."""
    from ddpm import build
    from ddpm.config import hydra
    from ddpm.config.schema import TrainConfig, check
    from ddpm.data.batches import Batches
    from ddpm.runtime import device as runtime_device
    from ddpm.runtime import memory
    from ddpm.train import state
    from ddpm.train.step import train_step

    if "--give-back" not in overrides:
        memory.keep_freed()
    typed = [f"experiment={recipe}", *(override for override in overrides if "=" in override)]
    config = check(TrainConfig, hydra.compose("train", typed))
    data, device = build.dataset(config.dataset, config.data_root), runtime_device.device(config.device)
    run = state.prepare(config, data, device)
    batches, times = Batches(data.train, config.trainer.batch_size, config.seed, device), list[float]()
    for step in range(WARM_UP + steps):
        batch = batches.batch(step)
        begun = time.perf_counter()
        run.loss_sum += train_step(run, *batch)[0]
        run.loss_sum.item()  # a GPU has then done it
        times.append(time.perf_counter() - begun)
        run.step += 1
    return statistics.median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="mnist_cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(step_seconds(arguments.recipe, arguments.steps, VARIANTS[arguments.one])))
        return
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name, seconds in found.items():
            line = [sys.executable, __file__, "--recipe", arguments.recipe, "--steps", str(arguments.steps)]
            out = subprocess.run([*line, "--one", name], check=True, capture_output=True, text=True).stdout
            seconds.append(json.loads(out.splitlines()[-1]))
    whole = statistics.median(found["as it is"])
    for name, seconds in found.items():
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(
            f"{name:<18} {1e3 * middle:6.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f})  {middle / whole:.2f}"
        )


if __name__ == "__main__":
    main()
