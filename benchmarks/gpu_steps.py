"""Training steps on a GPU, for bench_gpu.py: whether one waits, and what compiling makes of them."""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from timing import seconds

from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.data.batches import Batches
from ddpm.data.dataset import Dataset, Split
from ddpm.data.info import Facts
from ddpm.sample import sampling as drawing
from ddpm.sample.model import Guidance, Model, denoiser, labels, levels
from ddpm.train import compile as compiling
from ddpm.train.loop import train_step
from ddpm.train.state import Run, prepare

RECIPES = {
    "mnist_gpu": ["experiment=mnist_gpu"],
    "unet_small, batch 128": ["dataset=mnist", "trainer.batch_size=128", "trainer.precision=bf16"],
}
QUICK = {"tiny": ["dataset=mnist", "model=mlp", "model.hidden=32", "optimizer=muon", "trainer.batch_size=8"]}
MODES: dict[str, dict[str, str] | None] = {  # what nn.Module.compile is told
    "as it is": None,
    "compiled": {},
    "compiled, CUDA graphs": {"mode": "reduce-overhead"},
    "CUDA graphs alone": {"backend": "cudagraphs"},
}
WARM_UP = 10
ROUNDS = 7
WAITING = ("cudaStreamSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def begun(overrides: list[str], device: torch.device, images: int) -> tuple[Run, Batches]:
    """A training of random images, before its first step."""
    torch.backends.cudnn.benchmark = True  # as ddpm-train has it
    config = check(TrainConfig, compose("train", [*overrides, "trainer.compile=false"]))
    x = torch.randint(0, 256, (images, 1, 28, 28), dtype=torch.uint8)
    split = Split(x, torch.arange(images) % 10)
    data = Dataset(Facts("mnist", 1, 28, 10, tuple("0123456789"), 256), split, split, split)
    run = prepare(config, data, device)
    return run, Batches(split, config.trainer.batch_size, config.seed, device)


def go(run: Run, batches: Batches, steps: int) -> None:
    """Steps as `training.fit` makes them."""
    for _ in range(steps):
        loss, _ = train_step(run, *batches.batch(run.step))
        run.loss_sum += torch.where(loss.isfinite(), loss, 0)
        run.step += 1


def measure_waits(device: torch.device, quick: bool) -> dict[str, Any]:
    """Of each recipe what waited, how many kernels a step launches, and how its time is spent."""
    figures, steps = {}, 4 if quick else 20
    for name, overrides in (QUICK if quick else RECIPES).items():
        run, batches = begun(overrides, device, 200 if quick else 60_000)
        border = len(batches.images) // batches.batch_size  # where a new order is drawn
        go(run, batches, WARM_UP)
        waited = list[str]()
        run.step = border - steps // 2
        with waiting_noted(device, waited):
            go(run, batches, steps)
        run.step = 2 * border - steps // 2
        calls = profiled(partial(go, run, batches, steps), device)
        with waiting_noted(device, waited):
            sample(run, device)
        waited += [f"{count} {call}" for call, count in calls.items() if call.startswith(WAITING)]
        launches = sum(count for call, count in calls.items() if "Launch" in call) / steps
        figures[name] = {"waits": waited, "launches_a_step": launches, "calls": calls} | shares(
            run, batches, steps
        )
    return figures


@contextmanager
def waiting_noted(device: torch.device, waited: list[str]) -> Iterator[None]:
    """torch raises where it is about to wait for the GPU; where that was goes into `waited`."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError:
        waited.append(traceback.format_exc())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sample(run: Run, device: torch.device) -> None:
    """All steps of a sampler but the first, before which the images' numbers go to the GPU."""
    model = Model(run.ema, run.schedule, run.config, run.facts, device)
    index = torch.arange(64, device=device)
    y = labels(model, None, index, Guidance())
    denoise = denoiser(model, run.config.sampler, y, Guidance())
    steps = drawing.finite(drawing.draw(model, run.config.sampler, denoise, index, 0), index)
    with torch.inference_mode():
        for _ in levels(model, run.config.sampler)[1:]:
            next(steps)


def profiled(work: Callable[[], object], device: torch.device) -> dict[str, int]:
    """How often CUDA was called for what, and what was copied."""
    if device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize(device)
    kinds = ("cuda", "cuLaunch", "Memcpy", "Memset")
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith(kinds)}


