"""Read samples made by another tool: an .npz file, a folder of pictures, or images of a dataset, none of them trusted.

They must have the size and colours of the dataset they are held against: nothing is scaled, as that would be
measured with them.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm import build
from ddpm.config.choices import Component, choices
from ddpm.config.limits import nearest
from ddpm.data.dataset import Dataset
from ddpm.data.folder import SUFFIXES, is_image
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError, UserError
from ddpm.io import npz
from ddpm.io.files import reason, user_path
from ddpm.io.pictures import FORMATS, MAX_SOURCE_BYTES, decode
from ddpm.runtime.randomness import permutation
from ddpm.sample.user_images import indices

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGES = 1_000_000
MAX_BYTES = 1 << 31  # of all images, and of a file
SPLITS = ("train", "val", "test")
OF_DATASET = re.compile(r"(\w+):([^:/\\]*)(?::([^:/\\]*))?")
IMAGES = ("images", "arr_0")  # as ddpm-sample calls them, and as other tools do (np.savez without a name)
LABELS = ("labels", "arr_1")


@dataclass(frozen=True, eq=False)
class LoadedSamples:
    """images: uint8 (n, C, S, S); labels: int64 (n,), the class each image is meant to show, or None."""

    images: Tensor
    labels: Tensor | None
    notes: tuple[str, ...] = ()


def read(text: str, data: Dataset, choice: Component, n: int, seed: int, data_root: str) -> LoadedSamples:
    """`samples=`: at most n images, to be held against `data`, which `choice` names. Raises UserError.

    Of more than n images n are drawn at random, as a file may be sorted by class.
    """
    if match := OF_DATASET.fullmatch(text):
        found = _from_dataset(text, match[1], match[2], match[3], data, choice, data_root)
    elif os.path.isdir(path := user_path(text)):
        found = _from_folder(text, path, data.facts)
    elif os.path.isfile(path):
        found = _from_npz(text, path, data.facts)
    else:
        raise UserError(
            f"samples={text}: there is no such file or folder; images of a dataset are written as mnist:test"
        )
    have = len(found.images)
    if have <= n:
        note = (f"samples={text} has {have:,} images, fewer than n={n:,}: all of them",) if have < n else ()
        return LoadedSamples(found.images, found.labels, note)
    chosen = permutation(seed, "samples", 0, have)[:n]
    return LoadedSamples(
        found.images[chosen],
        None if found.labels is None else found.labels[chosen],
        (f"samples={text} has {have:,} images: {n:,} of them, drawn at random",),
    )


def _from_dataset(
    text: str, name: str, part: str, places: str | None, data: Dataset, choice: Component, data_root: str
) -> LoadedSamples:
    if name not in (known := choices("dataset")):
        raise UserError(
            f"samples={text}: no dataset '{name}'; must be one of {', '.join(known)}{nearest(name, known)}"
        )
    if part not in SPLITS:
        raise UserError(f"samples={text}: no split '{part}'; must be one of {', '.join(SPLITS)}")
    own = data
    if known[name]["name"] != choice.name:
        params = {key: value for key, value in known[name].items() if key != "name"}
        if params.get("path") == "???":
            raise UserError(f"samples={text}: give the folder's path as samples")
        if "image_size" in params:
            params["image_size"] = data.facts.image_size
        own = build.dataset(Component(known[name]["name"], params), data_root)
    split = {"train": own.train, "val": own.val, "test": own.test}[part]
    _check_size(
        text,
        "its images are",
        split.images.shape[2],
        split.images.shape[3],
        split.images.shape[1],
        data.facts,
    )
    same = own is data
    labels = split.labels if same else None
    if places is None:
        return LoadedSamples(split.images, labels)
    chosen = indices(places, text, "samples", MAX_IMAGES)
    if max(chosen) >= len(split):
        raise UserError(f"samples={text}: this split has the images 0 to {len(split) - 1}")
    wanted = torch.tensor(chosen)
    return LoadedSamples(split.images[wanted], None if labels is None else labels[wanted])


def _from_folder(text: str, folder: Path, facts: DatasetInfo) -> LoadedSamples:
    """The pictures that lie in the folder itself, in the order of their names."""
    try:
        files = sorted(file for file in folder.iterdir() if is_image(file, folder))
    except OSError as error:
        raise UserError(f"samples={text}: cannot be read ({reason(error)})") from None
    one = facts.channels * facts.image_size**2
    if not 1 <= len(files) <= min(MAX_IMAGES, MAX_BYTES // one):
        raise UserError(
            f"samples={text}: {len(files)} images in this folder ({', '.join(SUFFIXES)}); allowed: 1 to "
            f"{min(MAX_IMAGES, MAX_BYTES // one):,}"
        )
    images = np.empty((len(files), facts.image_size, facts.image_size, facts.channels), np.uint8)
    for image, file in zip(images, files, strict=True):
        image[:] = _picture(text, file, facts)
    return LoadedSamples(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), None)


def _picture(text: str, file: Path, facts: DatasetInfo) -> NDArray[np.uint8]:
    """(S, S, C), to the bit as it was saved."""

    def pixels(image: "Image") -> NDArray[np.uint8]:
        _check_size(text, f"{file.name} is", image.height, image.width, None, facts)
        if image.has_transparency_data:
            raise DataError(f"samples={text}: {file.name} is transparent; save it without an alpha channel")
        return np.asarray(image.convert("RGB"))

    colours = decode(file, pixels, FORMATS, MAX_SOURCE_BYTES, facts.image_size**2 * 64)
    if facts.channels == 3:
        return colours
    if facts.channels != 1:
        raise UserError(f"samples={text}: {facts.name} has {facts.channels} channels, picture files 1 or 3")
    if (colours != colours[..., :1]).any():
        raise UserError(f"samples={text}: {file.name} is coloured, the images of {facts.name} are grey")
    return colours[..., :1]


def _from_npz(text: str, path: Path, facts: DatasetInfo) -> LoadedSamples:
    """uint8 (N, S, S) or (N, S, S, C), as ddpm-sample saves them."""

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
    return LoadedSamples(
        images.permute(0, 3, 1, 2).contiguous(),
        None if classes is None else torch.from_numpy(classes.astype("int64")),
    )


def _check_size(
    text: str, what: str, height: int, width: int, channels: int | None, facts: DatasetInfo
) -> None:
    """Channels None: of a picture file, whose colours are looked at later."""
    size, wanted = facts.image_size, facts.channels
    if (height, width) != (size, size) or channels not in (None, wanted):
        have = f"{height}×{width}" + (f"×{channels}" if channels is not None else "")
        raise DataError(
            f"samples={text}: {what} {have}, those of {facts.name} {size}×{size}×{wanted}; nothing is scaled, as that "
            "would be judged with them (dataset.image_size=… names another size)"
        )
