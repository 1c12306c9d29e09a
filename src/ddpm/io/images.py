"""Convert tensors in [-1, 1] to uint8, arrange images in grids, and write PNG and GIF files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm.io.files import write_atomically

Pixels = NDArray[np.uint8]


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 in 0 … 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Pixels:
    """Clip (N, C, H, W) to [-1, 1] and round it to uint8 (N, H, W, C) in 0 … 255."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(images: Pixels, nrow: int | None = None, gap: int = 2) -> Pixels:
    """Arrange (N, H, W, C) in one picture, `nrow` in a row (near-square if None), small images enlarged."""
    n, height, width, channels = images.shape
    nrow = min(nrow or math.ceil(math.sqrt(n)), n)
    scale = max(1, round(56 / max(height, width))) if n <= 1024 else 1
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width, rows = height * scale + gap, width * scale + gap, math.ceil(n / nrow)
    canvas = np.full((rows * height + gap, nrow * width + gap, channels), 96, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // nrow * height + gap, i % nrow * width + gap
        canvas[top : top + height - gap, left : left + width - gap] = image
    return canvas


def rows(images: Pixels, classes: NDArray[np.int64]) -> tuple[Pixels, int]:
    """Return images and row length for a grid with one class in each row, short rows filled up in grey."""
    kinds, counts = np.unique(classes, return_counts=True)
    table = np.full((len(kinds), counts.max(), *images.shape[1:]), 96, dtype=np.uint8)
    for row, kind, count in zip(table, kinds, counts, strict=True):
        row[:count] = images[classes == kind]
    return table.reshape(-1, *images.shape[1:]), int(counts.max())


def save_png(path: Path, image: Pixels) -> None:
    """Write an image (H, W, 1 or 3) as PNG, atomically. Raises OSError."""
    data = io.BytesIO()
    _pillow(image).save(data, "PNG")
    write_atomically(path, data.getvalue(), durable=False)


def save_grid(images: Tensor, path: str | Path, nrow: int | None = None) -> None:
    """Write (N, C, H, W) in [-1, 1], C 1 or 3, as one PNG, `nrow` in a row, atomically. Raises OSError."""
    save_png(Path(path), grid(to_uint8(images), nrow))


def save_gif(path: Path, frames: Sequence[Pixels], milliseconds: int = 60) -> None:
    """Write frames (H, W, C) as a looping GIF that pauses on its last frame. Raises OSError."""
    first, *rest = [_pillow(frame) for frame in frames]
    durations = [milliseconds] * len(rest) + [1500]
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    write_atomically(path, data.getvalue(), durable=False)


def _pillow(image: Pixels) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
