"""Convert tensors in [-1, 1] to uint8, arrange images in grids, and write picture files."""

import io
import math
import os
import struct
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm.errors import UserError
from ddpm.io.files import reason, write_atomically

Pixels = NDArray[np.uint8]
GAP, GREY = 2, 96  # between images of a grid
WIDEST = 2100  # pixels of a picture's side, as far as the choice is ours
SUFFIXES = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP"
}  # fmt: skip
EXACT: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 in 0 … 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Pixels:
    """Clip (N, C, H, W) to [-1, 1] and round it to uint8 (N, H, W, C) in 0 … 255.

    Raises UserError for other shapes, whole numbers, sparse and other odd tensors, and what is not finite.
    """
    plain = isinstance(x, Tensor) and x.layout == torch.strided and not (x.is_meta or x.is_nested)
    if not plain or x.ndim != 4 or not x.is_floating_point():
        odd = f"{x.layout} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        is_ = f"{x.dtype} {tuple(x.shape)}" if plain else odd
        raise UserError(f"images: {is_}: must be a tensor (N, C, H, W) of floating-point numbers in [-1, 1]")
    x = x.detach().float()
    if not x.isfinite().all():
        raise UserError("images: hold numbers that are not finite")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def fitting(size: int) -> int:
    """Return how many images of a size stand side by side in a picture that can be looked at."""
    return max(1, (WIDEST - GAP) // (size + GAP))


def grid(images: Pixels, nrow: int | None = None) -> Pixels:
    """Arrange (N, H, W, C) in one picture, `nrow` in a row (near-square if None), small images enlarged."""
    n, height, width, channels = images.shape
    nrow = min(nrow or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / nrow)
    room = (WIDEST // max(nrow, rows) - GAP) // max(height, width)
    scale = max(1, min(round(56 / max(height, width)), room))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale + GAP, width * scale + GAP
    canvas = np.full((rows * height + GAP, nrow * width + GAP, channels), GREY, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // nrow * height + GAP, i % nrow * width + GAP
        canvas[top : top + height - GAP, left : left + width - GAP] = image
    return canvas


def by_class(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a table of the images' numbers with one class in each row, -1 where a row is shorter."""
    kinds, counts = np.unique(classes, return_counts=True)
    table = np.full((len(kinds), counts.max()), -1)
    for row, kind, count in zip(table, kinds, counts, strict=True):
        row[:count] = np.flatnonzero(classes == kind)
    return table


def in_rows(n: int, nrow: int) -> NDArray[np.int64]:
    """Return a table of the numbers 0 … n-1, `nrow` in a row, -1 after the last."""
    nrow = min(nrow, n)
    return np.pad(np.arange(n), (0, -n % nrow), constant_values=-1).reshape(-1, nrow)


def table(images: Pixels, places: NDArray[np.int64]) -> tuple[Pixels, NDArray[np.int64]]:
    """Arrange images (N, H, W, C) as a table of their numbers says, -1 for none, in a picture of at most WIDEST.

    Rows that are wider wrap; what does not fit below is left out. Returns the picture and the numbers shown.
    """
    fit, (rows, length) = fitting(max(images.shape[1:3])), places.shape
    lines = min(math.ceil(length / fit), max(1, fit // rows))  # of a row
    width = min(fit, math.ceil(length / lines))
    filled = np.pad(places, ((0, 0), (0, lines * width)), constant_values=-1)
    places = filled[:, : lines * width].reshape(-1, width)[:fit]
    with_none = np.concatenate([images, np.full_like(images[:1], GREY)])
    return grid(with_none[places.flatten()], width), places


def save_png(path: Path, image: Pixels) -> None:
    """Write an image (H, W, C) as PNG, atomically. Raises OSError."""
    _save(path, image, "PNG")


def save_grid(images: Tensor, path: str | Path, nrow: int | None = None) -> None:
    """Write (N, C, H, W) in [-1, 1], C 1 or 3, as one picture, `nrow` in a row, atomically.

    The path's suffix names the format: png (or none), jpg, jpeg, bmp, gif, webp. Raises OSError, and UserError for
    arguments that are none of this.
    """
    pixels = to_uint8(images)
    if len(pixels) == 0 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise UserError(f"images: {tuple(images.shape)}: must be (N, C, H, W) with N at least 1, C 1 or 3")
    suffix = Path(path).suffix.lower() if isinstance(path, str | os.PathLike) else "none"
    if (format_ := SUFFIXES.get(suffix or ".png")) is None:
        raise UserError(f"path={path!r}: must be a path that ends with one of {', '.join(SUFFIXES)}")
    if nrow is not None and (isinstance(nrow, bool) or not isinstance(nrow, Integral) or nrow < 1):
        raise UserError(f"nrow={nrow!r}: must be a whole number of at least 1, or None")
    try:
        _save(Path(path), grid(pixels, nrow), format_)
    except (ValueError, struct.error) as error:
        raise UserError(f"path={path}: {format_} cannot hold this picture ({reason(error)})") from error


def save_gif(path: Path, frames: Sequence[Pixels], milliseconds: int = 60) -> None:
    """Write frames (H, W, C) as a looping GIF that pauses on its last frame. Raises OSError."""
    first, *rest = [_pillow(frame) for frame in frames]
    durations = [milliseconds] * len(rest) + [1500]
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    write_atomically(path, data.getvalue(), durable=False)


def _save(path: Path, image: Pixels, format_: str) -> None:
    data = io.BytesIO()
    _pillow(image).save(data, format_, **EXACT.get(format_, {}))
    write_atomically(path, data.getvalue(), durable=False)


def _pillow(image: Pixels) -> Image.Image:
    """Of other than 1 or 3 channels show the first three, or the first."""
    channels = image.shape[-1]
    return Image.fromarray(np.ascontiguousarray(image[..., :3] if channels >= 3 else image[..., 0]))
