"""What a metric compares: samples, and the images of a dataset that they are held against.

Everything is held against the test images, which no training saw.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset, Split
from ddpm.evaluate.features import large
from ddpm.evaluate.features.extractor import Features, features_for
from ddpm.evaluate.features.pixels import Projection, pixel_features
from ddpm.evaluate.record import Metric
from ddpm.runtime.randomness import permutation
from ddpm.runtime.world import ALONE, World
from ddpm.sample.model import Model

Z = 1.959964  # standard deviations of a Gaussian that hold 95 %
_SEED = 20_261_121  # by which real images are taken: the same for every subject, whatever its own seed


class Embedded(NamedTuple):
    """Images as they are compared, all of one set in one order."""

    features: Tensor  # float64 (N, d), whitened on the training images
    pixels: Tensor  # float64 (N, p), likewise
    probabilities: Tensor | None  # (N, num_classes); None: the features know no classes

    @property
    def classes(self) -> Tensor | None:
        """Return the likeliest class of each, int64 (N,)."""
        return None if self.probabilities is None else self.probabilities.argmax(1)


class Embedder(NamedTuple):
    """The feature network and the projection of pixels, both whitened on the training images."""

    features: Features
    pixels: Projection

    def embed(self, images: Tensor) -> Embedded:
        """Embed uint8 images (N, C, S, S)."""
        found = self.features.embed(images)
        return Embedded(found.features, self.pixels(images), found.probabilities)


@dataclass(eq=False)
class Reference:
    """The real images that sets of samples are compared with. What is expensive is computed once, when first used."""

    data: Dataset
    parts: tuple[str, ...]  # names in METRICS
    n: int  # real images taken of each split, at most
    device: torch.device
    say: Callable[[str], None] = lambda text: None  # is told what takes long
    features: tuple[str, str | None] = ("own", None)  # kind and folder, see `features_for`

    @cached_property
    def split(self) -> Split:
        """Draw at most n test images."""
        return choose(self.data.test, "test", self.n)

    @cached_property
    def embedder(self) -> Embedder:
        """Load or train the features. Raises UserError where there are none for this dataset."""
        features = features_for(self.data, self.device, self.say, *self.features)
        return Embedder(features, pixel_features(self.data.train.images))

    @cached_property
    def inception(self) -> tuple[large.Run, str]:
        """Load Inception, whose features are those of the customary FID. Raises UserError."""
        return large.inception(self.data.facts, self.device, self.say)

    @cached_property
    def test(self) -> Embedded:
        """Embed the images of `split`."""
        return self.embedder.embed(self.split.images)

    @cached_property
    def train(self) -> Embedded:
        """Embed at most n training images."""
        return self.embedder.embed(choose(self.data.train, "train", self.n).images)

    @cached_property
    def fingerprints(self) -> tuple[frozenset[bytes], frozenset[bytes]]:
        """Hash all test and all training images."""
        return frozenset(digests(self.data.test.images)), frozenset(digests(self.data.train.images))

    @property
    def embeds(self) -> bool:
        """Return whether features have been used so far."""
        return "embedder" in vars(self)


@dataclass(frozen=True, eq=False)
class Samples:
    """The images under evaluation: uint8 (n, C, S, S). labels (n,): the class each was meant to show, or None.

    `model` drew them; None: they are from elsewhere. `seed` is that of every random choice of a metric.
    """

    images: Tensor
    labels: Tensor | None
    reference: Reference
    seed: int = 0
    model: Model | None = None
    batch_size: int = 256  # of the model's evaluations, which are shared among the processes of `world`
    world: World = ALONE

    @cached_property
    def embedded(self) -> Embedded:
        """Embed the images."""
        return self.reference.embedder.embed(self.images)


@dataclass(frozen=True)
class Found:
    """What a metric returns: values by name, why some are absent, and further fields of `Evaluation`."""

    values: Mapping[str, Metric] = field(default_factory=dict)
    notes: Sequence[str] = ()
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # histogram, curves, memorization

    def beside(self, real: "Found") -> "Found":
        """Add what the same metric makes of real images, as `real_…`."""
        values = {**self.values, **{f"real_{name}": value for name, value in real.values.items()}}
        return replace(
            self, values=values, notes=[*self.notes, *(f"real images: {note}" for note in real.notes)]
        )


def choose(split: Split, name: str, n: int) -> Split:
    """Draw n images at random, all if there are fewer: test sets may be sorted, by class or by difficulty."""
    if n >= len(split):
        return split
    chosen = permutation(_SEED, name, 0, len(split))[:n]
    return Split(split.images[chosen], None if split.labels is None else split.labels[chosen])


def choose_rows(x: Tensor, n: int) -> Tensor:
    """Draw n rows of x (N, d) at random, all if there are no more."""
    return x if len(x) <= n else x[permutation(_SEED, "equal", 0, len(x))[:n]]


def proportion(which: Tensor, text: str | None = None) -> Metric:
    """Return the share of a bool tensor (N,), its binomial standard error and its 95 % interval (Wilson 1927)."""
    share, n = which.double().mean().item(), len(which)
    middle, part = share + Z**2 / (2 * n), 1 + Z**2 / n
    half = Z * (share * (1 - share) / n + (Z / (2 * n)) ** 2) ** 0.5
    low, high = min(share, (middle - half) / part), max(share, (middle + half) / part)
    return Metric(share, low, high, error=(share * (1 - share) / n) ** 0.5, n=n, text=text)


def digests(images: Tensor) -> list[bytes]:
    """Hash each of uint8 images (N, C, S, S). Slices bytes, as a tensor for each would take ten times as long."""
    pixels, size = images.contiguous().numpy().tobytes(), images[0].numel()
    return [
        hashlib.blake2b(pixels[start : start + size], digest_size=16).digest()
        for start in range(0, len(pixels), size)
    ]


def copies(images: Tensor, reference: Reference) -> list[str]:
    """Note samples that are identical to a test image, a training image or another sample."""
    own, n = digests(images), len(images)
    inside, seen = (sum(each in split for each in own) for split in reference.fingerprints)
    notes = []
    if inside:
        notes.append(
            f"{inside:,} of {n:,} images are test images themselves: by construction they lie at distance 0"
        )
    if seen:
        notes.append(f"{seen:,} of {n:,} images are identical to a training image")
    if repeated := n - len(set(own)):
        notes.append(f"{repeated:,} of {n:,} images are identical to another one of them")
    return notes
