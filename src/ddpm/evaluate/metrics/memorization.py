"""Memorization: the distance of each sample to its nearest training image, compared with those of test images.

Simple images (the digit 1) lie close to a training image by chance, so a distance alone says nothing. Test images
cannot be copies: the limit is the distance that 1 % of them fall below.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Found, Reference, Samples

QUANTILE = 0.01
NEIGHBOURS = 50  # training images whose mean distance is the typical one thereabouts
FEW = 500  # test images, below which the quantile rests on fewer than five of them
CHUNK_ELEMENTS = 1 << 24  # numbers of images and of distances held at a time


class Distances(NamedTuple):
    """Distances of N images, (N,) each."""

    nearest: Tensor  # to the nearest training image
    ratio: Tensor  # of that to the distance to the second
    relative: Tensor  # of that to the mean distance to the nearest 50

    def quantiles(self) -> dict[str, float]:
        """Return the distances that 1 % of the images lie below."""
        return {key: float(torch.quantile(values, QUANTILE)) for key, values in self._asdict().items()}


def memorized(samples: Samples, reference: Reference) -> Found:
    """Compute the shares of samples that lie closer to a training image than all but 1 % of the test images do."""
    found = memorization(samples.images, reference.data.train.images, reference.split.images)
    n, expected = found["n"], Metric(found["expected"], n=found["n_test"])
    values = {
        "memorized": Metric(
            found["share"], error=found["share_error"], n=n, text=f"{found['identical']} identical"
        ),
        "memorized_relative": Metric(found["relative_share"], error=found["relative_share_error"], n=n),
        "real_memorized": expected,
        "real_memorized_relative": expected,
    }
    return Found(values, found["notes"], {"memorization": found})


def memorization(samples: Tensor, train: Tensor, test: Tensor, num_pairs: int = 16) -> dict[str, Any]:
    """Search for copies among uint8 images (N, C, H, W) on the CPU; exact, of every image.

    Distances are Euclidean, of pixels in 0 … 1. Returns plain data:
    - `share`: of the samples, closer to a training image than all but 1 % of the test images; `relative_share`: the
      same for the distance over the mean distance to the nearest 50 (Carlini et al. 2023, section 5.1), which neither
      takes a common shape for a copy nor misses the copy of a rare one; each with its binomial `…_error`;
    - `expected`: both shares where nothing is copied, 0.01, up to `expected_error`, binomial in both sets. Where 1 % of
      the test images equal a training image the limit is 0: then only samples that equal one count, and `expected` is
      the share of test images that do;
    - `identical`: samples that equal a training image in every pixel;
    - `samples`, `test`: 1 % of each lie below these `Distances`;
    - `pairs`: a sample and the training image closest to it, by relative distance, closest first;
    - `n`, `n_train`, `n_test`, and `notes`: what cannot be told, and why.
    """
    own, index = _distances(samples, train)
    held, _ = _distances(test, train)
    line, n, n_test = held.quantiles(), len(samples), len(test)
    shares = {"share": _below(own.nearest, line["nearest"])}
    shares["relative_share"] = _below(own.relative, line["relative"])
    expected = QUANTILE if line["nearest"] > 0 else _below(held.nearest, 0.0)
    order = own.relative.argsort(stable=True)[:num_pairs].tolist()
    keys = ("sample", "train", "distance", "relative")
    return {
        "n": n,
        "n_train": len(train),
        "n_test": n_test,
        **shares,
        **{f"{key}_error": math.sqrt(share * (1 - share) / n) for key, share in shares.items()},
        "expected": expected,
        "expected_error": math.sqrt(expected * (1 - expected) * (1 / n + 1 / n_test)),
        "identical": int((own.nearest == 0).sum()),
        "samples": own.quantiles(),
        "test": line,
        "pairs": [
            dict(zip(keys, (i, int(index[i]), float(own.nearest[i]), float(own.relative[i])), strict=True))
            for i in order
        ],
        "notes": _notes(n, n_test, expected if line["nearest"] == 0 else 0.0),
    }


def _below(values: Tensor, line: float) -> float:
    """Return the share of values (N,) below a limit, or equal to it where it is 0."""
    return float(((values < line) if line > 0 else (values == 0)).double().mean())


def _distances(images: Tensor, train: Tensor) -> tuple[Distances, Tensor]:
    """Return the distances of the images, and the index (N,) of each one's nearest training image."""
    squared, index = nearest(images.flatten(1), train.flatten(1), min(NEIGHBOURS, len(train)))
    distance = squared.sqrt()
    first, second, typical = distance[:, 0], distance[:, 1], distance.mean(1)
    ratio, relative = (torch.where(of > 0, first / of, 0.0) for of in (second, typical))
    return Distances(first, ratio, relative), index[:, 0]


def nearest(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest of y (M, D) to each of x (N, D), both uint8.

    Returns the squared distance of pixels in 0 … 1, float64 (N, k), and the index into y (N, k). They are chosen by
    float32 matrix products, a chunk of both at a time, then measured without rounding.
    """
    size = y.shape[1]
    columns = max(1, CHUNK_ELEMENTS // size)
    best = torch.full((len(x), k), torch.inf)
    index = torch.zeros((len(x), k), dtype=torch.int64)
    for start in range(0, len(y), columns):
        part = y[start : start + columns].float()
        norms = part.square().sum(1)
        for some in torch.split(torch.arange(len(x)), max(1, CHUNK_ELEMENTS // max(len(part), size))):
            table = torch.addmm(norms, x[some].float(), part.T, alpha=-2)  # less |x|²
            values, places = table.topk(min(k, len(part)), dim=1, largest=False)
            both = torch.cat([index[some], places + start], 1)
            best[some], order = torch.cat([best[some], values], 1).topk(k, dim=1, largest=False)
            index[some] = both.gather(1, order)
    exact = [
        (x[some, None].float() - y[index[some]].float()).square().sum(2, dtype=torch.float64)
        for some in torch.split(torch.arange(len(x)), max(1, CHUNK_ELEMENTS // (k * size)))
    ]
    squared, order = torch.cat(exact).sort(dim=1, stable=True)
    return squared / 255**2, index.gather(1, order)


def _notes(n: int, n_test: int, repeated: float) -> list[str]:
    notes = []
    if repeated:
        notes.append(
            f"memorization: {100 * repeated:.1f} % of the test images equal a training image, so the 1 % limit is 0 "
            "and only samples that equal one count"
        )
    if n_test < FEW:
        notes.append(
            f"memorization: the 1 % limit rests on {max(1, n_test // 100)} of {n_test} test images; "
            "a few copies more or less cannot be told"
        )
    if n < FEW:
        notes.append(
            f"memorization: {n} samples; copies in fewer than {max(1, math.ceil(300 / n))} % may be missed"
        )
    return notes
