"""What a checkpoint costs: a save as training makes it, beside a plain torch.save of the same tensors, in one run.

    python benchmarks/bench_checkpoint.py                          the recipes digits, mnist and folder
    python benchmarks/bench_checkpoint.py --folder /mnt/slow       on that disk

Ours gathers the tensors, hashes them, writes, flushes to the disk, renames, reads back and verifies; torch.save
writes and returns. The two take turns; medians are printed, and the share that saves have of training at the
recipe's own interval, batch and network, from steps timed between the saves. Losses of the images do not matter.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from timing import seconds

from ddpm.checkpoint import file as checkpoint
from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.data.dataset import Dataset, Split
from ddpm.data.info import DatasetInfo
from ddpm.io.images import normalise
from ddpm.train.checkpointing import save
from ddpm.train.state import TrainState, prepare
from ddpm.train.step import train_step

RECIPES = {"digits": (8, 1), "mnist": (28, 1), "folder": (32, 3)}  # image size, channels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps timed in each round")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write (default: here)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{os.uname().machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for recipe in RECIPES:
            print(measure(recipe, device, options.rounds, options.steps, Path(folder)), flush=True)


def measure(recipe: str, device: torch.device, rounds: int, steps: int, folder: Path) -> str:
    run = make_run(recipe, device)
    batch = torch.zeros(run.config.trainer.batch_size, run.facts.channels, *[run.facts.image_size] * 2)
    x_0 = normalise(batch.to(device))
    train_step(run, x_0, None)  # makes the optimizer's moments
    ours, theirs = folder / "ours.safetensors", folder / "theirs.pt"

    def plain() -> None:
        state = {"model": run.network.state_dict(), "ema": run.ema.state_dict()}
        torch.save(state | {"optimizer": run.optimizer.state_dict()}, theirs)

    def several_steps() -> None:
        for _ in range(steps):
            train_step(run, x_0, None)
            run.step += 1

    times: dict[str, list[float]] = {"ours": [], "torch.save": [], "verify": [], "step": []}
    for _ in range(rounds + 1):
        times["ours"].append(seconds(lambda: save(run, ours, {}), device))
        times["torch.save"].append(seconds(plain, device))
        times["verify"].append(seconds(lambda: checkpoint.verify(ours), device))
        times["step"].append(seconds(several_steps, device) / steps)
    median = {
        name: statistics.median(values[1:]) for name, values in times.items()
    }  # the first is the warm-up
    every = run.config.trainer.checkpoint_every
    share = median["ours"] / (median["ours"] + every * median["step"])
    return (
        f"{recipe}: {ours.stat().st_size / 2**20:.1f} MiB; a save {1000 * median['ours']:.0f} ms (reading back "
        f"{1000 * median['verify']:.0f}), torch.save {1000 * median['torch.save']:.0f} ms; a step "
        f"{1000 * median['step']:.1f} ms, a save every {every} steps: {100 * share:.2f} % of the time"
    )


def make_run(recipe: str, device: torch.device) -> TrainState:
    overrides = [f"dataset={recipe}", "dataset.path=none"] if recipe == "folder" else [f"dataset={recipe}"]
    config = check(TrainConfig, compose("train", overrides))
    size, channels = RECIPES[recipe]
    split = Split(torch.zeros(8, channels, size, size, dtype=torch.uint8), None)
    return prepare(
        config, Dataset(DatasetInfo(recipe, channels, size, 0, (), 256), split, split, split), device
    )


if __name__ == "__main__":
    main()
