"""Are samples copies of training images? Their nearest training images, against those of held-out images.

Some images lie close to a training image by nature (ones, blank corners), so a distance alone says nothing: the
same search is made for test images, which cannot have been copied, and what 1 % of these fall below is the line.
"""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Found, Reference, Samples
from ddpm.runtime.randomness import permutation

QUANTILE = 0.01
ANGLES = (-10.0, -5.0, 0.0, 5.0, 10.0)  # degrees
LARGE = 16  # pixels a side; below it a shift by two or a turn makes another digit
LOOKS = (-8.0, 0.0, 8.0)  # degrees by which an image is turned to find candidates
CANDIDATES = 6  # training images searched for each look, besides the nearest one
SEARCHED = (
    4000  # images of each set for which moved copies are searched, drawn at random; takes most of the time
)
FEW = 500  # test images, below which the quantile rests on fewer than five of them
CHUNK_ELEMENTS = 1 << 24  # numbers in a table of distances or of turned images held at a time


class Pair(NamedTuple):
    """A sample and the training image closest to it, if that is moved by (down, right) pixels after a turn."""

    sample: int
    train: int
    distance: float
    relative: float  # distance over the typical distance of its neighbourhood
    down: int
    right: int
    degrees: float


class Quantiles(NamedTuple):
    """1 % of a set's images lie below: nearest distance, first over second distance, distance after the search."""

    nearest: float
    ratio: float
    searched: float
    relative: float


@dataclass(frozen=True)
class Memorization:
    """Distances are Euclidean, of pixels in 0 … 1.

    `share` of the samples is closer to a training image, after the search, than all but 1 % of the test images;
    `relative_share` the same for distances over their mean over the candidates, which does not take a common
    shape for a copy, nor misses the copy of a rare one; but samples that all lie off centre by the whole reach of the
    search raise it a little without any copy (held-out digits moved by 2 and 2: 0.02 to 0.06). Where nothing is
    copied both are `expected`, 0.01, up to `expected_error`, binomial in what was searched of both sets.
    `identical` of all n samples equal a training image in every pixel. Where 1 % of the test images do, too, the line
    is 0: what lies on it counts then, and `expected` is the share of the test images that do.
    """

    n: int
    n_train: int
    n_test: int
    searched: int  # of the n samples
    share: float
    share_error: float
    relative_share: float
    relative_share_error: float
    expected: float
    expected_error: float
    identical: int
    samples: Quantiles
    test: Quantiles
    pairs: tuple[Pair, ...]  # by relative distance, closest first
    notes: tuple[str, ...]  # what cannot be told, and why


class _Search(NamedTuple):
    nearest: Tensor  # (N,) distance to the nearest training image as it is
    ratio: Tensor  # (N,) of that to the second distance
    distance: Tensor  # (M,) after the search
    relative: Tensor  # (M,)
    train: Tensor  # (M,) index of the training image found by the search
    move: Tensor  # (M,) index into `_moves`
    image: Tensor  # (M,) of the N images, that was searched for


def copied(samples: Samples, reference: Reference) -> Found:
    """Compute the shares of samples that lie closer to a training image than all but 1 % of the test images do."""
    found = memorization(samples.images, reference.data.train.images, reference.split.images)
    n, text = found.searched, f"{found.identical} to the bit"
    values = {
        "memorized": Metric(found.share, error=found.share_error, n=n, text=text),
        "memorized_relative": Metric(found.relative_share, error=found.relative_share_error, n=n),
        "real_memorized": Metric(found.expected, n=found.n_test),
        "real_memorized_relative": Metric(found.expected, n=found.n_test),
    }
    details = {
        **asdict(found),
        "samples": found.samples._asdict(),
        "test": found.test._asdict(),
        "pairs": [pair._asdict() for pair in found.pairs],
    }
    return Found(values, found.notes, {"memorization": details})


