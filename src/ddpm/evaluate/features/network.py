"""The small network whose inner statistics serve as features, and the whitening that follows it."""

import math
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.errors import DataError
from ddpm.runtime.randomness import normal

HIDDEN = 256  # units of the reconstruction head
SMALL, LARGE = 16, 40  # pixels: below and above these the network is another
TINY = 1e-4  # under a root, so that its slope stays finite
RANK = 1e-9  # of the largest variance: below it a direction is rounding noise


class Output(NamedTuple):
    """moments (N, M): what the features are made of; logits (N, num_classes)."""

    moments: Tensor
    logits: Tensor


class FeatureNetwork(nn.Module):
    """Three stages of two 3×3 convolutions, halved between them; a classifier looks at the third stage.

    The moments are the spatial means and deviations of every channel after the first and the second stage, once
    halved (8×8 images are not halved again after the second). SiLU is smooth, and halving blurs first (Zhang 2019,
    *Making Convolutional Networks Shift-Invariant Again*), so a small change of an image is a small change of its
    features. Nothing is normalised: ink and contrast must stay visible. Images of more than 40 pixels are halved once
    before the first stage.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        widths = (16, 24, 32) if image_size < SMALL else (16, 32, 64)
        self.halve_first, self.halve_twice = image_size > LARGE, image_size >= SMALL
        side = image_size >> 1 + self.halve_first + self.halve_twice
        self.convolutions = nn.ModuleList()
        for width in widths:
            for before in (channels, width):
                self.convolutions.append(nn.Conv2d(before, width, 3, padding=1))
            channels = width
        self.num_moments = 2 * (widths[0] + widths[1])
        self.classifier = nn.Linear(widths[2] * side**2, num_classes)

    def forward(self, images: Tensor) -> Output:
        """Compute moments and logits of images float32 (N, C, S, S) in [0, 1]."""
        x = halve(images) if self.halve_first else images
        moments = []
        for i, convolution in enumerate(self.convolutions):
            x = F.silu(convolution(x))
            if i in (1, 3):
                x = halve(x) if i == 1 or self.halve_twice else x
                mean = x.mean(dim=(2, 3))
                moments += [mean, ((x - mean[:, :, None, None]).square().mean(dim=(2, 3)) + TINY).sqrt()]
        return Output(torch.cat(moments, dim=1), self.classifier(x.flatten(1)))


def reconstruction_head(num_moments: int, channels: int, image_size: int) -> nn.Sequential:
    """Map moments (N, M) to all pixels, so that slant and stroke width are not lost to the features."""
    return nn.Sequential(
        nn.Linear(num_moments, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, channels * image_size**2)
    )


def halve(x: Tensor) -> Tensor:
    """Blur with the binomial (1, 3, 3, 1) / 8 along both axes, then take every second pixel."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def initialise(module: nn.Module, seed: int, stream: str) -> None:
    """Draw weights by He et al. 2015 (variance 2 / inputs), biases 0; in place, from (seed, stream) alone."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            if parameter.ndim == 1:
                parameter.zero_()
                continue
            rows = torch.arange(len(parameter))
            inputs = math.prod(parameter.shape[1:])
            parameter.copy_(normal(seed, stream, i, rows, tuple(parameter.shape[1:])) * (2 / inputs) ** 0.5)


def repeatable() -> AbstractContextManager[None]:
    """Make convolutions deterministic, and nearly the same on every machine.

    Without TF32, which a GPU would use by itself and which keeps 10 bits of 23.
    """
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def unit(images: Tensor, device: torch.device) -> Tensor:
    """Convert uint8 to float32 in [0, 1] on the device, channels last, which is fastest on a CPU."""
    return (images.to(device).float() / 255).contiguous(memory_format=torch.channels_last)


class Whitening(NamedTuple):
    """(x - mean) @ matrix has mean 0 and covariance I over the set it was made from: mean (m,), matrix (m, d)."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) @ self.matrix


def whitening(x: Tensor, d: int) -> Whitening:
    """Whiten x (N, m) along its d directions of largest variance, or as many as there are; float64.

    Each direction's sign is fixed: its largest entry is positive. Raises DataError where nothing varies.
    """
    x = x.double()
    if not torch.isfinite(x).all():
        raise DataError("the training images' features are not finite: no distance can be measured with them")
    mean = x.mean(dim=0)
    centred = x - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(x) - 1))
    variances, vectors = variances.flip(0)[:d], vectors.flip(1)[:, :d]
    kept = (variances > RANK * variances[0]) & (variances > 0)
    if not kept.any():
        raise DataError("the training images are all alike: no distance can be measured with them")
    variances, vectors = variances[kept], vectors[:, kept]
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return Whitening(mean, vectors * signs / variances.sqrt())


def dimensions(n: int) -> int:
    """Choose the number of features for n training images: 8 to 32.

    More would follow ever smaller variances, and a distance within one class of 1,000 images would be mostly floor.
    """
    return min(32, max(8, n // 200))


def spread_out(n: int, most: int) -> Tensor:
    """Return indices of at most `most` of n images, evenly spaced, as a set may be in the order of its classes."""
    count = min(n, most)
    return torch.arange(count) * n // count
