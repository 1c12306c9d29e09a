"""Training steps on a GPU, for bench_gpu.py: beside the CPU's, in turns with diffusers', and taken apart."""

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from peaks import convolution, matrices
from sides import Setting, Side, make, our_run
from timing import seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.data.batches import Batches
from ddpm.data.dataset import Dataset, Split
from ddpm.data.info import DatasetInfo
from ddpm.networks.kernels.group_norm import normed
from ddpm.networks.unet import Attention
from ddpm.runtime.randomness import normal, uniform
from ddpm.train.cuda_graph import CapturedSteps
from ddpm.train.state import TrainState, prepare
from ddpm.train.step import train_step

WARM_UP = 6
ROUNDS = 5
STEPS = 20  # in a round
KERNELS = 40  # listed in a profile, the costliest first
Figures = dict[str, Any]


def begun(
    overrides: list[str], device: torch.device, images: int, size: int = 28
) -> tuple[TrainState, Batches]:
    """A training on random images, before its first step."""
    config = check(TrainConfig, compose("train", [*overrides, "trainer.compile=false"]))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (images, 1, size, size), dtype=torch.uint8, generator=generator)
    split = Split(x, torch.arange(images) % 10)
    data = Dataset(DatasetInfo("mnist", 1, size, 10, tuple("0123456789"), 256), split, split, split)
    run = prepare(config, data, device)
    return run, Batches(split, config.trainer.batch_size, config.seed, device)


def eager_steps(run: TrainState, batches: Batches, steps: int) -> None:
    """Steps as `training.fit` makes them on a CPU."""
    for _ in range(steps):
        loss, _ = train_step(run, *batches.batch(run.step))
        run.loss_sum += torch.where(loss.isfinite(), loss, 0)
        run.step += 1


def repeat_steps(captured: CapturedSteps, run: TrainState, batches: Batches, steps: int) -> None:
    """Steps as `training.fit` makes them on a GPU."""
    for _ in range(steps):
        loss, _ = captured.step()
        run.loss_sum += torch.where(loss.isfinite(), loss, 0)
        run.step += 1


def noise_beside_cpu(device: torch.device) -> Figures:
    """The bits of uniform draws must be equal; normal ones differ by the rounding of log, sin and cos."""
    index = torch.arange(4096)
    ours = [uniform(1, "a", 2, index), normal(1, "a", 2, index, (1, 28, 28))]
    there = [uniform(1, "a", 2, index.to(device)), normal(1, "a", 2, index.to(device), (1, 28, 28))]
    return {
        "uniform_equal": torch.equal(ours[0], there[0].cpu()),
        "normal_apart": float((ours[1] - there[1].cpu()).abs().max()),
    }


def attention_beside_cpu(device: torch.device) -> Figures:
    """Largest difference of attention's gradients to float64 on the CPU, relative to the largest gradient."""
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = Attention(64, 32, 8)
        torch.nn.init.normal_(layer.out.weight, std=0.1)
        x = torch.randn(16, 64, 14, 14)

        def gradients(layer: Attention, x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
            layer.zero_grad()
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
                y = layer(x)
            y.float().square().sum().backward()
            assert x.grad is not None
            return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

        low = dtype if dtype != torch.float32 else None
        there = [g.double().cpu() for g in gradients(layer.to(device), x.to(device), low)]
        exact = gradients(layer.cpu().double(), x.double(), None)
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(there, exact, strict=True)]
        figures[str(dtype).removeprefix("torch.")] = max(apart)
    return figures


