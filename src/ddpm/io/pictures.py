"""Decode a picture file of unknown origin, with limits on its bytes, pixels and time."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm.errors import DataError
from ddpm.io.files import read_bounded, reason

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # Pillow would accept dozens, whatever the file's suffix
MAX_SOURCE_BYTES = 1 << 27
MAX_SOURCE_PIXELS = 50_000_000  # checked before decoding
MAX_JPEG_SCANS = 200  # a progressive JPEG has about ten; decoding each takes a pass over all pixels


def read_image(file: Path, size: int, nearest: bool = False) -> NDArray[np.uint8]:
    """Read a picture as RGB (size, size, 3), scaled and cropped around its centre. Raises DataError.

    The three channels of a grey picture are equal. Transparency becomes white; an animation gives its first frame.
    `nearest` scales to the nearest pixel, which adds no colours.
    """

    def square(image: Image.Image) -> NDArray[np.uint8]:
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        method = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), method))

    return decode(file, square, FORMATS, MAX_SOURCE_BYTES, MAX_SOURCE_PIXELS)


def decode(
    file: Path,
    convert: Callable[[Image.Image], NDArray[np.uint8]],
    formats: tuple[str, ...],
    max_bytes: int,
    max_pixels: int,
) -> NDArray[np.uint8]:
    """Decode a picture of 8 bits a channel; return `convert` of it. Raises DataError with the file's name."""
    data = read_bounded(file, max_bytes)
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise DataError(f"{file}: a JPEG with more than {MAX_JPEG_SCANS} scans")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are checked below, and unused metadata
            with Image.open(io.BytesIO(data), formats=formats) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width}×{image.height}"
                    raise DataError(f"{file}: {size} pixels; allowed: {max_pixels} in all")
                if image.mode[0] in "IF":
                    raise DataError(f"{file}: mode {image.mode}: convert it to 8 bits a channel")
                image.load()
                return convert(image)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{file}: cannot be read as an image (not {', '.join(formats)})") from error
    except Exception as error:  # decoders let struct.error and others through
        raise DataError(f"{file}: cannot be read as an image ({reason(error)})") from error