def shares(run: Run, batches: Batches, steps: int) -> dict[str, float]:
    """Medians: of a step and of its feeding, by the GPU's own clock; and of the launching alone, by the host's."""
    feeding, whole, device = [], [], run.device
    for _ in range(5 * steps):
        start = mark(device)
        batch = batches.batch(run.step)
        fed = mark(device)
        train_step(run, *batch)
        end = mark(device)
        run.step += 1
        feeding.append((start, fed))
        whole.append((start, end))
    launched = seconds(lambda: go(run, batches, steps), torch.device("cpu")) / steps  # which waits for no GPU
    done = seconds(lambda: go(run, batches, steps), device) / steps
    feed, step = (median(between(*pair) for pair in pairs) for pairs in (feeding, whole))
    return {
        "feeding_seconds": feed,
        "feeding_share": feed / step,
        "step_seconds": done,
        "launching_seconds": launched,
    }


def mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a: Any, b: Any) -> float:
    """Seconds."""
    if isinstance(a, float):
        return float(b - a)
    b.synchronize()
    return float(a.elapsed_time(b)) / 1000


def take_turns(device: str, quick: bool) -> dict[str, dict[str, Any]]:
    """By recipe and mode: seconds until it was ready, and of steps and passes in each round. The modes take turns."""
    figures = {}
    for recipe in QUICK if quick else RECIPES:
        workers, found = dict[str, subprocess.Popen[str]](), dict[str, dict[str, Any]]()
        with ExitStack() as stack:
            for mode in MODES:
                workers[mode] = stack.enter_context(worker(recipe, mode, device, quick))
                found[mode] = answer(workers[mode])  # so that only one compiles at a time
            for number in range(2 if quick else ROUNDS):
                for mode in MODES if number % 2 == 0 else reversed(MODES):
                    if "failed" not in found[mode]:
                        print(file=workers[mode].stdin, flush=True)
                        found[mode] = joined(found[mode], answer(workers[mode]))
        figures[recipe] = found
    return figures


@contextmanager
def worker(recipe: str, mode: str, device: str, quick: bool) -> Iterator[subprocess.Popen[str]]:
    """A process that trains in one mode, with nothing compiled before."""
    line = [sys.executable, __file__, recipe, mode, device, "quick" if quick else ""]
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        environment, pipe = os.environ | caches, subprocess.PIPE
        with subprocess.Popen(line, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
            yield process


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    line = process.stdout.readline() if process.stdout else ""
    return json.loads(line) if line else {"failed": f"it ended with status {process.wait()}, see above"}


def joined(found: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Lists grow, all else is as it was said last."""
    return found | {
        key: found.get(key, []) + value if isinstance(value, list) else value for key, value in new.items()
    }


def serve(recipe: str, mode: str, device: str, quick: bool) -> None:
    """Say how long it took to be ready; then, for each line, train and say how long that took."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    run, batches = begun((QUICK if quick else RECIPES)[recipe], torch.device(device), 2000)
    started, how, steps = time.perf_counter(), MODES[mode], 2 if quick else 20
    if how is not None:
        run.network.compile(**how)
    for _ in range(2):
        compiling._pass(run)
    compiling._wait(run.device)
    print(json.dumps({"compile_seconds": time.perf_counter() - started}), file=answers, flush=True)
    go(run, batches, WARM_UP)
    for _ in sys.stdin:
        said: dict[str, Any] = {
            "step_seconds": [seconds(lambda: go(run, batches, steps), run.device) / steps]
        }
        said["pass_seconds"] = [compiling._pass_seconds(run, steps)]
        said["memory"] = torch.cuda.max_memory_allocated(device) if run.device.type == "cuda" else 0
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3], bool(sys.argv[4]))
