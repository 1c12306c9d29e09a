"""All that only a GPU can show, in one script: checks, times, and the recipe mnist_gpu from its start to its samples.

    python benchmarks/bench_gpu.py --out FOLDER                        every part: about 20 minutes of an H200, a guess
    python benchmarks/bench_gpu.py --out FOLDER --parts waits modes    some of them
    python benchmarks/bench_gpu.py --out FOLDER --quick                tiny sizes, on a CPU, too: does this script work?

    waits           no step of training or sampling waits for the GPU, and feeding takes less than 1 % of a step
    modes           a training step: as it is, compiled, compiled with CUDA graphs, with CUDA graphs alone
    peers           bench_train.py: ours beside diffusers' at batches of 128, 512 and 2048
    peers_compiled  the same, compiled, at 512
    recipe          ddpm-train experiment=mnist_gpu: what of a minute goes to start-up, and what to training
    quality         ddpm-eval of that run on 10,000 images
    sampling        10,000 images of it by ddpm.load(…).sample, after a warm-up

Each part is a process with a time limit of its own and writes FOLDER/<part>-<device>.json. A part that fails, and a
goal that is missed, make the exit status 1; the others go on. Data: $DDPM_DATA.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_steps import measure_waits, take_turns
from timing import machine, save, seconds

import ddpm

Figures = dict[str, Any]
TINY = ["dataset=digits", "model.channels=[8,32]", "model.attention=[1]", "model.head_dim=8"]
TINY += ["trainer.batch_size=8", "trainer.precision=fp32", "trainer.max_steps=8", "trainer.validate_every=0"]
STORED = Path(__file__).parents[1] / "benchmarks" / "results" / "mnist_cpu" / "0" / "evaluation.json"


def waits(options: argparse.Namespace) -> Figures:
    figures = measure_waits(torch.device(options.device), options.quick)
    goals = {}
    for name, found in figures.items():
        print(f"{name}: {json.dumps(found)}")
        goals[f"{name}: nothing waits"] = not found["waits"]
        goals[f"{name}: feeding is below 1 % of a step"] = found["feeding_share"] < 0.01
    return figures | {"goals": goals}


def modes(options: argparse.Namespace) -> Figures:
    figures, failures = take_turns(options.device, options.quick), []
    for recipe, sides in figures.items():
        plain = sides["as it is"]
        for side, found in sides.items():
            if "failed" in found:
                failures.append(f"{recipe}, {side}: {found['failed']}")
                continue
            ratio = [a / b for a, b in zip(plain["step_seconds"], found["step_seconds"], strict=True)]
            saved = 1 - median(found["pass_seconds"]) / median(plain["pass_seconds"])
            print(
                f"{recipe}, {side}: {1000 * median(found['step_seconds']):.2f} ms a step ({median(ratio):.2f} times as "
                f"fast, {min(ratio):.2f} to {max(ratio):.2f}), ready in {found['compile_seconds']:.0f} s, "
                f"{found['memory'] / 2**20:,.0f} MiB; that is compiling.SAVED = {saved:.2f}"
            )
    return figures | {"failures": failures}


def peers(options: argparse.Namespace, sizes: tuple[int, ...] = (128, 512, 2048), *more: str) -> Figures:
    if find_spec("diffusers") is None:
        return {"left out": "diffusers is not installed"}
    file = file_of(options.one, options)
    small = ["--batch-size", "8", "--rounds", "2", "--steps", "1"]
    sized = small if options.quick else ["--batch-size", *map(str, sizes), *more]
    line = [sys.executable, str(Path(__file__).with_name("bench_train.py")), "--device", options.device]
    subprocess.run([*line, *sized, "--peers", "diffusers", "--save", str(file)], check=True)
    figures: Figures = json.loads(file.read_text())["figures"]
    return figures


def peers_compiled(options: argparse.Namespace) -> Figures:
    return peers(options, (512,), "--compile")


def recipe(options: argparse.Namespace) -> Figures:
    """When each line of ddpm-train came, in seconds since its start."""
    line = [*command("train"), "experiment=mnist_gpu", f"run_dir={options.runs}", "overwrite=true"]
    line += [f"device={options.device}", *(TINY if options.quick else [])]
    started, lines = time.perf_counter(), []
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout or []:
            lines.append((time.perf_counter() - started, text.rstrip()))
            print(f"{lines[-1][0]:7.1f} s  {lines[-1][1]}", flush=True)
    total = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"ddpm-train ended with status {process.returncode}")

    def when(words: str) -> float:
        return next(at for at, text in lines if words in text)

    ready, stepping, done = when("validation images"), when("more steps"), when("done in")
    steps = json.loads((Path(options.runs) / "result.json").read_text())["step"]
    each = (done - stepping) / (
        steps - 4
    )  # with validation and checkpoints; the estimate comes after four steps
    fits = f"{45 / each:,.0f} steps would take 45 s"
    print(f"ready {ready:.1f} s, stepping {stepping:.1f} s, done {done:.1f} s, left {total:.1f} s; {fits}")
    figures = {
        "ready": ready,
        "stepping": stepping,
        "done": done,
        "total": total,
        "steps": steps,
        "lines": lines,
    }
    return figures | {"goals": {"from start to end at most 60 s": total <= 60}}


def quality(options: argparse.Namespace) -> Figures:
    sized = (
        ["n=128", "measure=[distance,cas]"]
        if options.quick
        else ["n=10000", "precision=bf16", "batch_size=2048"]
    )
    line = [*command("eval"), f"ckpt={options.runs}", f"device={options.device}", *sized]
    subprocess.run(line, check=True)
    judged = max((Path(options.runs) / "evaluations").glob("eval-*"), key=lambda path: path.stat().st_mtime)
    evaluation = json.loads((judged / "evaluation.json").read_text())
    found = {name: figure["value"] for name, figure in evaluation["figures"].items()}
    before = json.loads(STORED.read_text())["figures"]["fd_excess"]["value"]
    goals = {
        f"Fréchet excess {found['fd_excess']:.3f} at most {before / 10:.3f}, a tenth of mnist_cpu's": (
            found["fd_excess"] <= before / 10
        ),
        f"CAS {found['cas']:.4f} within 0.3 points of {found['real_cas']:.4f}": (
            found["cas"] >= found["real_cas"] - 0.003
        ),
    }
    return {"evaluation": evaluation, "goals": goals}


def sampling(options: argparse.Namespace) -> Figures:
    """float32 is what the library draws in; bf16 is what ddpm-sample precision=bf16 does."""
    device = torch.device(options.device)
    model, figures = ddpm.load(options.runs, device), dict[str, Any]()
    n, sizes = (20, (8,)) if options.quick else (10_000, (256, 2048))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for size in sizes:
            own = replace(model, precision=dtype)

            def draw(own: ddpm.Model = own, size: int = size) -> object:
                return own.sample(n, batch_size=size)

            draw()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times = [seconds(draw, device) for _ in range(3)]
            figures[f"{name}, batch {size}"] = {"seconds": times, "memory": memory(device)}
            print(
                f"{name}, batch {size}: {n:,} images in {median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
            )
    best = min(median(found["seconds"]) for key, found in figures.items() if key.startswith("fp32"))
    return figures | {"goals": {f"{n:,} images in {best:.2f} s, at most 2 s": best <= 2}}


PARTS: dict[str, tuple[Callable[[argparse.Namespace], Figures], int]] = {  # and seconds that it may take
    "waits": (waits, 150),
    "modes": (modes, 480),
    "peers": (peers, 560),
    "peers_compiled": (peers_compiled, 560),
    "recipe": (recipe, 300),
    "quality": (quality, 420),
    "sampling": (sampling, 240),
}


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        figures = PARTS[options.one][0](options)
        about = {"part": options.one, "quick": options.quick}
        save(file_of(options.one, options), about, figures, torch.device(options.device))
        if figures.get("failures"):
            sys.exit("\n".join(figures["failures"]))
        return
    print(
        ", ".join(f"{key} {value}" for key, value in machine(torch.device(options.device)).items()),
        flush=True,
    )
    failed = [part for part in options.parts if not run(part, options)]
    if failed:
        sys.exit(f"not as it should be: {', '.join(failed)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", default="outputs/bench_gpu", help="folder for the run of mnist_gpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("no GPU here: only --quick makes sense")
    return options


def run(part: str, options: argparse.Namespace) -> bool:
    """One part in a process of its own, ended with all it has started when its time is over; how it went is said."""
    file, limit = file_of(part, options), PARTS[part][1]
    file.unlink(missing_ok=True)
    line = [sys.executable, __file__, "--one", part, "--out", str(options.out), "--runs", options.runs]
    line += ["--device", options.device, *(["--quick"] if options.quick else [])]
    print(f"\n== {part}", flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(line, start_new_session=True)
    try:
        status = process.wait(None if options.quick else limit)
        how = f"status {status}" if status else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        how = f"stopped after {limit} s"
    print(f"{part}: {'FAILED, ' + how if how else 'ran'}, {time.perf_counter() - started:.0f} s", flush=True)
    goals = {} if how or options.quick else json.loads(file.read_text())["figures"].get("goals", {})
    for goal, met in goals.items():
        print(f"  {'met' if met else 'MISSED'}: {goal}", flush=True)
    return not how and all(goals.values())


def command(name: str) -> list[str]:
    """ddpm-train and the like, whether they are installed or only on PYTHONPATH."""
    entry = {"train": "train", "eval": "evaluate"}[name]
    return [sys.executable, "-c", f"from ddpm.cli.entry import {entry}; {entry}()"]


def file_of(part: str, options: argparse.Namespace) -> Path:
    return Path(options.out) / f"{part}-{name_of(options.device)}.json"


def name_of(device: str) -> str:
    name = torch.cuda.get_device_name(device) if device != "cpu" else "cpu"
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def memory(device: torch.device) -> int:
    """Bytes at most since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    main()
