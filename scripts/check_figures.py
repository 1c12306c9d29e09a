"""Which figure notices what: real training images, spoiled in known ways, held against the test images by ddpm-eval.

Prints the table of docs/evaluation.md. The first row is of real images as they are, drawn several times: mean ±
standard deviation. Bold: worse than that mean by more than four such deviations.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.data.dataset import Split
from ddpm.data.datasets import DATASETS
from ddpm.errors import UserError
from ddpm.evaluate import evaluator
from ddpm.evaluate.reference import Reference, Samples
from ddpm.runtime.randomness import normal, permutation

DRAWS = 5  # of real images
NOTICED = 4  # standard deviations
COPIES = 10  # of each image, where images repeat
# And which way is better, as in `table.ROWS`; 0: neither.
FIGURES = {
    "fd_excess": -1,
    "class_fd_excess": -1,
    "pixel_fd_excess": -1,
    "kid": -1,
    "precision": 1,
    "recall": 1,
    "density": 0,
    "coverage": 1,
    "confident": 1,
    "rarest_class": 1,
}


def draw(split: Split, n: int, index: int) -> Split:
    """n training images at random."""
    assert split.labels is not None
    chosen = permutation(0, "check_figures", index, len(split))[:n]
    return Split(split.images[chosen], split.labels[chosen])


def blurred(images: Tensor) -> Tensor:
    """By 1-2-1 along each side."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    channels = images.shape[1]
    kernel = torch.outer(line, line).expand(channels, 1, 3, 3)
    return F.conv2d(images.float(), kernel, padding=1, groups=channels).round().to(torch.uint8)


def noisy(images: Tensor, strength: float) -> Tensor:
    noise = normal(0, "check_figures/noise", 0, torch.arange(len(images)), tuple(images.shape[1:]))
    return (images + strength * noise).clamp(0, 255).round().to(torch.uint8)


def spoiled(train: Split, n: int) -> dict[str, Tensor]:
    """n images each, uint8."""
    assert train.labels is not None
    real, others = draw(train, n, 0).images, train.labels != 1
    without = draw(Split(train.images[others], train.labels[others]), n, 0)
    return {
        "blurred (1-2-1)": blurred(real),
        "noise, 10 of 255": noisy(real, 10),
        "noise, 30 of 255": noisy(real, 30),
        "one class missing": without.images,
        f"each image {COPIES} times": real[torch.arange(n) // COPIES],
        "inverted": 255 - real,
    }


def figures(bench: Reference, images: Tensor) -> dict[str, float]:
    evaluation, _ = evaluator.measure(Samples(images, None, bench), subject="check")
    return {name: evaluation.figures[name].value for name in FIGURES if name in evaluation.figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", nargs="?", default="mnist", choices=sorted(set(DATASETS) - {"folder"}))
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("DDPM_DATA", "data")))
    parser.add_argument("--n", type=int, default=2_000)
    args = parser.parse_args()
    try:
        data = DATASETS[args.dataset](args.data_root)
        parts = ("distance", "neighbours")
        bench = Reference(data, parts, args.n, torch.device("cpu"), print)
        real = [figures(bench, draw(data.train, args.n, index).images) for index in range(DRAWS)]
        found = {name: figures(bench, images) for name, images in spoiled(data.train, args.n).items()}
    except UserError as error:
        sys.exit(f"error: {error}")
    for line in table(real, found):
        print(line)


def table(real: list[dict[str, float]], found: dict[str, dict[str, float]]) -> list[str]:
    """In Markdown."""
    names = [name for name in FIGURES if name in real[0]]
    rows = [["images", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 1)]
    usual = {
        name: (mean(values), stdev(values)) for name in names if (values := [each[name] for each in real])
    }
    rows.append(["real", *(f"{middle:.3f} ± {spread:.3f}" for middle, spread in usual.values())])
    for kind, values in found.items():
        row = [kind]
        for name, (middle, spread) in usual.items():
            off, better = values[name] - middle, FIGURES[name]
            worse = -better * off if better else abs(off)
            row.append(f"**{values[name]:.3f}**" if worse > NOTICED * spread else f"{values[name]:.3f}")
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    main()
