"""What a training step takes of memory beside diffusers', and whether sampling takes more for more images or steps.

    python benchmarks/bench_memory.py                     batch 128 and 512, float32 and bf16, 2 threads of the CPU
    python benchmarks/bench_memory.py --device cuda

Every figure is of a fresh process: on a CPU the most that was resident in it (RSS), on a GPU the most that torch had
allocated; at all ("peak"), and without what there was just before the first step ("beyond"), which on a CPU are
mostly libraries, and in diffusers' processes ours as well. Its network is of the same topology and weights, once as
its users run it and once channels_last with fused updates: the ratio is to the lower of the two. Ours keeps the memory
that it frees, as ddpm-train does. Sampling is ddim with unet_small, untrained, in chunks of 64; the images themselves,
n · C · H · W · 4 bytes, are in the figures, as nothing is subtracted. Linux, and the extra `bench`.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_sampling import make_model
from sides import Setting, installed, make
from timing import machine, save

from ddpm.runtime import memory

STEPS = 3  # of training; the first makes the optimizer's moments
CHUNK = 64
GOAL = 0.8  # of diffusers'
MIB = 2**20


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    if options.one:
        before, most = measure(json.loads(options.one), device)
        print(json.dumps({"before": before, "peak": most}))
        return
    if "diffusers" not in installed():
        sys.exit('diffusers is not installed: pip install -e ".[bench]"')
    about = machine(device) | {"diffusers": installed()["diffusers"]}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    figures = {"training": training(options), "sampling": sampling(options)}
    if options.save:
        chosen = {key: value for key, value in vars(options).items() if key not in ("one", "save")}
        save(options.save, chosen | {"diffusers": about["diffusers"]}, figures, device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--images", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--sampling-steps", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each figure")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, metavar="FILE", help="all figures, as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def training(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for batch_size in options.batch_size:
        for precision in ("fp32", "bf16"):
            settings = [
                Setting("ours", precision, channels_last=True, keep_freed=True),
                Setting("diffusers", precision, fused=False),
                Setting("diffusers", precision, channels_last=True),
            ]
            print(f"training, batch {batch_size}, {precision}:", flush=True)
            works = {str(s): {"setting": dataclasses.asdict(s), "batch_size": batch_size} for s in settings}
            measured = repeated(works, options)
            found[f"batch {batch_size}, {precision}"] = measured
            for what in ("peak", "beyond"):
                ours, *theirs = [statistics.median(row[what]) for row in measured.values()]
                ratio = ours / min(theirs)
                print(
                    f"  {what}: ours is {ratio:.2f} of diffusers', {'' if ratio <= GOAL else 'not '}at most {GOAL}"
                )
    return found


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    first_n, first_steps = options.images[0], options.sampling_steps[0]
    found = {}
    for title, pairs in {
        "images": [(n, first_steps) for n in options.images],
        "steps": [(first_n, steps) for steps in options.sampling_steps],
    }.items():
        print(f"sampling more {title}, {CHUNK} at once:", flush=True)
        works = {f"{n} images, {steps} steps": {"n": n, "num_steps": steps} for n, steps in pairs}
        found[title] = repeated(works, options)
        peaks = [statistics.median(row["peak"]) for row in found[title].values()]
        kept = (pairs[-1][0] - pairs[0][0]) * 28 * 28 * 4
        print(
            f"  peak: the last is {peaks[-1] / peaks[0]:.3f} of the first, {(peaks[-1] - peaks[0]) / MIB:+.1f} MiB, "
            f"where the images more are {kept / MIB:.1f}"
        )
    return found


def repeated(
    works: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, dict[str, list[int]]]:
    """Bytes at the peak, and beyond those before, of every piece of work in each round; printed."""
    found: dict[str, dict[str, list[int]]] = {name: {"peak": [], "beyond": []} for name in works}
    line = [sys.executable, __file__, "--threads", str(options.threads), "--device", options.device]
    for _ in range(options.rounds):
        for name, work in works.items():
            out = subprocess.run(
                [*line, "--one", json.dumps(work)], check=True, stdout=subprocess.PIPE, text=True
            )
            figures = json.loads(out.stdout.splitlines()[-1])
            found[name]["peak"].append(figures["peak"])
            found[name]["beyond"].append(figures["peak"] - figures["before"])
    for name, row in found.items():
        texts = [
            f"{what} {statistics.median(row[what]) / MIB:,.1f} MiB ({min(row[what]) / MIB:,.1f} to "
            f"{max(row[what]) / MIB:,.1f})"
            for what in ("peak", "beyond")
        ]
        print(f"  {name:<42} {', '.join(texts)}", flush=True)
    return found


def measure(work: dict[str, Any], device: torch.device) -> tuple[int, int]:
    """In this process, just started: bytes before a piece of work and at its peak."""
    if "n" in work:
        sampler = ["sampler=ddim", f"sampler.num_steps={work['num_steps']}"]
        model = make_model(["dataset=mnist", "model=unet_small", *sampler], "fp32", device)
        return peak(lambda: model.sample(work["n"], batch_size=CHUNK), device)
    setting = Setting(**work["setting"])
    if setting.keep_freed:
        memory.keep_freed()
    side = make(setting, work["batch_size"], device)

    def steps() -> None:
        for _ in range(STEPS):
            side.step()

    return peak(steps, device)


def peak(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return before, torch.cuda.max_memory_allocated(device)
    # the highest mark starts anew; that of getrusage is the parent's at first
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return before, resident("VmHWM")


def resident(key: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    main()
