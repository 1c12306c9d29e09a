"""Images and masks that a user brings: files, folders, or images of a dataset, in the form a model needs."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm import build
from ddpm.config.choices import Component, choices
from ddpm.config.limits import nearest
from ddpm.config.schema import SampleConfig
from ddpm.data.dataset import Dataset, in_order_of
from ddpm.data.info import DatasetInfo, listed
from ddpm.data.picture_files import SUFFIXES, class_of, find_pictures
from ddpm.errors import DataError, UserError
from ddpm.io.files import user_path
from ddpm.io.images import Pixels, normalise
from ddpm.io.pictures import read_image
from ddpm.runtime.randomness import uniform
from ddpm.sample.model import Model, guidance, labels

MAX_INPUTS = 4_096
UNKNOWN_SHARE = 0.75  # of the pixels under mask=random
SPLITS = ("train", "val", "test")
# dataset, split and, unless all of the split is meant, numbers
OF_DATASET = re.compile(r"(\w+):([^:/\\]*)(?::([^:/\\]*))?")


@dataclass(frozen=True, eq=False)
class Inputs:
    """images: uint8 (N, C, S, S); labels: (N,) in the model's classes, or None; names: one for each image."""

    images: Tensor
    labels: Tensor | None
    names: list[str]
    notice: str = ""  # a licence, or what was passed over, to be printed


def read(text: str, facts: DatasetInfo, trained_on: Component, data_root: str) -> Inputs:
    """Read `input=`: a file, a folder of files, or dataset images such as mnist:test:0-15, for a model of these facts.

    Files are scaled and cut around their middle, and made grey or coloured as the model is. Of the dataset that
    the model was trained on, the splits are those of its training. A file or folder that exists is never taken for a
    dataset. Raises UserError.
    """
    path = user_path(text)
    match = None if os.path.exists(path) else OF_DATASET.fullmatch(text)
    if match and match[3] is not None:
        own = None if "path" in trained_on.params else trained_on  # a path in a checkpoint is not followed
        channels = {1, 3} if facts.channels in (1, 3) else {facts.channels}
        found = of_dataset("input", text, match, facts, own, data_root, MAX_INPUTS, channels)
        names = [f"{match[1]}:{match[2]}:{place}" for place in found.places.tolist()]
        return Inputs(with_channels(found.images, facts.channels), found.labels, names, found.notice)
    if facts.channels not in (1, 3):
        raise UserError(f"input={text}: this model's images have {facts.channels} channels, files 1 or 3")
    if not os.path.exists(path):
        raise UserError(
            f"input={text}: there is no such file or folder; dataset images are written as mnist:test:0-15"
        )
    shown = Pictures([path], None, [])
    if os.path.isdir(path):
        shown = pictures("input", text, path, MAX_INPUTS, facts)
    images = torch.stack([_pixels(file, facts.image_size) for file in shown.files])
    names = [str(file) for file in shown.files]
    return Inputs(with_channels(images, facts.channels), shown.labels, names, "\n".join(shown.notes))


class Pictures(NamedTuple):
    """Picture files in a folder; their classes (n,) by sub-folder, or None; what was passed over."""

    files: list[Path]
    labels: Tensor | None
    notes: list[str]


def pictures(key: str, text: str, folder: Path, most: int, facts: DatasetInfo) -> Pictures:
    """List the picture files in a folder that `key` names, and those in its sub-folders if it has none itself.

    A sub-folder has the name of a class of `facts`, or its number. Raises UserError unless there are 1 to `most` files.
    """
    try:
        found = find_pictures(folder, below=False)
        nested = not found.files
        found = find_pictures(folder) if nested else found
    except DataError as error:
        raise UserError(f"{key}={text}: {error}") from None
    notes = [f"{key}={text}: {found.passed_over}"] if found.passed else []
    if not 1 <= len(found.files) <= most:
        raise UserError(
            f"{key}={text}: {len(found.files)} images in this folder ({', '.join(SUFFIXES)}); allowed: 1 to {most}"
            + (f"; {found.passed_over}" if found.passed else "")
        )
    if not nested or not facts.num_classes:
        return Pictures(found.files, None, notes)
    names = [class_of(file, folder) for file in found.files]
    numbers = {name: number for number, name in enumerate(facts.class_names)}
    if not numbers.keys() >= set(names):
        numbers = {str(number): number for number in range(facts.num_classes)}
    if strange := sorted(set(names) - numbers.keys()):
        note = f"{key}={text}: read without classes, as the sub-folder '{strange[0]}' is none of {facts.name}"
        classes = f" ({listed(facts.class_names)})" if facts.class_names else ""
        return Pictures(found.files, None, [*notes, note + classes])
    return Pictures(found.files, torch.tensor([numbers[name] for name in names]), notes)


