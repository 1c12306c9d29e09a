"""What every dataset returns: facts about its images, and its training, validation and test split."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.data.info import DatasetInfo, check_facts
from ddpm.errors import DataError
from ddpm.runtime.randomness import permutation

# Not the user's seed: runs that are compared must share their validation images.
SPLIT_SEED = 20_200_619


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 (N, C, H, W) in 0 … 255; labels: int64 (N,) in 0 … num_classes - 1, or None."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Facts and splits of a dataset; `notice` is a text for the user, such as a licence, printed at the start."""

    facts: DatasetInfo
    train: Split
    val: Split
    test: Split
    notice: str = ""


def hold_out(split: Split, n: int) -> tuple[Split, Split]:
    """Split off n images drawn at random. Returns the rest and those n, each in the original order.

    The draw depends on the number of images alone, unless it would leave a class without an image: then the class gets
    its first one back, and the next one drawn that its class can spare is held out instead. Raises ValueError unless
    0 < n < len(split).
    """
    if not 0 < n < len(split):
        raise ValueError(f"cannot hold out {n} of {len(split)} images")
    drawn = permutation(SPLIT_SEED, "hold_out", 0, len(split))
    held = torch.zeros(len(split), dtype=torch.bool)
    held[drawn[:n]] = True
    if split.labels is not None:
        _give_back(split.labels.tolist(), held, drawn[n:].tolist())
    return _select(split, ~held), _select(split, held)


def _give_back(labels: list[int], held: Tensor, others: list[int]) -> None:
    """Change `held` so that each class keeps an image; `others` are those not held, in the order of the draw."""
    left = Counter(labels[i] for i in others)
    for lost in sorted(set(labels) - left.keys()):
        spare = next((i for i in others if left[labels[i]] > 1 and not held[i]), None)
        if spare is None:  # too few images for all classes
            return
        held[labels.index(lost)], held[spare] = False, True
        left[labels[spare]] -= 1


def in_order_of(data: Dataset, names: Sequence[str]) -> Dataset:
    """Number the classes in the order of `names`, a checkpoint's, if they are the same classes in another order."""
    own = data.facts.class_names
    if tuple(names) == own or sorted(names) != sorted(own):
        return data
    numbers = torch.tensor([names.index(name) for name in own])

    def renumbered(split: Split) -> Split:
        return Split(split.images, None if split.labels is None else numbers[split.labels])

    facts = replace(data.facts, class_names=tuple(names))
    return Dataset(facts, renumbered(data.train), renumbered(data.val), renumbered(data.test), data.notice)


def check_dataset(data: Dataset) -> Dataset:
    """Return the dataset unchanged if its types, shapes and labels are valid. Raises DataError otherwise."""
    if not isinstance(data, Dataset):
        raise DataError(f"the dataset function returned a {type(data).__name__}, not a Dataset")
    if not isinstance(data.notice, str):
        raise DataError(f"the dataset's notice is a {type(data.notice).__name__}, not a text")
    check_facts(data.facts)
    for name in ("train", "val", "test"):
        _check_split(getattr(data, name), data.facts, f"dataset {data.facts.name}, split {name}")
    return data


def _check_split(split: Split, facts: DatasetInfo, where: str) -> None:
    if not isinstance(split, Split) or not isinstance(split.images, Tensor):
        raise DataError(f"{where}: is not a Split of tensors")
    images, labels = split.images, split.labels
    if images.dtype != torch.uint8 or images.device.type != "cpu":
        raise DataError(
            f"{where}: its images are {images.dtype} on {images.device}; must be uint8 on the CPU"
        )
    wanted = (facts.channels, facts.image_size, facts.image_size)
    if images.ndim != 4 or not len(images) or images.shape[1:] != wanted:
        must = f"(N, {', '.join(map(str, wanted))}) with N ≥ 1"
        raise DataError(f"{where}: its images have the shape {tuple(images.shape)}; it must be {must}")
    if (labels is None) != (facts.num_classes == 0):
        has = "no labels" if labels is None else "labels"
        raise DataError(f"{where}: has {has}, but facts.num_classes={facts.num_classes}")
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.device.type != "cpu":
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"{where}: its labels are {kind}; they must be an int64 tensor on the CPU")
    if labels.shape != (len(images),):
        raise DataError(f"{where}: {len(images)} images, but labels of shape {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= facts.num_classes:
        raise DataError(f"{where}: labels lie within {low} … {high}; allowed: 0 to {facts.num_classes - 1}")


def check_image_size(image_size: int, allowed: tuple[int, ...]) -> None:
    """Raise DataError unless a dataset is available in this size."""
    if image_size not in allowed:
        sizes = ", ".join(map(str, allowed))
        raise DataError(f"dataset.image_size={image_size} is no size of this dataset; allowed: {sizes}")


def _select(split: Split, mask: Tensor) -> Split:
    return Split(split.images[mask], None if split.labels is None else split.labels[mask])
