"""Load any folder of images; sub-folders, if there are any, are classes."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.data.dataset import Dataset, Split, hold_out
from ddpm.data.info import DatasetInfo, listed
from ddpm.data.picture_files import SUFFIXES, class_of, find_pictures
from ddpm.errors import DataError, is_plain, printable
from ddpm.io.cache import cached_images, fingerprint
from ddpm.io.files import user_path
from ddpm.io.pictures import read_image

TRAIN = {"train", "training"}
OTHER_SPLITS = {"test", "testing", "val", "valid", "validation", "dev", "eval"}
MAX_IMAGE_SIZE = 1_024
MAX_MEMORY = 1 << 33  # bytes of all images after scaling


def folder(data_root: Path, *, path: str, image_size: int = 32) -> Dataset:
    """Load the images of the folder `path` as uint8 (N, C, S, S).

    A tenth each are for validation and test, at least one, and never the last image of a class to train on. Images lie
    either all in `path` (no labels) or all in its sub-folders (one class each, numbered in the order of the names, 2
    before 10). Each is scaled and cropped around its centre to S×S; transparency becomes white; an animation gives its
    first frame. C is 1 if every image is grey, else 3. The notice says what was taken and what was passed over
    (`find_pictures`). If decoding takes long, the images are cached until a file is added, removed or changed.
    `data_root` is not used. Raises DataError for too few or misplaced images and for a file that cannot be read.
    """
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise DataError(f"dataset.image_size={image_size}; allowed: 1 to {MAX_IMAGE_SIZE}")
    root = user_path(path)
    if not os.path.isdir(root):
        raise DataError(f"dataset.path={root}: there is no such folder")
    found = find_pictures(root)
    files = found.files
    names = _classes(root, files, found.passed_over)
    cache = f"folder-{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]}-{image_size}"
    images = cached_images(
        cache, fingerprint(files), len(files), image_size, lambda: _read_all(files, image_size)
    )
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([numbers[class_of(file, root)] for file in files]) if names else None
    part = max(1, min(round(len(files) / 10), (len(files) - len(names)) // 2))
    rest, test = hold_out(Split(torch.from_numpy(images), labels), part)
    train, val = hold_out(rest, part)
    facts = DatasetInfo("folder", images.shape[1], image_size, len(names), names, levels=256)
    taken = f"{root}: {len(files):,} images taken" + (f" in {len(names):,} sub-folders" if names else "")
    about = [taken + (f"; {found.passed_over}" if found.passed else ""), *_warnings(root, files, names)]
    return Dataset(facts, train, val, test, "\n".join(map(printable, about)))


def _read_all(files: list[Path], size: int) -> NDArray[np.uint8]:
    """Return uint8 (N, C, S, S), where C is 1 if all images are grey."""
    needed = len(files) * 3 * size**2
    if needed > MAX_MEMORY:
        many = f"{len(files)} images at dataset.image_size={size}"
        raise DataError(f"{many} take {needed} bytes; allowed: {MAX_MEMORY}")
    images, grey = np.empty((len(files), 3, size, size), np.uint8), True
    for image, file in zip(images, files, strict=True):
        image[:] = read_image(file, size).transpose(2, 0, 1)
        grey = grey and bool((image == image[:1]).all())
    return images[:, :1].copy() if grey else images


def _classes(root: Path, files: list[Path], passed_over: str) -> tuple[str, ...]:
    """Return the names of the classes in their order; none if the images lie in root itself. Raises DataError."""
    nested = [file for file in files if file.parent != root]
    names = tuple(sorted({class_of(file, root) for file in nested}, key=natural))
    if strange := [name for name in names if not is_plain(name)]:
        raise DataError(f"{root}: the name of the sub-folder '{printable(strange[0])}' is no plain text")
    if 0 < len(nested) < len(files):
        raise DataError(
            f"{root}: {len(files) - len(nested)} images lie in the folder itself and {len(nested)} in "
            f"sub-folders ({listed(names)}); put all of them in sub-folders (one for each class) or none"
        )
    if len(files) < max(3, len(names) + 2):
        raise DataError(
            f"{root}: {len(files)} images found ({', '.join(SUFFIXES)}); at least {max(3, len(names) + 2)} are needed, "
            f"one{' of each class' if names else ''} to train on and one each for validation and test"
            + (f"; {passed_over}" if passed_over else "")
        )
    return names


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a key by which names are sorted with their numbers by size: 2 before 10."""
    parts = re.split(r"(\d+)", name)  # text and numbers in turn
    return [int(part) if part.isdecimal() else part for part in parts], name


def _warnings(root: Path, files: list[Path], names: tuple[str, ...]) -> list[str]:
    """Say where sub-folders are probably not meant as classes."""
    words = {name.lower() for name in names}
    lines = []
    if words and (words <= TRAIN | OTHER_SPLITS or (words & TRAIN and words & OTHER_SPLITS)):
        lines.append(
            f"warning: the sub-folders {listed(names)} are taken for classes; where they are the splits of a dataset, "
            f"give the folder of one split, such as dataset.path={root / names[-1]}"
        )
    if deeper := [file for file in files if len(file.relative_to(root).parts) > 2]:
        lines.append(
            f"{len(deeper):,} images lie deeper, such as {deeper[0].relative_to(root)}: "
            f"their class is '{class_of(deeper[0], root)}', the first sub-folder"
        )
    return lines