def memorization(samples: Tensor, train: Tensor, test: Tensor, num_pairs: int = 16) -> Memorization:
    """Search for copies. samples (N, C, H, W), train and test likewise, uint8 on the CPU.

    The nearest training image is exact, of every image. For at most `SEARCHED` of each set moved copies are searched:
    candidates are that one and the nearest 18 among the images centred, blurred and halved; from 16 pixels a side on
    they are shifted by up to 2 pixels and turned by up to 10°, smaller ones shifted by 1. Raises ValueError if the
    images are not uint8 of one shape, or a set is too small.
    """
    for name, images, least in (("samples", samples, 1), ("train", train, 2), ("test", test, 1)):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"{name}: must be uint8 (N, C, H, W) like the samples, not {images.dtype} {tuple(images.shape)}"
            )
        if len(images) < least:
            raise ValueError(f"{name}: {len(images)} images; at least {least}")
    coarse = _coarse(train)
    own, held = _search(samples, train, coarse), _search(test, train, coarse)
    lines, n, n_test = _quantiles(held), len(own.image), len(held.image)
    share, relative_share = _below(own.distance, lines.searched), _below(own.relative, lines.relative)
    expected = QUANTILE if lines.searched > 0 else _below(held.distance, 0.0)
    moves = _moves(samples.shape[-1])
    order = own.relative.argsort(stable=True)[:num_pairs].tolist()
    return Memorization(
        n=len(samples),
        n_train=len(train),
        n_test=len(test),
        searched=n,
        share=share,
        share_error=math.sqrt(share * (1 - share) / n),
        relative_share=relative_share,
        relative_share_error=math.sqrt(relative_share * (1 - relative_share) / n),
        expected=expected,
        expected_error=math.sqrt(expected * (1 - expected) * (1 / n + 1 / n_test)),
        identical=int((own.nearest == 0).sum()),
        samples=_quantiles(own),
        test=lines,
        pairs=tuple(
            Pair(
                int(own.image[i]),
                int(own.train[i]),
                float(own.distance[i]),
                float(own.relative[i]),
                *moves[int(own.move[i])],
            )
            for i in order
        ),
        notes=_notes(n, n_test, expected if lines.searched == 0 else 0.0),
    )


def _below(values: Tensor, line: float) -> float:
    """The share below a line; on it, where nothing can be below."""
    return float(((values < line) if line > 0 else (values == 0)).double().mean())


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


def _quantiles(search: _Search) -> Quantiles:
    return Quantiles(*(float(torch.quantile(v.double(), QUANTILE)) for v in (search[:4])))


def _search(images: Tensor, train: Tensor, coarse: Tensor) -> _Search:
    flat, flat_train = images.flatten(1), train.flatten(1)
    _, index = nearest(flat, flat_train, 2)
    exact = torch.stack([(flat / 255 - flat_train[index[:, i]] / 255).norm(dim=1) for i in (0, 1)], 1)
    exact, order = exact.sort(dim=1, stable=True)  # without cancellation, which may have turned their order
    index = index.gather(1, order)
    ratio = torch.where(exact[:, 1] > 0, exact[:, 0] / exact[:, 1], 1.0)
    chosen = permutation(0, "memorization", 0, len(images))[:SEARCHED].sort().values
    images, index, first = images[chosen], index[chosen], exact[chosen, 0]
    looks = LOOKS if images.shape[-1] >= LARGE else (0.0,)
    found = [nearest(_coarse(images, look), coarse, min(CANDIDATES, len(train)))[1] for look in looks]
    close = torch.cat([index[:, :1], *found], 1)
    distance, typical, place, move = _moved_distances(images, train, close)
    still = first <= distance + 1e-3  # rounding must not choose a move over none
    distance = torch.where(still, first, distance)
    place, move = (
        place.masked_fill(still, 0),
        move.masked_fill(still, _moves(images.shape[-1]).index((0, 0, 0.0))),
    )
    relative = torch.where(typical > 0, distance / typical, 0.0)
    found_in = close.gather(1, place[:, None])[:, 0]
    return _Search(exact[:, 0], ratio, distance, relative, found_in, move, chosen)


