"""What every dataset returns: facts about its images and three splits that are kept apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.data.info import DatasetInfo, check_facts
from ddpm.errors import DataError
from ddpm.runtime.randomness import permutation

SPLIT_SEED = (
    20_200_619  # fixed, not the user's seed: runs that are compared must share their validation images
)


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 (N, C, H, W) in 0 … 255; labels: int64 (N,) in 0 … num_classes - 1, or None."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Dataset:
    """`notice` is a text for the user, such as a licence; the command line prints it once."""

    facts: DatasetInfo
    train: Split
    val: Split
    test: Split
    notice: str = ""


def hold_out(split: Split, n: int) -> tuple[Split, Split]:
    """The split without n images drawn at random, and those n; both in the order they had.

    The draw depends on the number of images alone. Raises ValueError unless 0 < n < len(split).
    """
    if not 0 < n < len(split):
        raise ValueError(f"cannot hold out {n} of {len(split)} images")
    held = torch.zeros(len(split), dtype=torch.bool)
    held[permutation(SPLIT_SEED, "hold_out", 0, len(split))[:n]] = True
    return _select(split, ~held), _select(split, held)


def check_dataset(data: Dataset) -> Dataset:
    """The same object, if all that the rest of the program relies on is so. Raises DataError with what is not."""
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
            f"{where}: its images are {images.dtype} on {images.device}; they must be uint8, 0 … 255, on the CPU"
        )
    wanted = (facts.channels, facts.image_size, facts.image_size)
    if images.ndim != 4 or not len(images) or images.shape[1:] != wanted:
        raise DataError(
            f"{where}: its images have the shape {tuple(images.shape)}; by its facts it must be "
            f"(N, {', '.join(map(str, wanted))}) with N ≥ 1"
        )
    if labels is None and facts.num_classes == 0:
        return
    if labels is None or facts.num_classes == 0:
        raise DataError(
            f"{where}: has {'no labels' if labels is None else 'labels'}, but facts.num_classes={facts.num_classes}"
        )
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.device.type != "cpu":
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"{where}: its labels are {kind}; they must be an int64 tensor on the CPU")
    if labels.shape != (len(images),):
        raise DataError(f"{where}: {len(images)} images, but labels of shape {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= facts.num_classes:
        raise DataError(
            f"{where}: its labels lie within {low} … {high}; allowed: 0 to {facts.num_classes - 1}"
        )


def check_image_size(image_size: int, allowed: tuple[int, ...]) -> None:
    """Raises DataError if a dataset cannot be had in this size."""
    if image_size not in allowed:
        sizes = ", ".join(map(str, allowed))
        raise DataError(
            f"dataset.image_size={image_size} is not available for this dataset; allowed: {sizes}"
        )


def _select(split: Split, mask: Tensor) -> Split:
    return Split(split.images[mask], None if split.labels is None else split.labels[mask])