def group_norm_beside_cpu(device: torch.device) -> Figures:
    """Largest difference of GroupNorm with bias and SiLU, and of its gradients, to float64, relative to the largest."""
    figures = {}
    for dtype, c in product((torch.float32, torch.bfloat16), (32, 96, 256)):
        torch.manual_seed(0)
        norm = nn.GroupNorm(8, c)
        nn.init.normal_(norm.weight)
        x = (torch.randn(16, c, 14, 14) + 5).to(dtype).contiguous(memory_format=torch.channels_last)
        extra, dy = torch.randn(16, c), torch.randn(16, c, 14, 14).to(dtype)
        found = []
        for where, exact in ((device, False), (torch.device("cpu"), True)):
            own = [
                value.detach().to(where, torch.float64 if exact else value.dtype) for value in (x, extra, dy)
            ]
            leaves = [own[0].requires_grad_(), own[1].requires_grad_()]
            layer = nn.GroupNorm(8, c).to(where, torch.float64 if exact else torch.float32)
            layer.load_state_dict(norm.state_dict())
            y = normed(layer, *leaves)
            found.append([y, *torch.autograd.grad(y, [*leaves, *layer.parameters()], own[2])])
        apart = [
            float((a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max())
            for a, b in zip(*found, strict=True)
        ]
        figures[f"{str(dtype).removeprefix('torch.')}, {c} channels"] = [round(value, 9) for value in apart]
    return figures


def captured_beside_eager(device: torch.device, overrides: Sequence[str]) -> Figures:
    """The same twelve steps with the graph and without: losses, and how far the weights are apart."""
    found = []
    for graph in ("true", "false") if device.type == "cuda" else ("false", "false"):
        run, batches = begun([*overrides, f"trainer.cuda_graph={graph}"], device, 2000)
        losses, steps = [], CapturedSteps(run, batches)
        for _ in range(12):
            loss, _ = steps.step()
            losses.append(float(loss))
            run.step += 1
        found.append((losses, [p.detach().clone() for p in [*run.parameters, *run.averages]], steps.obstacle))
    (losses, weights, obstacle), (eager_losses, eager_weights, _) = found
    return {
        "losses": [losses[0], losses[-1]],
        "losses_equal": losses == eager_losses,
        "last_loss_apart": abs(losses[-1] - eager_losses[-1]) / eager_losses[-1],
        "weights_equal": all(torch.equal(a, b) for a, b in zip(weights, eager_weights, strict=True)),
        "weights_apart": max(float((a - b).abs().max()) for a, b in zip(weights, eager_weights, strict=True)),
        "obstacle": obstacle,
    }


def step_beside_cpu(device: torch.device, precision: str) -> Figures:
    """One step of the same run on the GPU and, in float32, on the CPU: losses, gradient norms and new weights."""
    overrides = ["dataset=mnist", "model=unet_small", "trainer.batch_size=16", "model.conditional=true"]
    found = []
    for where, name in ((device, precision), (torch.device("cpu"), "fp32")):
        run, batches = begun([*overrides, f"trainer.precision={name}"], where, 64)
        loss, norm = train_step(run, *batches.batch(0))
        found.append((float(loss), float(norm), [p.detach().double().cpu() for p in run.parameters]))
    (loss, norm, weights), (cpu_loss, cpu_norm, cpu_weights) = found
    return {
        "loss": loss,
        "loss_apart": abs(loss - cpu_loss) / cpu_loss,
        "grad_norm_apart": abs(norm - cpu_norm) / cpu_norm,
        "weights_apart": max(float((a - b).abs().max()) for a, b in zip(weights, cpu_weights, strict=True)),
    }


def peaks(device: torch.device, quick: bool) -> dict[str, float]:
    """GFLOP/s of the best 3×3 convolution of 64 to 64 channels, and of a product of matrices."""
    batch = 8 if quick else 512
    found = {
        name: convolution(64, 64, 14, batch, dtype, device)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    return found if device.type == "cpu" else found | {"matrices": matrices(device)}


def settings(name: str, device: torch.device, compiled: bool) -> dict[str, Setting]:
    """Ours and diffusers' with the same switches: bf16, channels-last, fused updates.

    Ours is captured as one graph and never compiled. diffusers' is eager, or compiled with CUDA graphs.
    """
    gpu = device.type == "cuda"
    plain = Setting("ours", "bf16" if gpu else "fp32", channels_last=True, network=name)
    theirs = replace(plain, side="diffusers")
    ours = {"ours, captured": replace(plain, cuda_graph=gpu)}
    if compiled:
        mode = "reduce-overhead" if gpu else "default"
        return ours | {"diffusers, compiled": replace(theirs, compile=mode)}
    return ours | {"diffusers, eager": theirs}


def in_turns(name: str, batch: int, device: torch.device, compiled: bool, quick: bool) -> dict[str, Figures]:
    """Seconds of a step of each side in each round, seconds until it was ready, peak memory and arithmetic."""
    sides, found, steps = dict[str, Side](), dict[str, Figures](), 2 if quick else STEPS
    for label, setting in settings(name, device, compiled).items():
        started = time.perf_counter()
        side = make(setting, batch, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARM_UP):
            side.step()
        found[label] = {"ready_seconds": seconds(side.step, device) + time.perf_counter() - started}
        sides[label] = side
    for number in range(2 if quick else ROUNDS):
        for label in sides if number % 2 == 0 else reversed(sides):
            side = sides[label]
            taken = seconds(partial(repeat, side.step, steps), device) / steps
            found[label].setdefault("step_seconds", []).append(round(taken, 6))
    flop = 0 if compiled else max(map(flop_of, sides.values()))  # a graph's replay shows none
    for figures in found.values():
        middle = median(figures["step_seconds"])
        figures |= {"median_ms": 1000 * middle, "images_per_second": round(batch / middle)}
        if flop:
            figures |= {"gflop_a_step": flop / 1e9, "tflops": flop / middle / 1e12}
    if device.type == "cuda":
        for label in found:
            found[label]["peak_mib_of_both"] = torch.cuda.max_memory_allocated(device) / 2**20
    sides.clear()
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def flop_of(side: Side) -> int:
    with FlopCounterMode(display=False) as counter:
        side.step()
    return int(counter.get_total_flops())


def warm(name: str, batch: int, device: torch.device) -> float:
    """Compile diffusers' in this process, so that the next finds it in the cache on disk. Returns the seconds."""
    setting = settings(name, device, compiled=True)["diffusers, compiled"]
    started = time.perf_counter()
    made = make(setting, batch, device)
    made.step()
    return seconds(made.step, device) + time.perf_counter() - started


def ratios(found: dict[str, Figures]) -> Figures:
    ours, theirs = (figures["step_seconds"] for figures in found.values())
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": median(each), "lowest": min(each), "highest": max(each)}


def repeat(step: Callable[[], object], steps: int) -> None:
    for _ in range(steps):
        step()


def anatomy(name: str, batch: int, device: torch.device, quick: bool) -> Figures:
    """What our step waits for, launches and spends its time on."""
    setting = next(iter(settings(name, device, compiled=False).values()))
    run, batches = our_run(setting, batch, device)
    go = partial(repeat_steps, CapturedSteps(run, batches)) if device.type == "cuda" else eager_steps
    steps, border = 2 if quick else 10, len(batches.images) // batch  # where a new order is drawn
    go(run, batches, WARM_UP)
    figures: Figures = {"waits": waits(run, partial(go, run, batches, 4), border, device)}
    started = time.perf_counter()
    go(run, batches, steps)
    figures["host_ms"] = 1000 * (time.perf_counter() - started) / steps  # until all is launched
    figures["step_ms"] = 1000 * seconds(partial(go, run, batches, steps), device) / steps
    if device.type == "cuda":
        figures |= profiled(partial(go, run, batches, steps), steps, device)
    return figures


def waits(run: TrainState, four_steps: Callable[[], None], border: int, device: torch.device) -> list[str]:
    """Where steps waited for the GPU, over the border of two epochs: PyTorch warns of each place."""
    if device.type == "cpu":
        return []
    run.step = max(border - 2, 1)
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            four_steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename.rpartition('/')[2]}:{w.lineno} {w.message}"[:200] for w in caught]


def profiled(work: Callable[[], object], steps: int, device: torch.device) -> Figures:
    """Launches and calls that wait, a step, and the costliest kernels: [name, times, microseconds]."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize(device)
    events = profile.key_averages()
    calls = {e.key: e.count / steps for e in events if e.key.startswith(("cuda", "cuLaunch"))}
    kernels = [e for e in events if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    return {
        "kernels": sum(e.count for e in kernels) / steps,
        "device_ms": sum(e.self_device_time_total for e in kernels) / steps / 1000,
        "calls": calls,
        "costliest": [
            [e.key[:120], e.count / steps, round(e.self_device_time_total / steps, 1)]
            for e in kernels[:KERNELS]
        ],
    }
