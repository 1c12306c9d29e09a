"""What every dataset returns: facts about its images and three splits that are kept apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.errors import DataError
from ddpm.randomness import permutation

SPLIT_SEED = (
    20_200_619  # fixed, not the user's seed: runs that are compared must share their validation images
)


@dataclass(frozen=True)
class Facts:
    """What the rest of the program needs to know about the images, read off the data and set nowhere else."""

    name: str
    channels: int
    image_size: int
    num_classes: int  # 0: no labels
    class_names: tuple[str, ...]
    levels: int  # grey levels a pixel can take


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

    facts: Facts
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


def check_image_size(image_size: int, allowed: tuple[int, ...]) -> None:
    """Raises DataError if a dataset cannot be had in this size."""
    if image_size not in allowed:
        sizes = ", ".join(map(str, allowed))
        raise DataError(
            f"dataset.image_size={image_size} is not available for this dataset; allowed: {sizes}"
        )


def _select(split: Split, mask: Tensor) -> Split:
    return Split(split.images[mask], None if split.labels is None else split.labels[mask])
