"""One picture file of unknown origin, decoded within bounds of size, memory and time."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import DataError
from ddpm.io.files import read_bounded, reason

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # Pillow knows dozens, and goes by the content, not the name
MAX_SOURCE_BYTES = 1 << 27
MAX_SOURCE_PIXELS = 50_000_000  # known before they are unpacked
MAX_JPEG_SCANS = 200  # a progressive JPEG has ten; each costs a pass over all pixels, however short it is


def read_image(file: Path, size: int, nearest: bool = False) -> NDArray[np.uint8]:
    """(size, size, 3), the three equal for a grey image; `nearest` makes no new colours. Raises DataError.

    Scaled and cut around its middle; transparency becomes white; of an animation the first frame is taken.
    """

    def square(image: "Image") -> NDArray[np.uint8]:
        from PIL import Image, ImageOps

        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        method = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), method))

    return decode(file, square, FORMATS, MAX_SOURCE_BYTES, MAX_SOURCE_PIXELS)


def decode(
    file: Path,
    convert: Callable[["Image"], NDArray[np.uint8]],
    formats: tuple[str, ...],
    max_bytes: int,
    max_pixels: int,
) -> NDArray[np.uint8]:
    """The decoded picture, 8 bits a channel, as `convert` makes it. Raises DataError that names the file."""
    from PIL import Image, UnidentifiedImageError

    data = read_bounded(file, max_bytes)
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise DataError(f"{file}: a JPEG with more than {MAX_JPEG_SCANS} scans")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, checked below, and metadata that is not used
            with Image.open(io.BytesIO(data), formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise DataError(
                        f"{file}: {image.width}×{image.height} pixels; allowed: {max_pixels} in all"
                    )
                if image.mode[0] in "IF":
                    raise DataError(
                        f"{file}: more than 8 bits a channel (mode {image.mode}); convert it to 8 bits"
                    )
                image.load()
                return convert(image)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{file}: cannot be read as an image (not {', '.join(formats)})") from error
    except Exception as error:  # decoders raise whatever they stumble over, struct.error for one
        raise DataError(f"{file}: cannot be read as an image ({reason(error)})") from error
