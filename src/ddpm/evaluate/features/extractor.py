"""Features of images: what distances between sets of images are measured in. Shipped for `digits` and `mnist`.

A classifier's last layer before its logits collapses to the class histogram (Papyan, Han & Donoho 2020, *Prevalence of
neural collapse*), so these are statistics of earlier layers, which also had to reconstruct the image. They are whitened
on the training images: over these, every feature has mean 0 and variance 1 and none is correlated with another, so the
Fréchet distance of two finite sets has a floor known in advance (`frechet.frechet_floor`).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError
from ddpm.evaluate.features import large
from ddpm.evaluate.features.network import FeatureNetwork, Whitening, dimensions, spread_out, whitening
from ddpm.evaluate.features.training import Recipe, run, train_features
from ddpm.io.cache import Arrays, cache_folder, content_hash, load_arrays, save_arrays
from ddpm.io.files import leftovers, reason

ASSETS = Path(__file__).parent / "assets"
MAX_BYTES = 1 << 22  # of a file of weights; those shipped have a quarter of a million
RECIPE = 1  # count up when network or training change, so that no older cache is used
SEED = 0
RECIPES = {"digits": Recipe(steps=500, lr=4e-3)}
USUAL = Recipe(steps=1_500, lr=4e-3)
FEWEST = 10_000  # training images to train features on
SIZES = range(16, 65)  # pixels a side, for features that are trained here
CLASSES = range(2, 101)
WHITENED_ON = 10_000  # training images that the whitening of Inception features is made from

# What is shipped, by (dataset, image size): the hash of its content.
SHIPPED = {
    ("digits", 8): "7ab093a76f43888e876f841d044acc66426b866202b5285188413a0425d536bf",
    ("mnist", 28): "c093c7131a66548e10a9e2157c2020cd33bc6e181ac964142347231e9e1e389a",
}


class Embedding(NamedTuple):
    """features: float64 (N, d), whitened on the training images; probabilities: float32 (N, num_classes) or None."""

    features: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True, eq=False)
class Features:
    """How images become features. `run`: uint8 images → moments and logits (None: no classes), batch by batch."""

    name: str
    sha256: str  # of weights and whitening
    shape: tuple[int, int, int]  # of an image: C, S, S
    run: Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
    whitening: Whitening

    @property
    def dim(self) -> int:
        """Return the number of features of an image."""
        return self.whitening.matrix.shape[1]

    def embed(self, images: Tensor, batch_size: int = 500) -> Embedding:
        """Embed images uint8 (N, C, S, S) on the CPU. Raises ValueError for other images."""
        if images.dtype != torch.uint8 or images.shape[1:] != self.shape or not len(images):
            raise ValueError(
                f"features {self.name} take uint8 images (N, {', '.join(map(str, self.shape))}), N ≥ 1, "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        moments, logits = self.run(images, batch_size)
        probabilities = None if logits is None else logits.softmax(dim=1)
        return Embedding(self.whitening(moments), probabilities)


def features_for(
    data: Dataset,
    device: torch.device,
    say: Callable[[str], None],
    kind: str = "own",
    folder: str | None = None,
) -> Features:
    """Return the features of a dataset: its own, those of `inception`, or of `dinov2` with its weights in a folder.

    Its own are shipped, or trained at first use on this machine and cached, or those of Inception. Trained are those of
    grey sets of 2 to 100 classes, 16 to 64 pixels a side and 10,000 training images or more; `say` hears of it. Others
    need torch-fidelity (extra `inception`). Raises UserError where features cannot be had.
    """
    facts = data.facts
    if kind == "dinov2" and folder is not None:
        return _whitened("dinov2", *large.dinov2(facts, device, folder), data)
    if kind == "inception":
        return _whitened("inception-v3", *large.inception(facts, device, say), data)
    if (facts.name, facts.image_size) in SHIPPED and (facts.channels, facts.num_classes) == (1, 10):
        return _from_arrays(_shipped(facts), facts, device)
    fits = facts.channels == 1 and facts.image_size in SIZES and facts.num_classes in CLASSES
    if fits and len(data.train) >= FEWEST:
        return _from_arrays(_trained(data, device, say), facts, device)
    return features_for(data, device, say, "inception")


def load(path: Path, facts: DatasetInfo, device: torch.device) -> Features:
    """Load a file that scripts/train_features.py wrote. Raises DataError where it is broken or another network's."""
    return _from_arrays(load_arrays(path, MAX_BYTES), facts, device)


