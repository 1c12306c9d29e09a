"""From what was seen of images to named figures, each with its error or floor; a note where images are too few."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset, Split
from ddpm.evaluate.metrics.cas import accuracy_score
from ddpm.evaluate.metrics.frechet import (
    class_frechet,
    frechet_distance,
    frechet_floor,
    frechet_interval,
    gaussian,
    kid,
)
from ddpm.evaluate.metrics.memorization import Memorization
from ddpm.evaluate.metrics.prdc import prdc
from ddpm.evaluate.record import Figure
from ddpm.runtime.randomness import permutation

PER_DIMENSION = 4  # images for each dimension: with fewer, neither distance nor floor means much
NEIGHBOURS = 5  # k of precision, recall, density and coverage
FEWEST = 50  # images for these
PER_CLASS = 10  # images of each class to train a classifier with
CONFIDENT = 0.95
_SEED = 20_261_121  # by which real images are taken: the same for every subject, whatever its own seed


class Seen(NamedTuple):
    """Images as they are compared, all of one set in one order."""

    features: Tensor  # float64 (N, d), whitened on the training images
    pixels: Tensor  # float64 (N, p), likewise
    probabilities: Tensor | None  # (N, num_classes); None: the features know no classes

    @property
    def classes(self) -> Tensor | None:
        """The likeliest class of each, int64 (N,)."""
        return None if self.probabilities is None else self.probabilities.argmax(1)


def distances(seen: Seen, test: Seen, num_classes: int, notes: list[str]) -> dict[str, Figure]:
    """Fréchet distances, over all and within classes, in features and in pixels; the kernel distance."""
    found = dict[str, Figure]()
    n = min(len(seen.features), len(test.features))
    for name, x, y in (("", seen.features, test.features), ("pixel_", seen.pixels, test.pixels)):
        needed = PER_DIMENSION * x.shape[1]
        if n < needed:
            notes.append(f"no {name}fd: it needs {needed} images on either side, there are {n}")
            continue
        distance, excess = frechet_distance(gaussian(x), gaussian(y)), frechet_interval(x, y)
        floor = distance - excess.value
        found[f"{name}fd"] = Figure(distance, floor=frechet_floor(len(x), len(y), x.shape[1]), n=n)
        found[f"{name}fd_excess"] = Figure(*excess, floor=floor, n=n)
    if seen.classes is not None and test.classes is not None and n > 1:
        within = class_frechet(seen.features, seen.classes, test.features, test.classes, num_classes)
        if within.mean_excess is None:
            notes.append("no class_fd_excess: no class has enough images")
        else:
            floors = [floor for floor in within.floors if floor is not None]
            found["class_fd_excess"] = Figure(within.mean_excess, floor=sum(floors) / len(floors), n=n)
            if within.left_out:
                left = ", ".join(map(str, within.left_out))
                notes.append(f"class_fd_excess is without the classes {left}, which have too few images")
    if n >= FEWEST:
        value, error = kid(seen.features, test.features)
        found["kid"] = Figure(value, error=error, n=n)
    else:
        notes.append(f"no kid: it needs {FEWEST} images on either side, there are {n}")
    return found


def neighbours(seen: Seen, test: Seen, notes: list[str]) -> dict[str, Figure]:
    """Precision, recall, density and coverage of as many samples as test images, drawn at random where they differ."""
    x, y = seen.features, test.features
    n = min(len(x), len(y))
    if n < FEWEST:
        notes.append(
            f"no precision, recall, density, coverage: they need {FEWEST} images on either side, there are {n}"
        )
        return {}
    result = prdc(_equal(y, n), _equal(x, n), NEIGHBOURS)
    shares = {name: getattr(result, name) for name in ("precision", "recall", "density", "coverage")}
    return {name: Figure(value, n=n, text=f"k={result.k}") for name, value in shares.items()}


def _equal(x: Tensor, n: int) -> Tensor:
    return x if len(x) == n else x[permutation(_SEED, "equal", 0, len(x))[:n]]


def classes(seen: Seen, meant: Tensor | None, names: Sequence[str]) -> dict[str, Figure]:
    """How sure a classifier is of the images, how often of the class they were meant to be, and the rarest and the
    most frequent class.
    """
    if seen.probabilities is None or seen.classes is None:
        return {}
    shares = histogram(seen)
    n, rarest, most = len(seen.classes), int(shares.argmin()), int(shares.argmax())
    confident = seen.probabilities.max(1).values >= CONFIDENT
    found = {"confident": _share(confident, f"p ≥ {CONFIDENT}")}
    if meant is not None:
        found["right_class"] = _share(seen.classes == meant)
    for name, which in (("rarest_class", rarest), ("most_frequent_class", most)):
        text = names[which] if names else str(which)
        found[name] = Figure(shares[which].item(), n=n, text=text)
    return found


def histogram(seen: Seen) -> Tensor:
    """Share of each class, float64 (num_classes,)."""
    assert seen.probabilities is not None and seen.classes is not None
    counts = torch.bincount(seen.classes, minlength=seen.probabilities.shape[1])
    return counts.double() / len(seen.classes)


def _share(which: Tensor, text: str | None = None) -> Figure:
    """Of a bool (N,), with its standard error."""
    share, n = which.double().mean().item(), len(which)
    return Figure(share, error=(share * (1 - share) / n) ** 0.5, n=n, text=text)


def some(split: Split, name: str, n: int) -> Split:
    """n images drawn at random, all if there are fewer: test sets may be sorted, by class or by difficulty."""
    if n >= len(split):
        return split
    chosen = permutation(_SEED, name, 0, len(split))[:n]
    return Split(split.images[chosen], None if split.labels is None else split.labels[chosen])


def copied(found: Memorization) -> dict[str, Figure]:
    """Shares of samples that lie closer to a training image than all but 1 % of the test images do."""
    text = f"{found.identical} to the bit"
    return {
        "memorized": Figure(found.share, error=found.share_error, n=found.searched, text=text),
        "memorized_relative": Figure(
            found.relative_share, error=found.relative_share_error, n=found.searched
        ),
        "real_memorized": Figure(found.expected, n=found.n_test),
        "real_memorized_relative": Figure(found.expected, n=found.n_test),
    }


def classification(
    images: Tensor,
    labels: Tensor,
    data: Dataset,
    seed: int,
    device: torch.device,
    notes: list[str],
) -> dict[str, Figure]:
    """The classification accuracy score on all test images, and beside it that of as many real training images."""
    train, test, k = data.train, data.test, data.facts.num_classes
    assert train.labels is not None and test.labels is not None
    n = min(len(images), len(train))
    if n < PER_CLASS * k:
        notes.append(f"no cas: it needs {PER_CLASS * k} images with labels, there are {n}")
        return {}
    real = some(train, "cas", n)
    assert real.labels is not None
    found = dict[str, Figure]()
    for name, x, y in (("cas", images[:n], labels[:n]), ("real_cas", real.images, real.labels)):
        score = accuracy_score(x, y, test.images, test.labels, k, seed, device)
        found[name] = Figure(score.value, error=score.error, n=n)
    return found


class Known(NamedTuple):
    """Digests of real images."""

    test: frozenset[bytes]
    train: frozenset[bytes]


def known(data: Dataset) -> Known:
    return Known(frozenset(_digests(data.test.images)), frozenset(_digests(data.train.images)))


def copies(images: Tensor, real: Known) -> list[str]:
    """Notes on images that are somewhere else to the bit: a distance to themselves says nothing."""
    own, n = _digests(images), len(images)
    inside, seen = (sum(each in digests for each in own) for digests in real)
    repeated = n - len(set(own))
    notes = []
    if inside:
        notes.append(
            f"{inside:,} of {n:,} images are test images themselves: by construction they lie at distance 0"
        )
    if seen:
        notes.append(f"{seen:,} of {n:,} images are training images, to the bit")
    if repeated:
        notes.append(f"{repeated:,} of {n:,} images repeat another one of them, to the bit")
    return notes


def _digests(images: Tensor) -> list[bytes]:
    """Of each of uint8 (N, C, S, S). A tensor for each image would take ten times as long."""
    pixels, size = images.contiguous().numpy().tobytes(), images[0].numel()
    return [
        hashlib.blake2b(pixels[start : start + size], digest_size=16).digest()
        for start in range(0, len(pixels), size)
    ]
