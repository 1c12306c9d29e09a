"""Turn other forms of the Hoda set into a file that dataset=persian reads.

SOURCE is a `.mat` file with a cell array `Data` of crops and their `labels`, or a folder of PNG files whose
names start with the label (7.123.png). The order is kept (PNG files: sorted by name).
"""

import argparse
import re
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddpm.data.hoda import INK, MAX_PIXELS, MAX_RECORDS, MAX_SIDE, Crops, digest, pack, save_crops
from ddpm.data.mat import read_mat
from ddpm.data.persian import PARTS, converted_name
from ddpm.errors import DataError, printable
from ddpm.io.cache import cache_folder
from ddpm.io.files import reason
from ddpm.io.pictures import decode

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Image = NDArray[np.uint8]
MAX_PNG_BYTES = 1 << 20  # one digit has a few hundred


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="the .mat file or the folder of PNG files"
    )
    parser.add_argument("--split", choices=PARTS, required=True, help="which part of the set it holds")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: in the cache folder, found by itself)"
    )
    args = parser.parse_args()
    try:
        out = args.out or cache_folder() / converted_name(args.split)
        images, labels = read_folder(args.source) if args.source.is_dir() else read_mat(args.source)
        crops = to_crops(images, labels, args.source)
        save_crops(out, crops)
    except DataError as error:
        sys.exit(f"error: {printable(str(error))}")
    except OSError as error:
        sys.exit(f"error: {printable(str(error.filename or out))}: {reason(error)}")
    counts = ", ".join(
        f"{label}: {count}" for label, count in enumerate(np.bincount(crops.labels, minlength=10))
    )
    print(f"{out}: {len(crops)} images of {args.split} ({counts})")
    if len(crops) != PARTS[args.split].count:
        print(
            f"warning: dataset=persian expects {PARTS[args.split].count} images in {args.split}",
            file=sys.stderr,
        )
    elif digest(crops) != PARTS[args.split].images:
        print(
            f"warning: these are not the published images of {args.split}: dataset=persian will refuse them",
            file=sys.stderr,
        )


def read_folder(folder: Path) -> tuple[list[Image], list[int]]:
    paths = sorted(islice(folder.glob("*.png"), MAX_RECORDS + 1))
    if len(paths) > MAX_RECORDS:
        raise DataError(f"{folder}: more than {MAX_RECORDS} PNG files")
    images, labels = [], []
    for path in paths:
        label = re.match(r"(\d)(?!\d)", path.name, re.ASCII)
        if label is None:
            raise DataError(f"{path}: the name does not start with a label of one digit, like 7.123.png")
        image = decode(path, _grey, ("PNG",), MAX_PNG_BYTES, MAX_SIDE**2)
        if max(image.shape) > MAX_SIDE:
            height, width = image.shape
            raise DataError(f"{path}: {width}×{height} pixels; a side has at most {MAX_SIDE}")
        images.append(image)
        labels.append(int(label[1]))
    return images, labels


def _grey(image: "PillowImage") -> Image:
    return np.asarray(image.convert("L"))


def to_crops(images: list[Image], labels: list[int], source: Path) -> Crops:
    """Checked, and with light ink on dark. Raises DataError that names the first image that does not fit."""
    if not 0 < len(images) <= MAX_RECORDS or len(images) != len(labels):
        raise DataError(
            f"{source}: {len(images)} images and {len(labels)} labels; allowed: 1 to {MAX_RECORDS}, as many"
        )
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        if (
            image.dtype != np.uint8
            or image.ndim != 2
            or not 1 <= min(image.shape) <= max(image.shape) <= MAX_SIDE
        ):
            raise DataError(
                f"{source}: image {number} is {image.dtype} of shape {image.shape}; it must be uint8, "
                f"(height, width), with sides of 1 to {MAX_SIDE}"
            )
        if label not in range(10):
            raise DataError(f"{source}: image {number} has the label {label}; allowed: 0 to 9")
    if sum(image.size for image in images) > MAX_PIXELS:
        raise DataError(f"{source}: the images together have more than {MAX_PIXELS} pixels")
    crops = pack(images, labels)
    if crops.pixels.mean() > INK / 2:  # ink covers a third of the set's crops, so this is dark ink on light
        return Crops(INK - crops.pixels, crops.sizes, crops.labels)
    return crops


if __name__ == "__main__":
    main()
