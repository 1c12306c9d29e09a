"""Are samples copies of training images? Their nearest training images, against those of test images.

Some images lie close to a training image by nature (ones, blank corners), so a distance alone says nothing: the
same search is made for test images, which cannot have been copied, and what 1 % of these fall below is the line.
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Found, Reference, Samples

QUANTILE = 0.01
NEIGHBOURS = 50  # training images whose mean distance is the typical one thereabouts
FEW = 500  # test images, below which the quantile rests on fewer than five of them
CHUNK_ELEMENTS = 1 << 24  # numbers of images and of distances held at a time


class Pair(NamedTuple):
    """A sample and the training image closest to it."""

    sample: int
    train: int
    distance: float
    relative: float


class Distances(NamedTuple):
    """Of N images, or what 1 % of a set of images lie below."""

    nearest: Tensor  # to the nearest training image
    ratio: Tensor  # of that to the distance to the second
    relative: Tensor  # of that to the mean distance to the nearest 50


@dataclass(frozen=True)
class Memorization:
    """Distances are Euclidean, of pixels in 0 … 1.

    `share` of the samples is closer to a training image than all but 1 % of the test images; `relative_share` the same
    for the distance over the mean distance to the nearest 50 (Carlini et al. 2023, section 5.1), which neither takes a
    common shape for a copy nor misses the copy of a rare one. Where nothing is copied both are `expected`, 0.01, up to
    `expected_error`, binomial in both sets. `identical` samples equal a training image in every pixel. Where 1 % of the
    test images do, too, the line is 0: what lies on it counts then, and `expected` is the share of test images that do.
    """

    n: int
    n_train: int
    n_test: int
    share: float
    share_error: float
    relative_share: float
    relative_share_error: float
    expected: float
    expected_error: float
    identical: int
    samples: dict[str, float]  # 1 % lie below these `Distances`
    test: dict[str, float]
    pairs: tuple[Pair, ...]  # by relative distance, closest first
    notes: tuple[str, ...]  # what cannot be told, and why


def copied(samples: Samples, reference: Reference) -> Found:
    """Compute the shares of samples that lie closer to a training image than all but 1 % of the test images do."""
    found = memorization(samples.images, reference.data.train.images, reference.split.images)
    text = f"{found.identical} to the bit"
    values = {
        "memorized": Metric(found.share, error=found.share_error, n=found.n, text=text),
        "memorized_relative": Metric(found.relative_share, error=found.relative_share_error, n=found.n),
        "real_memorized": Metric(found.expected, n=found.n_test),
        "real_memorized_relative": Metric(found.expected, n=found.n_test),
    }
    details = {**asdict(found), "pairs": [pair._asdict() for pair in found.pairs]}
    return Found(values, found.notes, {"memorization": details})


def memorization(samples: Tensor, train: Tensor, test: Tensor, num_pairs: int = 16) -> Memorization:
    """Search for copies among uint8 images (N, C, H, W) on the CPU; exact, of every image.

    Raises ValueError if the images are not uint8 of one shape, or a set is too small.
    """
    for name, images, least in (("samples", samples, 1), ("train", train, 2), ("test", test, 1)):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"{name}: must be uint8 (N, C, H, W) like the samples, not {images.dtype} {tuple(images.shape)}"
            )
        if len(images) < least:
            raise ValueError(f"{name}: {len(images)} images; at least {least}")
    own, index = _distances(samples, train)
    held, _ = _distances(test, train)
    line, n, n_test = _quantiles(held), len(samples), len(test)
    share, relative_share = _below(own.nearest, line["nearest"]), _below(own.relative, line["relative"])
    expected = QUANTILE if line["nearest"] > 0 else _below(held.nearest, 0.0)
    order = own.relative.argsort(stable=True)[:num_pairs].tolist()
    return Memorization(
        n=n,
        n_train=len(train),
        n_test=n_test,
        share=share,
        share_error=math.sqrt(share * (1 - share) / n),
        relative_share=relative_share,
        relative_share_error=math.sqrt(relative_share * (1 - relative_share) / n),
        expected=expected,
        expected_error=math.sqrt(expected * (1 - expected) * (1 / n + 1 / n_test)),
        identical=int((own.nearest == 0).sum()),
        samples=_quantiles(own),
        test=line,
        pairs=tuple(Pair(i, int(index[i]), float(own.nearest[i]), float(own.relative[i])) for i in order),
        notes=_notes(n, n_test, expected if line["nearest"] == 0 else 0.0),
    )


def _below(values: Tensor, line: float) -> float:
    """The share below a line; on it, where nothing can be below."""
    return float(((values < line) if line > 0 else (values == 0)).double().mean())


def _quantiles(found: Distances) -> dict[str, float]:
    return {key: float(torch.quantile(values, QUANTILE)) for key, values in found._asdict().items()}


def _distances(images: Tensor, train: Tensor) -> tuple[Distances, Tensor]:
    """Of each of the images (N,), and the index of its nearest training image (N,)."""
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


def _notes(n: int, n_test: int, repeated: float) -> tuple[str, ...]:
    notes = []
    if repeated:
        notes.append(
            f"memorization: {100 * repeated:.1f} % of the test images equal a training image, so the 1 % line is 0 and "
            "only samples that equal one count"
        )
    if n_test < FEW:
        notes.append(
            f"memorization: the 1 % line rests on {max(1, n_test // 100)} of {n_test} test images; "
            "a few copies more or less cannot be told"
        )
    if n < FEW:
        notes.append(
            f"memorization: {n} samples; copies in fewer than {max(1, math.ceil(300 / n))} % may be missed"
        )
    return tuple(notes)
