"""Two trainings at once on one GPU against one after the other: `jobs_per_gpu=2` beside `jobs_per_gpu=1`.

    python benchmarks/bench_jobs_per_gpu.py dataset=mnist trainer.max_steps=2000

Real sweeps of two jobs, alternating; what counts is the wall-clock from the first step of either to the last of both,
by the times at which metrics.jsonl grew, so that neither start-up nor compilation is in it. Needs a GPU and the extra
`sweep`.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROUNDS = 3


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no GPU here: nothing to share")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, settings {' '.join(sys.argv[1:])}")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(ROUNDS):
        for jobs in (1, 2) if number % 2 == 0 else (2, 1):
            with tempfile.TemporaryDirectory() as folder:
                taken, images = sweep(jobs, Path(folder) / "sweep")
            seconds[jobs].append(taken)
            print(
                f"round {number + 1}, jobs_per_gpu={jobs}: {taken:.1f} s, {images / taken:,.0f} images/s in all"
            )
    ratios = sorted(a / b for a, b in zip(seconds[1], seconds[2], strict=True))
    middle = statistics.median(ratios)
    print(
        f"two at once are {middle:.2f} times as fast as one after the other ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def sweep(jobs: int, folder: Path) -> tuple[float, int]:
    """Seconds in which at least one of the two jobs was between its first and its last line; images they saw then."""
    command = ["ddpm-train", "-m", "seed=0,1", "gpus=0", f"jobs_per_gpu={jobs}", "hydra/launcher=joblib"]
    command += [
        "hydra.launcher.n_jobs=2",
        f"run_dir={folder}",
        "trainer.log_every=50",
        "trainer.validate_every=0",
    ]
    seen: dict[Path, list[float]] = {}
    done = threading.Event()

    def watch() -> None:
        sizes: dict[Path, int] = {}
        while not done.wait(0.02):
            for file in folder.glob("*/metrics.jsonl"):
                if (size := file.stat().st_size) > sizes.get(file, 0):
                    sizes[file] = size
                    seen.setdefault(file, []).append(time.perf_counter())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = subprocess.run([*command, *sys.argv[1:]], capture_output=True, text=True)
    done.set()
    watcher.join()
    if result.returncode != 0:
        sys.exit(result.stdout + result.stderr)
    images = 0
    for file in seen:
        steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
        batch = re.search(r"^  batch_size: (\d+)$", (file.parent / "config.yaml").read_text(), re.M)
        images += (steps[-1] - steps[0]) * int(batch[1]) if batch else 0
    spans = sorted((times[0], times[-1]) for times in seen.values())
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy, until = busy + max(0.0, end - max(begin, until)), max(until, end)
    return busy, images


if __name__ == "__main__":
    main()
