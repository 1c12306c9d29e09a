"""Any folder of images: sub-folders, if there are any, are classes."""

import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.datasets.types import Dataset, Facts, Split, hold_out
from ddpm.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
MAX_SOURCE_PIXELS = 50_000_000  # of one file, known before it is unpacked
MAX_IMAGE_SIZE = 1_024


def folder(data_root: Path, *, path: str, image_size: int = 32) -> Dataset:
    """Images uint8 (N, C, S, S) of the folder `path`: a tenth each for validation and test, at least one.

    Images lie either all in `path` (no labels) or all in its sub-folders (one class each, in the order of
    their names). Each is scaled and cut around its middle to S×S; transparency becomes white; of an animation
    the first frame is taken. C is 1 if every image is grey, else 3. Hidden files and other kinds of files are
    passed over. `data_root` is not used. Raises DataError for too few or misplaced images and for a file that
    cannot be read.
    """
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise DataError(f"dataset.image_size={image_size}; allowed: 1 to {MAX_IMAGE_SIZE}")
    root = Path(path).expanduser()
    files, class_names = _list_images(root)
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)
    for image, file in zip(images, files, strict=True):
        image[:] = read_image(file, image_size)
    if (images == images[..., :1]).all():
        images = images[..., :1]
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = torch.tensor([numbers[_class_of(file, root)] for file in files]) if class_names else None
    part = max(1, round(len(files) / 10))
    everything = Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)
    rest, test = hold_out(everything, part)
    train, val = hold_out(rest, part)
    facts = Facts("folder", images.shape[-1], image_size, len(class_names), class_names, levels=256)
    return Dataset(facts, train, val, test)


def _list_images(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """All image files, sorted, and the names of the classes; none if the images lie in root itself."""
    if not root.is_dir():
        raise DataError(f"dataset.path={root}: there is no such folder")
    files = sorted(file for file in root.rglob("*") if is_image(file, root))
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
    return files, tuple(sorted({_class_of(file, root) for file in nested}))


def is_image(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


def _class_of(file: Path, root: Path) -> str:
    return file.relative_to(root).parts[0]


def read_image(file: Path, size: int, nearest: bool = False) -> NDArray[np.uint8]:
    """(size, size, 3), the three equal for a grey image; `nearest` makes no new colours. Raises DataError."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            source = Image.open(file)
        with source:
            if source.width * source.height > MAX_SOURCE_PIXELS:
                raise DataError(
                    f"{file}: {source.width}×{source.height} pixels; allowed: {MAX_SOURCE_PIXELS} in all"
                )
            if source.mode[0] in "IF":
                raise DataError(
                    f"{file}: more than 8 bits a channel (mode {source.mode}); convert it to 8 bits"
                )
            image = ImageOps.exif_transpose(source).convert("RGBA")
    except DataError:
        raise
    except (
        Exception
    ) as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, …
        raise DataError(f"{file}: cannot be read as an image ({error})") from error
    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    return np.asarray(ImageOps.fit(opaque, (size, size), method))
