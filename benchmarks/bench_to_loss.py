"""How long until a loss: wall-clock of a whole `ddpm-train` that ends at it, beside the notebook's recipe.

    python benchmarks/bench_to_loss.py                            three seeds of experiment=mnist_notebook_loss
    python benchmarks/bench_to_loss.py trainer.max_steps=600      further arguments are for our side

The loss is that of introductory notebooks: mean squared error in eps at uniform t on MNIST's test images (T = 1000,
linear). Ours is the console command, start-up and checkpoint included; that its loss is measured afterwards is not
counted. The notebook's recipe, experiment=seed_notebook, would run for hours: before each of ours it takes steps for
its share of --notebook-seconds, and the median of a step is extrapolated to its 60 epochs, without any start-up.
Exits with 1 where a seed ends above --target. Data: $DDPM_DATA.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import machine, save, seconds

import ddpm
from ddpm import build
from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.data.batches import Batches
from ddpm.data.dataset import Dataset
from ddpm.evaluate.metrics.likelihood import eps_loss
from ddpm.runtime import memory
from ddpm.train.state import prepare
from ddpm.train.step import train_step

WARM_UP = 3  # steps
NOTEBOOK_STEPS = 60 * 469  # of 128 images: epochs of all 60,000, of which ours keeps some for validation


class Ours(NamedTuple):
    """One run of ours: what the command took, and what the averaged weights reached."""

    seed: int
    seconds: float
    steps: int
    loss: float
    error: float  # its standard error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=float, default=0.0258)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--notebook-seconds", type=float, default=60)
    parser.add_argument("--draws", type=int, default=40_000, help="network evaluations for a loss")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    memory.keep_freed()  # as the command does
    device = torch.device(options.device)
    about = machine(device)
    print(f"{about.get('gpu', about['cpu'])}, {about['threads']} threads, torch {about['torch']}")

    config = check(TrainConfig, compose("train", ["experiment=seed_notebook"]))
    data = build.dataset(config.dataset, config.data_root)
    step = notebook(config, data, device)
    for _ in range(WARM_UP):
        step()
    notebook_steps, ours = list[float](), list[Ours]()
    for seed in options.seeds:
        until = time.perf_counter() + options.notebook_seconds / len(options.seeds)
        while not notebook_steps or time.perf_counter() < until:
            notebook_steps.append(step())
        ours.append(trained(seed, options, data))
        print(f"seed {seed}: {described(ours[-1], options.target)}", flush=True)
    notebook_seconds = statistics.median(notebook_steps) * NOTEBOOK_STEPS
    print(
        f"notebook: {1000 * statistics.median(notebook_steps):.1f} ms a step ({1000 * min(notebook_steps):.1f} to "
        f"{1000 * max(notebook_steps):.1f}, {len(notebook_steps)} steps), so {notebook_seconds:,.0f} s for "
        f"{NOTEBOOK_STEPS:,}, extrapolated"
    )
    ratios = [notebook_seconds / run.seconds for run in ours]
    print(f"notebook / ours: median {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    if options.save:
        figures = {
            "notebook": {"step_seconds": notebook_steps, "steps": NOTEBOOK_STEPS},
            "ours": [run._asdict() for run in ours],
        }
        asked = {key: value for key, value in vars(options).items() if key != "save"}
        save(options.save, asked, figures, device)
    sys.exit(any(run.loss > options.target for run in ours))


def notebook(config: TrainConfig, data: Dataset, device: torch.device) -> Callable[[], float]:
    """One step more of its recipe; gives its seconds."""
    run = prepare(config, data, device)
    batches = Batches(data.train, config.trainer.batch_size, config.seed, device)

    def step() -> None:
        run.loss_sum += train_step(run, *batches.batch(run.step))[0]
        run.step += 1

    return lambda: seconds(step, device)


def trained(seed: int, options: Any, data: Dataset) -> Ours:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = ["ddpm-train", "experiment=mnist_notebook_loss", f"seed={seed}", f"run_dir={run_dir}"]
        command += [f"device={options.device}", *options.overrides]
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        spent = time.perf_counter() - begun
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        model = ddpm.load(run_dir, device=options.device)
    n = min(options.draws, len(data.test))
    loss = eps_loss(model, data.test, n=n, n_draws=options.draws, seed=0)
    return Ours(seed, spent, model.step, loss.mean, loss.error)


def described(run: Ours, target: float) -> str:
    part = run.error / run.loss
    return (
        f"{run.seconds:.1f} s for {run.steps:,} steps, loss {run.loss:.5f} ± {run.error:.5f} ({part:.2%}), "
        f"{'at most' if run.loss <= target else 'ABOVE'} {target:g}"
    )


if __name__ == "__main__":
    main()
