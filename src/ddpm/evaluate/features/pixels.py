"""Whitened pixels: features without any learning."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.evaluate.features.network import Whitening, dimensions, spread_out, whitening

IMAGES = 10_000  # training images that the whitening is made from
SIDE = 32  # larger images are averaged down to at most this before their pixels are whitened


class Projection(NamedTuple):
    """Map uint8 images (N, C, S, S) to whitened pixels, float64 (N, d). `factor`: pixels averaged along each side."""

    whitening: Whitening
    factor: int

    def __call__(self, images: Tensor) -> Tensor:
        return self.whitening(_pixels(images, self.factor))


def pixel_features(train: Tensor) -> Projection:
    """Whiten pixels on at most 10,000 of the training images uint8 (N, C, S, S), 8 to 32 directions of most variance.

    A witness without any learning: what features see and pixels do not, or the reverse, is worth a look. Images of
    more than 32 pixels a side are averaged down first. Raises DataError where the images are all alike.
    """
    factor = -(-train.shape[-1] // SIDE)
    pixels = _pixels(train[spread_out(len(train), IMAGES)], factor)
    return Projection(whitening(pixels, dimensions(len(train))), factor)


def _pixels(images: Tensor, factor: int) -> Tensor:
    parts = [F.avg_pool2d(part.double() / 255, factor).flatten(1) for part in torch.split(images, 1_000)]
    return torch.cat(parts)
