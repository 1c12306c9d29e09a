"""Image i of a seed is the same whatever is drawn beside it: shows by how much it is not.

    python scripts/check_seeds.py CHECKPOINT [--n 64] [--steps 20]

Draws n images at once, in batches of 7 and one index alone, with every sampler, and prints the largest difference of
any pixel in [-1, 1] and in grey levels. The random numbers are bit for bit the same; what remains is float32 rounding
(about 1e-7) of convolutions that sum in another order for another batch size, magnified by the steps. Exits with 1 if
a difference passes 0.01 (about one of 255 grey levels), far above rounding and far below another image.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm.checkpoint import locate
from ddpm.config.choices import Component, choices
from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.io.images import to_uint8
from ddpm.sample.model import Guidance, Model, denoiser, labels, load
from ddpm.sample.sampling import draw, last

TOLERANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load(locate.find(options.checkpoint), device)
    worst = 0.0
    for name in choices("sampler"):
        overrides = [f"sampler={name}", f"sampler.num_steps={options.steps}"]
        sampler = check(TrainConfig, compose("train", overrides)).sampler
        index = torch.arange(options.n, device=device)
        whole = images(model, sampler, index)
        parts = torch.cat([images(model, sampler, part) for part in split(index, 7)])
        alone = images(model, sampler, index[-1:])
        differences = []
        for a, b in ((whole, parts), (whole[-1:], alone)):
            levels = abs(to_uint8(a).astype(int) - to_uint8(b).astype(int)).max()
            differences.append(f"{(a - b).abs().max():.1e} ({levels} of 255)")
            worst = max(worst, float((a - b).abs().max()))
        print(f"{name:<13} batches of 7: {differences[0]:<22} image {options.n - 1} alone: {differences[1]}")
    print(f"largest difference {worst:.1e}, allowed {TOLERANCE}")
    sys.exit(worst > TOLERANCE)


def images(model: Model, sampler: Component, index: Tensor) -> Tensor:
    y = labels(model, None, index, Guidance())
    return last(draw(model, sampler, denoiser(model, sampler, y, Guidance()), index, 0)).cpu()


def split(index: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(index), size):
        yield index[start : start + size]


if __name__ == "__main__":
    main()
