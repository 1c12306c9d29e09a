"""What a sampler costs on top of the network: time per step over the bare network calls in it.

    python scripts/bench_sampling.py                 every sampler, unet_small, batch 64 at 28×28

A sampler's run and as many bare calls of the same network on the same batch take turns; the median of the pairwise
ratios is printed, and at the end what a step's random numbers cost, which belong to each image.
"""

import argparse
import os
import statistics

import torch
from timing import seconds

from ddpm.build import network, schedule
from ddpm.cli.hydra_app import compose
from ddpm.config import TrainConfig, check, choices
from ddpm.datasets.types import Facts
from ddpm.randomness import normal
from ddpm.sampling import Guidance, Model, denoiser, draw, last


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(
        f"{os.uname().machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}, ",
        end="",
    )
    print(f"batch {options.batch_size}, {options.steps} steps, median of {options.rounds}")

    index = torch.arange(options.batch_size, device=device)
    for name in choices("sampler"):
        model = make_model(name, options.steps, device)
        x, t = normal(0, "x", 0, index, model.shape), torch.full((options.batch_size,), 500.0, device=device)
        calls = int(evaluations(model, index))

        def sampler(model: Model = model) -> None:
            choice = model.config.sampler
            last(draw(model, choice, denoiser(model, choice, None, Guidance()), index, 0))

        @torch.inference_mode()
        def bare(model: Model = model, x: torch.Tensor = x, t: torch.Tensor = t, calls: int = calls) -> None:
            for _ in range(calls):
                model.network(x, t, None)

        pairs = [(seconds(sampler, device), seconds(bare, device)) for _ in range(options.rounds + 1)][1:]
        ratios = sorted(a / b - 1 for a, b in pairs)
        print(
            f"{name:<13} {calls:>3} evaluations, {1000 * statistics.median(b for _, b in pairs) / calls:7.1f} ms each; "
            f"overhead median {100 * statistics.median(ratios):+.2f} % "
            f"({100 * ratios[0]:+.2f} to {100 * ratios[-1]:+.2f})"
        )
    noise = [seconds(lambda: normal(0, "sampler", 0, index, (1, 28, 28)), device) for _ in range(50)]
    plain = [
        seconds(lambda: torch.randn(options.batch_size, 1, 28, 28, device=device), device) for _ in range(50)
    ]
    print(
        f"noise of one step: {1000 * statistics.median(noise):.2f} ms by image index, "
        f"torch.randn {1000 * statistics.median(plain):.2f} ms"
    )


def make_model(sampler: str, steps: int, device: torch.device) -> Model:
    overrides = ["dataset=mnist", "model=unet_small", f"sampler={sampler}", f"sampler.num_steps={steps}"]
    config = check(TrainConfig, compose("train", overrides))
    facts = Facts("mnist", 1, 28, 10, tuple("0123456789"), 256)
    net = network(config.model, config.objective, facts).to(device, memory_format=torch.channels_last).eval()
    return Model(net, schedule(config.schedule), config, facts, device)


def evaluations(model: Model, index: torch.Tensor) -> float:
    denoise = denoiser(model, model.config.sampler, None, Guidance())
    last(draw(model, model.config.sampler, denoise, index[:1], 0))
    return denoise.evaluations


if __name__ == "__main__":
    main()