def _from_arrays(arrays: Arrays, facts: DatasetInfo, device: torch.device) -> Features:
    network = FeatureNetwork(facts.channels, facts.image_size, facts.num_classes)
    try:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("not all of it is finite")
        transform = Whitening(tensors.pop("whitening.mean"), tensors.pop("whitening.matrix"))
        network.load_state_dict(tensors)
        if not transform.matrix.shape[:-1] == transform.mean.shape == (network.num_moments,):
            raise ValueError("another whitening")
        if transform.matrix.shape[1] < 1 or any(part.dtype != torch.float64 for part in transform):
            raise ValueError("another whitening")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"features of {facts.name}: the file holds those of another network") from error
    network.to(device).to(memory_format=torch.channels_last).requires_grad_(False)
    return Features(
        name=f"{facts.name}-{facts.image_size}",
        sha256=content_hash(arrays),
        shape=(facts.channels, facts.image_size, facts.image_size),
        run=lambda images, batch_size: run(network, images, device, batch_size),
        whitening=transform,
    )


def _shipped(facts: DatasetInfo) -> Arrays:
    path = ASSETS / f"{facts.name}.safetensors"
    arrays = load_arrays(path, MAX_BYTES)
    if content_hash(arrays) != SHIPPED[facts.name, facts.image_size]:
        raise DataError(f"{path}: is not the file this version of ddpm came with; install ddpm anew")
    return arrays


def _trained(data: Dataset, device: torch.device, say: Callable[[str], None]) -> Arrays:
    path = cache_folder() / cache_name(data)
    if arrays := _cached(path, data.facts):  # without a lock, as the folder may be read-only
        return arrays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if arrays := _cached(path, data.facts):  # another process has just made it
                return arrays
            for left_by_a_killed_process in leftovers(path.parent):
                if left_by_a_killed_process.name.startswith(f".{path.name}."):
                    left_by_a_killed_process.unlink()
            say(f"training features for {data.facts.name}, once on this machine (a few minutes) → {path}")
            arrays = train(data, SEED, device)
            save_arrays(path, arrays)
            return arrays
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({reason(error)}); set DDPM_CACHE to another folder"
        ) from error


def _cached(path: Path, facts: DatasetInfo) -> Arrays | None:
    """Load a file of the cache. None where it is absent or broken."""
    try:
        arrays = load_arrays(path, MAX_BYTES)
        _from_arrays(arrays, facts, torch.device("cpu"))
    except DataError:
        return None
    return arrays


def train(data: Dataset, seed: int, device: torch.device) -> Arrays:
    """Train the features of a dataset, on its training images alone."""
    return train_features(data.train, data.facts.num_classes, recipe(data.facts.name), seed, device)


def recipe(name: str) -> Recipe:
    """Return the training recipe of a dataset by its name."""
    return RECIPES.get(name, USUAL)


def cache_name(data: Dataset) -> str:
    """Name the file after dataset, size, training images and labels, version of the recipe, and seed."""
    assert data.train.labels is not None
    digest = hashlib.sha256(data.train.images.numpy().tobytes())
    digest.update(data.train.labels.numpy().tobytes())
    facts = data.facts
    name = "".join(c if c.isalnum() and c.isascii() else "_" for c in facts.name)[:40]
    return f"features-{name}-{facts.image_size}-v{RECIPE}-seed{SEED}-{digest.hexdigest()[:32]}.safetensors"


def _whitened(name: str, embed: large.Run, sha256: str, data: Dataset) -> Features:
    """Whiten a large network's features by PCA to at most 32 directions, as all others are.

    So the floor formula holds; the distances are not those published of these networks.
    """
    few = data.train.images[spread_out(len(data.train), WHITENED_ON)]
    transform = whitening(embed(few, 50)[0], dimensions(len(few)))
    facts = data.facts
    shape = (facts.channels, facts.image_size, facts.image_size)
    return Features(name, sha256, shape, embed, transform)
