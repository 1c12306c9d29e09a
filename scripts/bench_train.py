"""One training step of ours beside diffusers' UNet2DModel of the same topology and weights, in one run.

    python scripts/bench_train.py                      float32, batch 128, 28×28
    python scripts/bench_train.py --precision bf16     both under autocast

A step is: noise, forward, loss, backward, clip, AdamW, EMA. Ours is `ddpm.training.train_step` as it is; theirs is
a plain loop as in diffusers' own training example, with a fused AdamW and an EMA over the parameters. The two take
turns; medians and the median of the pairwise ratios are printed. Needs the extra `test` (diffusers).
"""

import argparse
import os
import statistics
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, UNet2DModel
from timing import seconds
from torch.nn import functional as F

from ddpm.cli.hydra_app import compose
from ddpm.config import TrainConfig, check
from ddpm.datasets.batches import Batches
from ddpm.datasets.types import Dataset, Facts, Split
from ddpm.networks.diffusers_map import diffusers_config, to_diffusers
from ddpm.runs import prepare
from ddpm.training import train_step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)

    ours, theirs, difference = make_steps(options.batch_size, options.precision, device)
    print(f"same weights, same inputs: outputs differ by at most {difference:.1e} (float32)")
    print(
        f"{os.uname().machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}, "
        f"{options.precision}, batch {options.batch_size}"
    )
    times: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for _ in range(options.rounds + 1):
        times["ours"].append(seconds(ours, device))
        times["diffusers"].append(seconds(theirs, device))
    pairs = list(zip(times["ours"], times["diffusers"], strict=True))[1:]  # the first is the warm-up
    for name, values in zip(times, zip(*pairs, strict=True), strict=True):
        median = statistics.median(values)
        print(f"{name:>10}: {1000 * median:8.1f} ms a step, {options.batch_size / median:8.1f} images/s")
    ratios = [b / a for a, b in pairs]
    print(
        f"ratio diffusers / ours: median {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )


def make_steps(
    batch_size: int, precision: str, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None], float]:
    """Our step, theirs, and how far the two networks' outputs are apart before anything is timed."""
    overrides = [
        "dataset=mnist",
        "model=unet_small",
        f"trainer.batch_size={batch_size}",
        f"trainer.precision={precision}",
    ]
    config = check(TrainConfig, compose("train", overrides))
    images = torch.randint(0, 256, (4 * batch_size, 1, 28, 28), dtype=torch.uint8)
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    data = Dataset(Facts("mnist", 1, 28, 10, tuple("0123456789"), 256), split, split, split)
    run = prepare(config, data, device)
    for parameter in run.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batches = Batches(split, batch_size, 0, device)

    params = {key: value for key, value in config.model.params.items() if key != "conditional"}
    peer = UNet2DModel(**diffusers_config(28, 1, 1, 0, **params)).to(device)
    peer.load_state_dict(to_diffusers(run.network.state_dict()))
    x, t = torch.randn(8, 1, 28, 28, device=device), torch.arange(8, device=device) * 100
    with torch.no_grad():
        difference = float((run.network(x, t) - peer(x, t).sample).abs().max())

    def ours() -> None:
        x_0, y = batches.batch(run.step)
        train_step(run, x_0, y)
        run.step += 1

    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, fused=True)
    average = [parameter.detach().clone() for parameter in peer.parameters()]
    floats = images.to(device).float() / 127.5 - 1

    def theirs() -> None:
        x_0 = floats[torch.randint(0, len(floats), (batch_size,), device=device)]
        noise = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (batch_size,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = peer(scheduler.add_noise(x_0, noise, t), t).sample
            loss = F.mse_loss(output.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average, peer.parameters(), strict=True):
                mean.lerp_(parameter, 0.001)

    return ours, theirs, difference


if __name__ == "__main__":
    main()
