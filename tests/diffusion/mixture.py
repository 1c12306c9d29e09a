"""A problem whose answer is known: data from two narrow bumps, and the best possible denoiser for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Estimate
from ddpm.diffusion.schedules import Level, NoiseSchedule

PART = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEAN = torch.tensor([-0.6, 0.4], dtype=torch.float64)
STD = torch.tensor([0.1, 0.2], dtype=torch.float64)


@dataclass
class IdealDenoiser:
    """E[x_0 | x_t] for pixels drawn from sum_i part_i N(mean_i, std_i^2), each on its own.

    By Bayes' rule x_t says how likely each bump is, and within a bump the estimate is linear.
    """

    schedule: NoiseSchedule
    part: Tensor = PART
    mean: Tensor = MEAN
    std: Tensor = STD
    calls: int = 0

    def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate:
        self.calls += 1
        part, mean, std = (table.to(x_t) for table in (self.part, self.mean, self.std))
        variance = (level.alpha * std) ** 2 + level.sigma**2
        distance = x_t[..., None] - level.alpha * mean
        likely = torch.softmax(part.log() - 0.5 * variance.log() - 0.5 * distance**2 / variance, dim=-1)
        x_0 = (likely * (mean + level.alpha * std**2 / variance * distance)).sum(-1)
        return Estimate(x_0, (x_t - level.alpha * x_0) / level.sigma)


def draw(n: int, seed: int, part: Tensor = PART, mean: Tensor = MEAN, std: Tensor = STD) -> Tensor:
    """n one-pixel images (n, 1, 1, 1) float64, in the bumps' proportions as closely as n allows."""
    generator = torch.Generator().manual_seed(seed)
    which = ((torch.arange(n) + 0.5) / n > part[0]).long()
    x_0 = mean[which] + std[which] * torch.randn(n, generator=generator, dtype=torch.float64)
    return x_0.view(n, 1, 1, 1)


def x_T(x_0: Tensor, level: Level, seed: int) -> Tensor:
    """The exact q(x_T), which is not quite N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return level.alpha * x_0 + level.sigma * torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
