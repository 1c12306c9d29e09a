"""How a training step scales over GPUs and nodes: a small simulation of DDP from step time and gradient size.

python benchmarks/simulate_scaling.py                                   the table of docs/scaling.md
python benchmarks/simulate_scaling.py --measure                         step time and gradients of this machine first

A step on one GPU is a fixed part (launching kernels, optimizer) and a part for each image. Its backward pass, two
thirds of it, hands out gradients from the last layer to the first; DDP packs them into buckets (1 MiB, then 25 MiB)
and all-reduces each as soon as it is full, one after the other, while the backward goes on. Only what has not
finished when the backward ends is waited for. An all-reduce of b bytes over n GPUs takes the shorter of a ring,
2 (n - 1) (latency + b / n / bandwidth), and a tree, 2 log2(n) latency + 2 b / bandwidth, by the slowest link in it.
"""

import argparse
import math
from dataclasses import dataclass

import torch

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes, DDP's defaults


@dataclass(frozen=True)
class Link:
    bandwidth: float  # bytes/s of one GPU's share
    latency: float  # seconds for a message


# Round numbers of common hardware, not measured here.
NVLINK = Link(300e9, 8e-6)
INFINIBAND = Link(25e9, 20e-6)  # 200 Gb/s for each GPU
ETHERNET = Link(1.2e9, 50e-6)  # 10 Gb/s for each node, shared by nobody


@dataclass(frozen=True)
class Step:
    """Of one GPU: seconds = fixed + per_image · images."""

    fixed: float
    per_image: float
    gradients: tuple[int, ...]  # bytes of each parameter, in the order of the backward pass

    def alone(self, images: float) -> float:
        return self.fixed + self.per_image * images


def all_reduce(size: float, gpus: int, per_node: int) -> float:
    """Seconds of the shorter of ring and tree over all GPUs."""
    link = NVLINK if gpus <= per_node else (INFINIBAND if per_node > 1 else ETHERNET)
    ring = 2 * (gpus - 1) * (link.latency + size / gpus / link.bandwidth)
    return min(ring, 2 * math.ceil(math.log2(gpus)) * link.latency + 2 * size / link.bandwidth)


def step_time(step: Step, images: float, gpus: int, per_node: int) -> float:
    """Seconds of a step with so many images on each GPU."""
    whole = step.alone(images)
    if gpus == 1:
        return whole
    backward_begins, backward = whole / 3, whole * 2 / 3
    total, done, filled, limit, free = sum(step.gradients), 0, 0, FIRST_BUCKET, 0.0
    for number, size in enumerate(step.gradients):
        done, filled = done + size, filled + size
        if filled >= limit or number == len(step.gradients) - 1:
            ready = backward_begins + backward * done / total
            free = max(free, ready) + all_reduce(filled, gpus, per_node)
            filled, limit = 0, BUCKET
    return max(whole, free)


def network(name: str) -> Step:
    """Gradient sizes of a configured network, with the times below."""
    from ddpm import build
    from ddpm.config.hydra import compose
    from ddpm.config.schema import TrainConfig, check
    from ddpm.data.info import DatasetInfo

    config = check(TrainConfig, compose("train", ["dataset=mnist", f"model={name}"]))
    with torch.device("meta"):
        net = build.network(config.model, config.objective, DatasetInfo("mnist", 1, 28, 10, (), 256))
    sizes = tuple(4 * p.numel() for p in reversed(list(net.parameters())))
    return Step(*ASSUMED[name], sizes)


# Seconds: fixed and per image, for a GPU of the H100 class in bf16. Not measured: the fixed part is about 1,000
# kernels of 4 µs for launching them; an image is 3 × the forward's 0.64 and 3.50 GFLOP (counted: --measure) at
# 100 TFLOP/s, an eighth of what the chip's matrix units reach.
ASSUMED = {"unet_small": (4e-3, 3 * 0.64e9 / 100e12), "unet_base": (4e-3, 3 * 3.50e9 / 100e12)}


def measure(name: str) -> None:
    """Step time over the batch on this machine, with a straight line through it."""
    import time

    from ddpm.config.hydra import compose
    from ddpm.config.schema import TrainConfig, check
    from ddpm.data.dataset import Dataset, Split
    from ddpm.data.info import DatasetInfo
    from ddpm.runtime import device as runtime_device
    from ddpm.train import state
    from ddpm.train.step import train_step

    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    split = Split(images, torch.zeros(64, dtype=torch.int64))
    data = Dataset(DatasetInfo("mnist", 1, 28, 10, (), 256), split, split, split)
    device, points = runtime_device.device("auto"), []
    for batch in (8, 16, 32, 64):
        settings = ["dataset=mnist", f"model={name}", f"trainer.batch_size={batch}"]
        run = state.prepare(check(TrainConfig, compose("train", settings)), data, device)
        x_0, y = images[:batch].to(device) / 127.5 - 1, split.labels[:batch].to(device)
        times = []
        for number in range(6):
            begun = time.perf_counter()
            loss, _ = train_step(run, x_0, y)
            loss.item()
            times.append(time.perf_counter() - begun)
            run.step = number + 1
        points.append((batch, sorted(times[1:])[2]))
    n, t = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    slope = ((n - n.mean()) * (t - t.mean())).sum() / (n - n.mean()).square().sum()
    fixed, threads = t.mean() - slope * n.mean(), torch.get_num_threads()
    print(f"{name} on this {device.type}: " + ", ".join(f"{b} images {1000 * s:.0f} ms" for b, s in points))
    print(f"  fixed {1000 * fixed:.1f} ms, {1000 * slope:.2f} ms an image, {threads} threads")


def flops(name: str) -> float:
    """Of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from ddpm import build
    from ddpm.config.hydra import compose
    from ddpm.config.schema import TrainConfig, check
    from ddpm.data.info import DatasetInfo

    config = check(TrainConfig, compose("train", ["dataset=mnist", f"model={name}"]))
    net = build.network(config.model, config.objective, DatasetInfo("mnist", 1, 28, 10, (), 256))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64))
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="step time and FLOPs on this machine first")
    if parser.parse_args().measure:
        for name in ASSUMED:
            print(f"{name}: {flops(name) / 1e9:.2f} GFLOP forward for an image")
            measure(name)
    for name in ASSUMED:
        step = network(name)
        print(f"\n{name}: {sum(step.gradients) / 2**20:.1f} MiB of gradients")
        for batch in (128, 2048):
            print(f"\nglobal batch {batch}: speed-up over one GPU (efficiency)\n")
            print("| GPUs | one box, NVLink | nodes of 8, InfiniBand | single-GPU nodes, 10 Gb Ethernet |")
            print("| ---: | ---: | ---: | ---: |")
            for gpus in (1, 2, 4, 8, 16, 32, 64):
                cells = [
                    _cell(step, batch, gpus, per_node) if allowed else "–"
                    for per_node, allowed in ((8, gpus <= 8), (8, True), (1, True))
                ]
                print(f"| {gpus} | " + " | ".join(cells) + " |")


def _cell(step: Step, batch: int, gpus: int, per_node: int) -> str:
    speed_up = step.alone(batch) / step_time(step, batch / gpus, gpus, per_node)
    return f"{speed_up:.1f}× ({100 * speed_up / gpus:.0f} %)"


if __name__ == "__main__":
    main()
