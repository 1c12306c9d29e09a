"""Load any folder of images; sub-folders, if there are any, are classes."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.data.dataset import Dataset, Split, hold_out
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError, is_plain, printable
from ddpm.io.cache import cached_images, fingerprint
from ddpm.io.files import reason, user_path
from ddpm.io.pictures import read_image

__all__ = ["SUFFIXES", "folder", "is_image", "read_image"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
MAX_IMAGE_SIZE = 1_024
MAX_MEMORY = 1 << 33  # bytes of all images after scaling
MAX_ENTRIES = 10_000_000  # files and folders


def folder(data_root: Path, *, path: str, image_size: int = 32) -> Dataset:
    """Load the images of the folder `path` as uint8 (N, C, S, S).

    A tenth each are for validation and test, at least one. Images lie either all in `path` (no labels) or all in its
    sub-folders (one class each, sorted by name). Each is scaled and cropped around its centre to S×S; transparency
    becomes white; an animation gives its first frame. C is 1 if every image is grey, else 3. Hidden files and other
    kinds of files are ignored. If decoding takes long, the images are cached until a file is added, removed or changed.
    `data_root` is not used. Raises DataError for too few or misplaced images and for a file that cannot be read.
    """
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise DataError(f"dataset.image_size={image_size}; allowed: 1 to {MAX_IMAGE_SIZE}")
    root = user_path(path)
    files, class_names = _list_images(root)
    name = f"folder-{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]}-{image_size}"
    images = cached_images(
        name, fingerprint(files), len(files), image_size, lambda: _read_all(files, image_size)
    )
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = torch.tensor([numbers[_class_of(file, root)] for file in files]) if class_names else None
    part = max(1, round(len(files) / 10))
    rest, test = hold_out(Split(torch.from_numpy(images), labels), part)
    train, val = hold_out(rest, part)
    facts = DatasetInfo("folder", images.shape[1], image_size, len(class_names), class_names, levels=256)
    return Dataset(facts, train, val, test)


def _read_all(files: list[Path], size: int) -> NDArray[np.uint8]:
    """Return uint8 (N, C, S, S), where C is 1 if all images are grey."""
    needed = len(files) * 3 * size**2
    if needed > MAX_MEMORY:
        raise DataError(
            f"{len(files)} images at dataset.image_size={size} take {needed} bytes; allowed: {MAX_MEMORY}"
        )
    images, grey = np.empty((len(files), 3, size, size), np.uint8), True
    for image, file in zip(images, files, strict=True):
        image[:] = read_image(file, size).transpose(2, 0, 1)
        grey = grey and bool((image == image[:1]).all())
    return images[:, :1].copy() if grey else images


def _list_images(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return all image files, sorted, and the classes' names; no names if the images lie in root itself."""
    if not os.path.isdir(root):
        raise DataError(f"dataset.path={root}: there is no such folder")
    files = sorted(_walk(root))
    nested = [file for file in files if file.parent != root]
    if len(files) < 3:
        raise DataError(
            f"{root}: {len(files)} images found ({', '.join(SUFFIXES)}); at least 3 are needed, "
            f"one each for train, validation and test"
        )
    if 0 < len(nested) < len(files):
        raise DataError(
            f"{root}: {len(files) - len(nested)} images lie in the folder itself and {len(nested)} in "
            f"sub-folders; put all of them in sub-folders (one for each class) or none"
        )
    class_names = tuple(sorted({_class_of(file, root) for file in nested}))
    if strange := [name for name in class_names if not is_plain(name)]:
        raise DataError(f"{root}: the name of the sub-folder '{printable(strange[0])}' is no plain text")
    return files, class_names


def _walk(root: Path) -> list[Path]:
    """Return the image files of the folder and of all folders below it; do not follow links to folders."""
    found, folders, seen = [], [root], 0
    while folders:
        here = folders.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_ENTRIES:
                        raise DataError(f"{root}: holds more than {MAX_ENTRIES} files and folders")
                    if entry.is_dir(follow_symlinks=False):
                        folders += [] if entry.name.startswith(".") else [here / entry.name]
                    elif is_image(path := here / entry.name, root):
                        found.append(path)
        except OSError as error:
            raise DataError(f"{here}: cannot be read ({reason(error)})") from error
    return found


def is_image(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix.lower() in SUFFIXES and not hidden and os.path.isfile(file)


def _class_of(file: Path, root: Path) -> str:
    return file.relative_to(root).parts[0]
