"""Read the Hoda set of handwritten Persian digits, centre them in squares as in MNIST, and cache the images.

The licence forbids commercial use, so the set is neither downloaded nor shipped: the user provides the files.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpm.data.dataset import Dataset, Split, check_image_size, hold_out
from ddpm.data.hoda import MAX_BYTES, MAX_PIXELS, NUM_CLASSES, Crops, digest, load_crops, read_cdb
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError
from ddpm.io.cache import as_array, cache_folder, load_arrays, save_arrays
from ddpm.io.files import read_bounded, reason

SIZES = (28, 32, 64)
MAX_SOURCE = MAX_PIXELS + MAX_BYTES  # bytes of a file with crops
HELD_OUT = 5_000  # validation images, taken from the 60,000 training images
DRAWING = 1  # version of `draw`: increase it when the result changes, so that no older cache is used
NOTICE = (
    "Hoda set of handwritten Persian digits: Khosravi & Kabir 2007, Introducing a very large dataset of "
    "handwritten Farsi digits and a study on their varieties (http://farsiocr.ir). "
    "Free for research, not for commercial use."
)


@dataclass(frozen=True)
class Part:
    """One of the three official parts: its file, how many images it holds, and what they are verified by."""

    cdb: str
    count: int
    images: str  # `digest` of its images: whatever file they come in
    blob: str = ""  # SHA-1 of the official file as a blob of git, where no SHA-256 of it is published


PARTS = {
    "train": Part(
        "Train 60000.cdb",
        60_000,
        "bc567e5ac4b7613fab42a64b577188c49010191f1f9726cb023b1d5167a1e4a1",
        blob="a87ae8c4b1a9e9227f600194ae82a8af3d0e08ec",
    ),
    "test": Part(
        "Test 20000.cdb", 20_000, "f5f0b4286e83fa7f0c82e5348c5d763cd7793f38f33a68315d8776dd3814d5ee"
    ),
    "remaining": Part(
        "RemainingSamples.cdb", 22_352, "32b60e91d149cbf1204b977eea1dc79fcc2267bd9c918da6768d7b2fa55232ea"
    ),
}


def persian(data_root: Path, *, image_size: int = 28, remaining: bool = False) -> Dataset:
    """Load Persian digits (Khosravi & Kabir 2007): uint8 (N, 1, S, S), ink 255 on 0, S = 28, 32 or 64.

    55,000 images to train on, 5,000 for validation, 20,000 for test. `remaining` adds the 22,352 images of the
    third official part to the training images. Files are read from `<data_root>/hoda/`; a part without its
    `.cdb` is read from the output of scripts/convert_persian.py. The notice is empty if all images came from
    the cache. Raises DataError for absent or malformed files, and for images that are not the published ones.
    """
    check_image_size(image_size, SIZES)
    names = ["train", "test", "remaining"] if remaining else ["train", "test"]
    splits, cached = {}, {}
    for name, source in _find(data_root / "hoda", names).items():
        splits[name], cached[name] = _load_part(source, PARTS[name], image_size)
    train, val = hold_out(splits["train"], HELD_OUT)
    if remaining:
        rest = splits["remaining"]
        assert train.labels is not None and rest.labels is not None
        train = Split(torch.cat([train.images, rest.images]), torch.cat([train.labels, rest.labels]))
    facts = DatasetInfo("persian", 1, image_size, NUM_CLASSES, class_names=tuple("0123456789"), levels=256)
    return Dataset(facts, train, val, splits["test"], "" if all(cached.values()) else NOTICE)


def converted_name(part: str) -> str:
    """Return the name of a part's converted file, in `<data_root>/hoda/` or in the cache folder."""
    return f"hoda-{part}.safetensors"


def draw(crops: Crops, image_size: int) -> NDArray[np.uint8]:
    """Scale each digit's longer side to 20/28 of S and centre its mass. Returns uint8 (N, S, S).

    As MNIST was made: LeCun et al. 1998, section III-A. No digit is cut off, even where its mass lies far to one side.
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
    height, width = crop.shape
    longer = max(height, width)
    size = max(1, round(width * box / longer)), max(1, round(height * box / longer))
    return np.asarray(
        Image.fromarray(crop).resize(size, Image.Resampling.BILINEAR)
    )  # averages when it shrinks


def _corner(mass: NDArray[np.uint64], image_size: int) -> int:
    """Return the first row (or column) of a digit with this ink per row, its centre of mass in the middle."""
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


def _load_part(source: Path, part: Part, image_size: int) -> tuple[Split, bool]:
    """Return a part and whether it came from the cache; verify, draw and cache it if not."""
    data = read_bounded(source, MAX_SOURCE)
    sha256 = hashlib.sha256(data).hexdigest()
    path = cache_folder() / f"persian-{image_size}-v{DRAWING}-{sha256}.safetensors"
    if (cached := _load_cached(path, part.count, image_size, sha256)) is not None:
        return cached, True
    crops = load_crops(source) if source.suffix == ".safetensors" else read_cdb(source)
    if len(crops) != part.count:
        raise DataError(f"{source}: holds {len(crops)} images; this part of the Hoda set has {part.count}")
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if digest(crops) != part.images and blob != part.blob:
        raise DataError(f"{source}: its images are not those of {part.cdb}, as their hash says; get it again")
    images = draw(crops, image_size)
    try:
        save_arrays(path, {"images": images, "labels": crops.labels, "source": as_array(sha256)})
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({reason(error)}); set DDPM_CACHE to another folder"
        ) from error
    return _split(images, crops.labels), False


def _load_cached(path: Path, count: int, image_size: int, sha256: str) -> Split | None:
    """Return None unless the file is whole and holds what `_load_part` writes for a source of this hash."""
    try:
        arrays = load_arrays(path, count * image_size**2 + MAX_BYTES)
    except DataError:
        return None
    wanted = {"images": ("uint8", (count, image_size, image_size)), "labels": ("uint8", (count,))}
    wanted |= {"source": ("uint8", (len(sha256),))}
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    if found != wanted or arrays["labels"].max() >= NUM_CLASSES:
        return None
    if arrays["source"].tobytes() != sha256.encode():
        return None
    return _split(arrays["images"], arrays["labels"])


def _split(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())
