"""Read samples made by another tool: an .npz file, a folder of pictures, or images of a dataset, none of them trusted.

They must have the size and colours of the dataset they are held against: nothing is scaled, as that would be
measured with them.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from ddpm.config.choices import Component
from ddpm.data.dataset import Dataset
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError, UserError
from ddpm.io import npz
from ddpm.io.files import user_path
from ddpm.io.pictures import FORMATS, MAX_SOURCE_BYTES, decode
from ddpm.runtime.randomness import permutation
from ddpm.sample.user_images import OF_DATASET, of_dataset, pictures

MAX_IMAGES = 1_000_000
MAX_BYTES = 1 << 31  # of all images, and of a file
IMAGES = ("images", "arr_0")  # as ddpm-sample calls them, and as other tools do (np.savez without a name)
LABELS = ("labels", "arr_1")


@dataclass(frozen=True, eq=False)
class LoadedSamples:
    """images: uint8 (n, C, S, S); labels: int64 (n,), the class each image is meant to show, or None."""

    images: Tensor
    labels: Tensor | None
    notes: tuple[str, ...] = ()


def read(text: str, data: Dataset, choice: Component, n: int, seed: int, data_root: str) -> LoadedSamples:
    """Read `samples=`: at most n images, to be held against `data`, which `choice` names. Raises UserError.

    Of more than n images n are drawn at random, as a file may be sorted by class.
    """
    facts, path, notes = data.facts, user_path(text), list[str]()
    if not os.path.exists(path) and (match := OF_DATASET.fullmatch(text)):
        found = of_dataset(
            "samples", text, match, facts, choice, data_root, MAX_IMAGES, {facts.channels}, data
        )
        images, labels = found.images, found.labels
    elif os.path.isdir(path):
        images, labels, notes = _from_folder(text, path, facts)
    elif os.path.isfile(path):
        images, labels = _from_npz(text, path, facts)
    else:
        raise UserError(
            f"samples={text}: there is no such file or folder; images of a dataset are written as mnist:test"
        )
    have = len(images)
    if have <= n:
        if have < n:
            notes.append(f"samples={text} has {have:,} images, fewer than n={n:,}: all of them")
        return LoadedSamples(images, labels, tuple(notes))
    chosen = permutation(seed, "samples", 0, have)[:n]
    notes.append(f"samples={text} has {have:,} images: {n:,} of them, drawn at random")
    return LoadedSamples(images[chosen], None if labels is None else labels[chosen], tuple(notes))


def _from_folder(text: str, folder: Path, facts: DatasetInfo) -> tuple[Tensor, Tensor | None, list[str]]:
    """Read the pictures in the folder, in the order of their names; return labels and notes, too: see `pictures`."""
    most = min(MAX_IMAGES, MAX_BYTES // (facts.channels * facts.image_size**2))
    found = pictures("samples", text, folder, most, facts)
    images = np.empty((len(found.files), facts.image_size, facts.image_size, facts.channels), np.uint8)
    for image, file in zip(images, found.files, strict=True):
        image[:] = _picture(text, file, facts)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), found.labels, found.notes


def _picture(text: str, file: Path, facts: DatasetInfo) -> NDArray[np.uint8]:
    """Return the pixels (S, S, C), unchanged."""

    def pixels(image: Image) -> NDArray[np.uint8]:
        _check_size(text, f"{file.name} is", image.height, image.width, None, facts)
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise DataError(
                f"samples={text}: {file.name} is transparent in places; save it without an alpha channel"
            )
        return np.asarray(image.convert("RGB"))

    colours = decode(file, pixels, FORMATS, MAX_SOURCE_BYTES, facts.image_size**2 * 64)
    if facts.channels == 3:
        return colours
    if facts.channels != 1:
        raise UserError(f"samples={text}: {facts.name} has {facts.channels} channels, picture files 1 or 3")
    if (colours != colours[..., :1]).any():
        raise UserError(f"samples={text}: {file.name} is coloured, the images of {facts.name} are grey")
    return colours[..., :1]


def _from_npz(text: str, path: Path, facts: DatasetInfo) -> tuple[Tensor, Tensor | None]:
    """Read images uint8 (N, S, S) or (N, S, S, C) and labels (N,), as ddpm-sample saves them."""

    def images_fit(header: npz.Header) -> None:
        shape = header.shape if len(header.shape) == 4 else (*header.shape, 1)
        if header.dtype != "|u1" or len(shape) != 4:
            raise UserError(f"samples={text}: its images must be uint8 (N, height, width, channels), 0 … 255")
        if not 1 <= shape[0] <= MAX_IMAGES:
            raise UserError(f"samples={text}: has {shape[0]:,} images; allowed: 1 to {MAX_IMAGES:,}")
        _check_size(text, "its images are", shape[1], shape[2], shape[3], facts)

    def labels_fit(header: npz.Header) -> None:
        if header.shape != (len(pixels),):
            raise UserError(f"samples={text}: {len(pixels):,} images, but labels of shape {header.shape}")

    with npz.opened(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        if not (of_images := next((name for name in IMAGES if name in names), None)):
            raise UserError(f"samples={text}: has no array '{IMAGES[0]}' (or '{IMAGES[1]}')")
        pixels = npz.read(archive, of_images, images_fit)
        of_labels = next((name for name in LABELS if name in names), None) if facts.num_classes else None
        classes = npz.read(archive, of_labels, labels_fit) if of_labels else None
    if classes is not None and (classes.min() < 0 or classes.max() >= facts.num_classes):
        raise UserError(
            f"samples={text}: its labels must be 0 to {facts.num_classes - 1}, as those of {facts.name}"
        )
    images = torch.from_numpy(pixels).reshape(-1, facts.image_size, facts.image_size, facts.channels)
    labels = None if classes is None else torch.from_numpy(classes.astype("int64"))
    return images.permute(0, 3, 1, 2).contiguous(), labels


def _check_size(
    text: str, what: str, height: int, width: int, channels: int | None, facts: DatasetInfo
) -> None:
    """Raise DataError for images of another size or other channels (None: a picture file, checked later)."""
    size, wanted = facts.image_size, facts.channels
    if (height, width) != (size, size) or channels not in (None, wanted):
        have = f"{height}×{width}" + (f"×{channels}" if channels is not None else "")
        raise DataError(
            f"samples={text}: {what} {have}, those of {facts.name} {size}×{size}×{wanted}; nothing is scaled, as that "
            "would be measured, too (dataset.image_size=… names another size)"
        )