def _pixels(file: Path, size: int) -> Tensor:
    return torch.from_numpy(read_image(file, size).copy()).permute(2, 0, 1)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Make uint8 (N, 1 or 3, S, S) grey, by the brightness of ITU-R BT.601, or coloured, by repeating the grey."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weights = torch.tensor([299, 587, 114]).view(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 500).div(1000, rounding_mode="floor").to(torch.uint8)


class Chosen(NamedTuple):
    """Images of a dataset."""

    images: Tensor  # uint8 (n, C, S, S)
    labels: Tensor | None  # (n,); None where the dataset's classes are not those that are wanted
    places: Tensor  # (n,) of each image in its split
    notice: str


def of_dataset(
    key: str,
    text: str,
    match: re.Match[str],
    facts: DatasetInfo,
    own: Component | None,
    data_root: str,
    most: int,
    channels: set[int],
    loaded: Dataset | None = None,
) -> Chosen:
    """Read dataset images that `key` names, as `match` of OF_DATASET, in the size of `facts`.

    `own` is the dataset of these facts, `loaded` already or not; its parameters are taken where it is named. Raises
    UserError, for more than `most` images and for other `channels`, too.
    """
    name, part, places = match.groups()
    known = choices("dataset")
    if name not in known:
        raise UserError(
            f"{key}={text}: no dataset '{name}'; must be one of {', '.join(known)}{nearest(name, known)}"
        )
    if part not in SPLITS:
        raise UserError(f"{key}={text}: no split '{part}'; must be one of {', '.join(SPLITS)}")
    wanted = None if places is None else torch.tensor(indices(places, text, key, most))
    same = own is not None and known[name]["name"] == own.name
    params = {field: value for field, value in known[name].items() if field != "name"}
    params |= own.params if own and same else {}
    if params.get("path") == "???":
        raise UserError(f"{key}={text}: give the folder's path as {key}, not the dataset's name")
    if "image_size" in params:
        params["image_size"] = facts.image_size
    fits = f"must be {facts.image_size}×{facts.image_size}×{facts.channels}, as those of {facts.name}"
    try:
        data = loaded if loaded and same else build.dataset(Component(known[name]["name"], params), data_root)
        data = in_order_of(data, facts.class_names)
    except DataError as error:
        raise UserError(f"{key}={text}: {error} ({fits})") from None
    if (size := data.facts.image_size) != facts.image_size or data.facts.channels not in channels:
        raise UserError(f"{key}={text}: its images are {size}×{size}×{data.facts.channels}, {fits}")
    split = {"train": data.train, "val": data.val, "test": data.test}[part]
    index = torch.arange(len(split)) if wanted is None else wanted
    if index.max() >= len(split):
        raise UserError(f"{key}={text}: {name}:{part} has the images 0 to {len(split) - 1}")
    same_classes = data.facts.class_names == facts.class_names
    labels = split.labels[index] if same_classes and split.labels is not None else None
    return Chosen(split.images[index], labels, index, data.notice)


def indices(places: str, text: str, key: str, most: int) -> list[int]:
    """Parse numbers and ranges, such as 0-15 or 0-3,7. Raises UserError that names `key` for more than `most`."""
    wanted: list[int] = []
    for item in places.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(
                f"{key}={text}: '{item}' must be a number or a rising range, as in mnist:test:0-3,7"
            )
        if len(wanted) + last - first >= most:
            raise UserError(f"{key}={text}: too many images; allowed: 1 to {most}")
        wanted += range(first, last + 1)
    return wanted


