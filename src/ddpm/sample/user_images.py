"""Images and masks that a user brings: files, folders, or images of a dataset, in the form a model needs."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm import build
from ddpm.config.schema import Choice, choices
from ddpm.config.values import nearest
from ddpm.data.dataset import Dataset, Facts
from ddpm.data.folder import SUFFIXES, is_image, read_image
from ddpm.errors import DataError, UserError
from ddpm.io.reading import reason, user_path
from ddpm.runtime.randomness import uniform

MAX_INPUTS = 4_096
UNKNOWN_SHARE = 0.75  # of the pixels under mask=random
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Inputs:
    """images: uint8 (N, C, S, S); labels: (N,) in the model's classes, or None; names: one for each image."""

    images: Tensor
    labels: Tensor | None
    names: list[str]
    notice: str = ""  # a licence, to be printed


def read(text: str, facts: Facts, trained_on: Choice, data_root: str) -> Inputs:
    """`input=`: a file, a folder of files, or dataset images such as mnist:test:0-15, for a model of these facts.

    Files are scaled and cut around their middle, and made grey or coloured as the model is. Of the dataset that
    the model was trained on, the splits are those of its training. Raises UserError.
    """
    if match := re.fullmatch(r"(\w+):([^:/\\]*):([^:/\\]*)", text):
        return _from_dataset(text, *match.groups(), facts=facts, trained_on=trained_on, data_root=data_root)
    if facts.channels not in (1, 3):
        raise UserError(f"input={text}: this model's images have {facts.channels} channels, files 1 or 3")
    files = _files(text)
    images = [_pixels(file, facts.image_size) for file in files]
    return Inputs(with_channels(torch.stack(images), facts.channels), None, [str(file) for file in files])


def _files(text: str) -> list[Path]:
    root = user_path(text)
    if not os.path.isdir(root):
        if not os.path.isfile(root):
            raise UserError(
                f"input={text}: there is no such file or folder; dataset images are written as mnist:test:0-15"
            )
        return [root]
    try:
        files = sorted(file for file in root.iterdir() if is_image(file, root))
    except OSError as error:
        raise UserError(f"input={text}: cannot be read ({reason(error)})") from None
    if not 1 <= len(files) <= MAX_INPUTS:
        raise UserError(
            f"input={text}: {len(files)} images in this folder ({', '.join(SUFFIXES)}); allowed: 1 to {MAX_INPUTS}"
        )
    return files


def _pixels(file: Path, size: int) -> Tensor:
    return torch.from_numpy(read_image(file, size).copy()).permute(2, 0, 1)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 (N, 1 or 3, S, S) grey or coloured: brightness by ITU-R BT.601, or the same grey three times."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weights = torch.tensor([299, 587, 114]).view(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 500).div(1000, rounding_mode="floor").to(torch.uint8)


def _from_dataset(
    text: str, name: str, part: str, places: str, *, facts: Facts, trained_on: Choice, data_root: str
) -> Inputs:
    known = choices("dataset")
    if name not in known:
        raise UserError(
            f"input={text}: no dataset '{name}'; must be one of {', '.join(known)}{nearest(name, known)}"
        )
    if part not in SPLITS:
        raise UserError(f"input={text}: no split '{part}'; must be one of {', '.join(SPLITS)}")
    wanted = indices(places, text)
    data = _load(text, name, facts, trained_on, data_root)
    split = {"train": data.train, "val": data.val, "test": data.test}[part]
    if max(wanted) >= len(split):
        raise UserError(f"input={text}: {name}:{part} has the images 0 to {len(split) - 1}")
    chosen = torch.tensor(wanted)
    same_classes = data.facts.class_names == facts.class_names and split.labels is not None
    return Inputs(
        with_channels(split.images[chosen], facts.channels),
        split.labels[chosen] if same_classes and split.labels is not None else None,
        [f"{name}:{part}:{place}" for place in wanted],
        data.notice,
    )


def _load(text: str, name: str, facts: Facts, trained_on: Choice, data_root: str) -> Dataset:
    """The dataset in the model's image size; with the parameters of the training if it is the same one."""
    content: dict[str, Any] = choices("dataset")[name]
    params = {key: value for key, value in content.items() if key != "name"}
    if params.get("path") == "???":
        raise UserError(f"input={text}: give the folder's path as input; one in a checkpoint is not followed")
    if content["name"] == trained_on.name:
        params = {**trained_on.params}
    if "image_size" in params:
        params["image_size"] = facts.image_size
    fits = f"this model's images are {facts.image_size}×{facts.image_size}×{facts.channels}"
    try:
        data = build.dataset(Choice(content["name"], params), data_root)
    except DataError as error:
        raise UserError(f"input={text}: {error} ({fits})") from None
    size, channels = data.facts.image_size, data.facts.channels
    convertible = channels == facts.channels or {channels, facts.channels} == {1, 3}
    if size != facts.image_size or not convertible:
        raise UserError(f"input={text}: its images are {size}×{size}×{channels}, {fits}")
    return data


def indices(places: str, text: str, key: str = "input", most: int = MAX_INPUTS) -> list[int]:
    """Numbers and ranges, such as 0-15 or 3,5,8 or 0-3,7. Raises UserError that names `key` for more than `most`."""
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
    """`mask=`: bool (N, 1, S, S), true where unknown, for the inputs `numbers` (N,) int64.

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
