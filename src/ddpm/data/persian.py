"""The Hoda set of handwritten Persian digits, drawn into squares the way MNIST was made, and cached.

Its licence forbids commercial use, so it is never downloaded and never shipped: the user has to have it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from ddpm.data.dataset import Dataset, Split, check_image_size, hold_out
from ddpm.data.hoda import MAX_BYTES, NUM_CLASSES, Crops, load_crops, read_cdb
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError
from ddpm.io.cache import cache_folder, load_arrays, save_arrays, stamp
from ddpm.io.files import reason

SIZES = (28, 32, 64)
HELD_OUT = 5_000  # validation images, taken from the 60,000 training images
DRAWING = 1  # count up when `draw` changes, so that no older cache is used
NOTICE = (
    "Hoda set of handwritten Persian digits: Khosravi & Kabir 2007, Introducing a very large dataset of "
    "handwritten Farsi digits and a study on their varieties (http://farsiocr.ir). "
    "Free for research, not for commercial use."
)


@dataclass(frozen=True)
class Part:
    """One of the three official parts: its file, and how many images it holds."""

    cdb: str
    count: int


PARTS = {
    "train": Part("Train 60000.cdb", 60_000),
    "test": Part("Test 20000.cdb", 20_000),
    "remaining": Part("RemainingSamples.cdb", 22_352),
}


def persian(data_root: Path, *, image_size: int = 28, remaining: bool = False) -> Dataset:
    """Persian digits (Khosravi & Kabir 2007), images uint8 (N, 1, S, S), ink 255 on 0, S = 28, 32 or 64.

    55,000 images to train on, 5,000 for validation, 20,000 for test; `remaining` adds the 22,352 that the
    authors left over to the training images, validation and test stay the same. The files are read from
    `<data_root>/hoda/`; a part without its `.cdb` is read from what scripts/convert_persian.py made. The
    notice is empty when everything came from the cache. Raises DataError for absent or malformed files.
    """
    check_image_size(image_size, SIZES)
    names = ["train", "test", "remaining"] if remaining else ["train", "test"]
    sources = _find(data_root / "hoda", names)
    splits, notice = {}, ""
    for name, source in sources.items():
        cached = cache_folder() / f"persian-{image_size}-v{DRAWING}-{stamp([source])}.safetensors"
        count = PARTS[name].count
        split = _load_cached(cached, count, image_size)
        if split is None:
            split, notice = _build(cached, source, count, image_size), NOTICE
        splits[name] = split
    train, val = hold_out(splits["train"], HELD_OUT)
    if remaining:
        train = _join(train, splits["remaining"])
    facts = DatasetInfo("persian", 1, image_size, NUM_CLASSES, class_names=tuple("0123456789"), levels=256)
    return Dataset(facts, train, val, splits["test"], notice)


def converted_name(part: str) -> str:
    """Name of a part's converted file, which is looked for in `<data_root>/hoda/` and the cache folder."""
    return f"hoda-{part}.safetensors"


def draw(crops: Crops, image_size: int) -> NDArray[np.uint8]:
    """uint8 (N, S, S): each digit with a longer side of 20/28 of S, its centre of mass in the middle.

    So MNIST was made (LeCun et al. 1998, section III-A). A digit with its mass far to one side stays inside.
    """
    images = np.zeros((len(crops), image_size, image_size), np.uint8)
    box = round(20 / 28 * image_size)
    for image, crop in zip(images, crops.images(), strict=True):
        digit = _scale(crop, box)
        height, width = digit.shape
        top, left = _corner(digit.sum(axis=1), image_size), _corner(digit.sum(axis=0), image_size)
        image[top : top + height, left : left + width] = digit
    return images


def _scale(crop: NDArray[np.uint8], box: int) -> NDArray[np.uint8]:
    from PIL import Image

    height, width = crop.shape
    longer = max(height, width)
    size = max(1, round(width * box / longer)), max(1, round(height * box / longer))
    return np.asarray(
        Image.fromarray(crop).resize(size, Image.Resampling.BILINEAR)
    )  # averages when it shrinks


def _corner(mass: NDArray[np.uint64], image_size: int) -> int:
    """Where a digit with this ink per row (or column) begins, so that its centre of mass is in the middle."""
    total = int(mass.sum())
    centre = float(np.arange(len(mass)) @ mass) / total if total else (len(mass) - 1) / 2
    return min(max(round((image_size - 1) / 2 - centre), 0), image_size - len(mass))


def _find(folder: Path, names: list[str]) -> dict[str, Path]:
    found, absent = {}, []
    for name in names:
        converted = converted_name(name)
        places = [folder / PARTS[name].cdb, folder / converted, cache_folder() / converted]
        present = [place for place in places if os.path.isfile(place)]
        if present:
            found[name] = present[0]
        else:
            absent.append(repr(PARTS[name].cdb))
    if absent:
        raise DataError(
            f"{folder} lacks {', '.join(absent)} of the Hoda set, which is free for research only and is not "
            f"downloaded: get it from http://farsiocr.ir, or turn another form of it into a file in "
            f"{cache_folder()} with scripts/convert_persian.py"
        )
    return found


def _load_cached(path: Path, count: int, image_size: int) -> Split | None:
    """None if there is no such file, or it is broken or not what `_build` wrote: then it is built again."""
    try:
        arrays = load_arrays(path, count * image_size**2 + MAX_BYTES)
    except DataError:
        return None
    wanted = {"images": ("uint8", (count, image_size, image_size)), "labels": ("uint8", (count,))}
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    if found != wanted or arrays["labels"].max() >= NUM_CLASSES:
        return None
    return _split(arrays["images"], arrays["labels"])


def _split(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def _build(cached: Path, source: Path, count: int, image_size: int) -> Split:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            split = _load_cached(cached, count, image_size)  # another process may have built it meanwhile
            if split is None:
                for left_by_a_killed_process in cached.parent.glob(f".{cached.name}.*.tmp"):
                    left_by_a_killed_process.unlink()
                crops = load_crops(source) if source.suffix == ".safetensors" else read_cdb(source)
                if len(crops) != count:
                    raise DataError(
                        f"{source}: holds {len(crops)} images; this part of the Hoda set has {count}"
                    )
                images = draw(crops, image_size)
                save_arrays(cached, {"images": images, "labels": crops.labels})
                split = _split(images, crops.labels)
            return split
    except OSError as error:
        raise DataError(
            f"{cached}: cannot be written ({reason(error)}); set DDPM_CACHE to another folder"
        ) from error


def _join(first: Split, second: Split) -> Split:
    assert first.labels is not None and second.labels is not None
    return Split(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))