# Named masks: true where the row and column (both S×S) of an image of this size are unknown.
MASKS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "left": lambda row, column, size: column < size // 2,
    "top": lambda row, column, size: row < size // 2,
    "centre": lambda row, column, size: _inner(row, size) & _inner(column, size),
}


def _inner(place: Tensor, size: int) -> Tensor:
    return (place >= size // 4) & (place < size - size // 4)


def mask(text: str, size: int, seed: int, numbers: Tensor) -> Tensor:
    """Make `mask=`: bool (N, 1, S, S), true where unknown, for the inputs `numbers` (N,) int64.

    Named: the `left` or `top` half, the `centre` (half as wide and high), or `random` (each pixel with probability
    3/4, from the seed and the input's number). Else a picture, white where unknown, scaled and cut like an input
    but to the nearest pixel. Raises UserError.
    """
    if text == "random":
        pixels = numbers[:, None] * size**2 + torch.arange(size**2)
        return (uniform(seed, "mask", 0, pixels.flatten()) < UNKNOWN_SHARE).view(-1, 1, size, size)
    if text in MASKS:
        row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        one = MASKS[text](row, column, size)
    else:
        file = user_path(text)
        if not os.path.isfile(file):
            names = ", ".join([*MASKS, "random"])
            raise UserError(f"mask={text}: must be one of {names}, or a picture file; there is no such file")
        picture = torch.from_numpy(read_image(file, size, nearest=True).copy()).permute(2, 0, 1)
        one = with_channels(picture[None], 1)[0, 0] >= 128
        if not one.any():
            raise UserError(f"mask={text}: nothing in it is white, so there is nothing to draw")
    return one.expand(len(numbers), 1, size, size)


RESULT_SHIFT = 32  # result j of input i has the index i + j 2^32, however many there are of either


@dataclass(frozen=True, eq=False)
class Brought:
    """A user's inputs, and which of them each result starts from."""

    inputs: Inputs
    numbers: Tensor  # (rows,) of the inputs in use
    pixels: Tensor  # uint8 (rows, C, H, W)
    y: Tensor | None  # (rows,)
    row: Tensor  # (n,) of each result
    index: Tensor  # (n,) of each result, for its randomness

    @property
    def x_0(self) -> Tensor:
        return normalise(self.pixels)

    @property
    def column(self) -> Pixels:
        return self.pixels.permute(0, 2, 3, 1).numpy()

    @property
    def notes(self) -> list[str]:
        return self.inputs.notice.splitlines()

    @property
    def about(self) -> dict[str, Any]:
        return {"inputs": [self.inputs.names[number] for number in self.numbers]}


def bring(config: SampleConfig, model: Model, each: int) -> Brought:
    """Read the inputs for `each` results of every one. `index=` picks among them by their place, from 0."""
    assert config.input is not None
    brought = read(config.input, model.facts, model.config.dataset, config.data_root)
    numbers = torch.tensor(config.index) if config.index else torch.arange(len(brought.images))
    if numbers.max() >= len(brought.images):
        raise UserError(
            f"index={config.index}: input={config.input} has the images 0 to {len(brought.images) - 1}"
        )
    row = torch.arange(len(numbers)).repeat_interleave(each)
    index = numbers[row] + (torch.arange(each).repeat(len(numbers)) << RESULT_SHIFT)
    y = labels(model, config.label, numbers, guidance(config))
    if y is not None and config.label is None:
        if brought.labels is not None:
            y = brought.labels[numbers]
        elif config.guidance_scale != 0:
            raise UserError(
                f"input={config.input}: has no label that this conditional model knows; add label=… (0 to "
                f"{model.facts.num_classes - 1}, or a list: {listed(model.facts.class_names)}), or guidance_scale=0 "
                "for no class"
            )
    return Brought(brought, numbers, brought.images[numbers], y, row, index)