def nearest(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distance in 0 … 1 pixels and index of the k nearest of y (M, D) to each of x (N, D): (N, k) each.

    uint8 or float in 0 … 255. By float32 matrix products, so off by rounding of |x|².
    """
    step = max(1, CHUNK_ELEMENTS // y.shape[1])
    best = torch.full((len(x), k), torch.inf)
    index = torch.zeros((len(x), k), dtype=torch.int64)
    for start in range(0, len(y), step):
        part = y[start : start + step].float() / 255
        norms = part.square().sum(1)
        for first in range(0, len(x), rows := max(1, CHUNK_ELEMENTS // len(part))):
            some = slice(first, first + rows)
            a = x[some].float() / 255
            table = torch.addmm(norms, a, part.T, alpha=-2)
            values, places = table.topk(min(k, len(part)), dim=1, largest=False)
            values = torch.cat([best[some], values + a.square().sum(1, keepdim=True)], 1)
            both = torch.cat([index[some], places + start], 1)
            best[some], order = values.topk(k, dim=1, largest=False)
            index[some] = both.gather(1, order)
    return best.clamp_(min=0), index


def _coarse(images: Tensor, degrees: float = 0.0) -> Tensor:
    """Images turned, centred by their mass and lightly blurred, every second pixel if large: (N, D) float32 in 0 … 255.

    Centred, for else a copy moved by two pixels is farther off than hundreds of other images, and never searched.
    """
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    _, channels, height, width = images.shape
    stride = 2 if min(height, width) >= LARGE else 1
    weight = torch.outer(kernel, kernel).expand(channels, 1, 5, 5)
    coarse = []
    for part in torch.split(images, max(1, CHUNK_ELEMENTS // (channels * height * width))):
        padded = F.pad(_centred(turn(part.float(), degrees)), (2, 2, 2, 2), mode="replicate")
        coarse.append(F.conv2d(padded, weight, stride=stride, groups=channels).flatten(1))
    return torch.cat(coarse)


def _centred(x: Tensor) -> Tensor:
    """Images (N, C, H, W), each shifted (by parts of pixels too) until what differs from its border is centred."""
    rows, columns = (torch.linspace(-1 + 1 / size, 1 - 1 / size, size) for size in x.shape[2:])
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values
    mass = (x - border[:, :, None, None]).square().sum(1)
    total = mass.sum((1, 2)).clamp(min=1e-6)
    down, right = (mass.sum(2) @ rows) / total, (mass.sum(1) @ columns) / total
    matrix = torch.eye(2, 3).repeat(len(x), 1, 1)
    matrix[:, :, 2] = torch.stack([right, down], 1)
    return _warp(x, matrix)


def _moves(size: int) -> list[tuple[int, int, float]]:
    """Shifts (down, right) and angles that are searched for images of this size."""
    reach, angles = (2, ANGLES) if size >= LARGE else (1, (0.0,))
    steps = range(-reach, reach + 1)
    return [(down, right, angle) for angle in angles for down, right in itertools.product(steps, steps)]


def _moved_distances(images: Tensor, train: Tensor, close: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least distance (N,) of images (N, C, H, W) to their candidates close (N, K) over all moves.

    With it their mean over all candidates but the first (N,), and which candidate and move (N,) it was.
    Turned are the candidates, shifted the images (the other way), whose borders are repeated outwards.
    """
    size = images.shape[-1]
    angles = sorted({angle for _, _, angle in _moves(size)})
    reach = max(down for down, _, _ in _moves(size))
    k, results = close.shape[1], []
    step = max(1, CHUNK_ELEMENTS // (k * len(angles) * math.prod(images.shape[1:])))
    for part, chosen in zip(torch.split(images, step), torch.split(close, step), strict=True):
        x, y = part.float() / 255, train[chosen.flatten()].float() / 255
        turned = torch.stack([turn(y, angle) for angle in angles], 1)
        turned = turned.reshape(len(x), k * len(angles), -1)
        shifted = _shifted(x, reach)
        table = torch.baddbmm(shifted.square().sum(2)[:, None], turned, shifted.transpose(1, 2), alpha=-2)
        table = (table + turned.square().sum(2)[:, :, None]).clamp_(min=0).sqrt_()
        table = table.view(len(x), k, len(angles) * shifted.shape[1])
        least, where = table.flatten(1).min(1)
        moves = table.shape[2]
        results.append((least, table[:, 1:].amin(2).mean(1), where // moves, where % moves))
    least, typical, place, move = (torch.cat(parts) for parts in zip(*results, strict=True))
    return least, typical, place, move


def turn(images: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) float turned by an angle about their centre, bilinear, borders repeated outwards."""
    if degrees == 0:
        return images
    height, width = images.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    return _warp(images, matrix.expand(len(images), 2, 3))


def _warp(x: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _shifted(x: Tensor, reach: int) -> Tensor:
    """All shifts (N, (2 reach + 1)², C H W) of images (N, C, H, W): entry (d, r) has moved up by d, left by r."""
    height, width = x.shape[2:]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2 reach + 1, 2 reach + 1, H, W)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(len(x), (2 * reach + 1) ** 2, -1)
