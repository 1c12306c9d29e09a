"""A trained network as a denoiser: its estimate of x_0 and of the noise, guided and clipped."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.diffusion.process import invert, split
from ddpm.diffusion.schedules import Level, NoiseSchedule
from ddpm.errors import one_of, within

CLIPS = ("none", "clip", "dynamic")


class Estimate(NamedTuple):
    """A denoiser's estimate of x_0 and eps (N, C, H, W). `fraction` is that of `split`, or None."""

    x_0: Tensor
    eps: Tensor
    fraction: Tensor | None = None


@dataclass(eq=False)
class Denoiser:
    """A trained network, its schedule and its guidance: estimate (x_0, eps) for samplers.

    Raises ValueError for an option out of its range.
    """

    network: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    schedule: NoiseSchedule
    prediction: str
    y: Tensor | None = None  # (N,) labels
    clip: str = "clip"
    dynamic_percentile: float = 0.995
    guidance_scale: float = 1.0  # 1 is off, 0 is unconditional
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)  # of sigma / alpha
    null_label: int | None = None
    precision: torch.dtype = torch.float32  # of the network; all else is float32
    evaluations: int = field(default=0, init=False)  # passes of one image through the network so far

    def __post_init__(self) -> None:
        one_of("clip", self.clip, CLIPS)
        within("dynamic_percentile", self.dynamic_percentile, 0, 1)
        within("guidance_scale", self.guidance_scale, 0, math.inf)
        within("guidance_rescale", self.guidance_rescale, 0, 1)
        low, high = self.guidance_interval
        if not 0 <= low <= high:
            raise ValueError(f"guidance_interval = [{low}, {high}]: need 0 <= low <= high")
        if self.guidance_scale != 1 and (self.y is None or self.null_label is None):
            raise ValueError(f"guidance_scale = {self.guidance_scale}: needs labels and a null label; else 1")

    def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate:
        """Estimate x_0 and eps from x_t (N, C, H, W) at one noise level; `last`: x_0 will be the image itself.

        Where x_0 is clipped, eps follows from the clipped x_0; the old one would leave a grey residue.
        """
        output, fraction = split(self._output(x_t, level), x_t.shape[1])
        x_0, eps = invert(self.prediction, output, x_t, level.alpha, level.sigma)
        if self.clip != "none":
            dynamic = self.clip == "dynamic" and not last  # whose division would grey the image itself
            x_0 = threshold(x_0, self.dynamic_percentile if dynamic else None)
            eps = (x_t - level.alpha * x_0) / level.sigma
        return Estimate(x_0, eps, fraction)

    def _output(self, x_t: Tensor, level: Level) -> Tensor:
        """Evaluate the network, guided inside the interval of noise levels (Kynkäänniemi et al. 2024)."""
        t = torch.full((len(x_t),), level.t, dtype=torch.float32, device=x_t.device)
        low, high = self.guidance_interval
        scale = self.guidance_scale if low <= math.exp(-level.lambda_) <= high else 1.0
        if scale == 1:
            return self._evaluate(x_t, t, self.y)
        assert self.y is not None and self.null_label is not None
        null = torch.full_like(self.y, self.null_label)
        if scale == 0:
            return self._evaluate(x_t, t, null)
        both = self._evaluate(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([self.y, null]))
        self.evaluations += 1  # one call, but two passes of each image
        cond, uncond = both.chunk(2)
        return guide(cond, uncond, x_t.shape[1], scale, self.guidance_rescale)

    def _evaluate(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.evaluations += 1
        low = self.precision != torch.float32
        with torch.autocast(x_t.device.type, self.precision) if low else nullcontext():
            output = self.network(x_t, t, y)
        return output.float()


def guide(cond: Tensor, uncond: Tensor, channels: int, scale: float, rescale: float) -> Tensor:
    """Return uncond + scale (cond - uncond) of two network outputs (Ho & Salimans 2022, eq. 6, scale = 1 + w).

    `rescale` in [0, 1] moves the standard deviation towards that of cond (Lin et al. 2024, section 3.4).
    Channels beyond the first `channels` hold the variance and stay those of cond.
    """
    mean, uncond_mean = cond[:, :channels], uncond[:, :channels]
    guided = uncond_mean + scale * (mean - uncond_mean)
    if rescale > 0:
        wanted, has = (x.std(dim=(1, 2, 3), correction=0, keepdim=True) for x in (mean, guided))
        guided = guided * (rescale * wanted / has.clamp(min=1e-12) + (1 - rescale))
    return torch.cat([guided, cond[:, channels:]], dim=1)


def threshold(x_0: Tensor, percentile: float | None) -> Tensor:
    """Bring x_0 (N, C, H, W) into [-1, 1]: clip it, or threshold it dynamically (Saharia et al. 2022, section 2.3).

    Dynamic thresholding clips at a percentile (in [0, 1]) of each image's |x_0|, if above 1, and divides by it.
    """
    if percentile is None:
        return x_0.clamp(-1, 1)
    largest = torch.quantile(x_0.abs().flatten(1), percentile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return x_0.clamp(-largest, largest) / largest
