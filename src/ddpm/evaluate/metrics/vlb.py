"""The terms of the variational bound of a diffusion chain: Ho et al. 2020, eq. 5, for any schedule."""

import math

import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Estimate
from ddpm.diffusion.process import posterior
from ddpm.diffusion.schedules import NoiseSchedule


class Terms:
    """The bound's terms for each image (b,) in nats, float64, summed over its pixels."""

    def __init__(self, schedule: NoiseSchedule, levels: int) -> None:
        self.levels = levels
        self.alpha_T, self.sigma_T = schedule.alpha[-1].item(), schedule.sigma[-1].item()
        self.variance = decoder_variance(schedule)
        snr, lambda_ = (schedule.alpha / schedule.sigma) ** 2, schedule.lambda_
        zero = torch.zeros(1, dtype=torch.float64)
        # snr_{t-1} - snr_t, no digits lost between close levels
        self.gap = torch.cat([zero, -torch.expm1(2 * lambda_.diff()) * snr[:-1]])
        self.log_range = torch.cat([zero, 2 * schedule.sigma.log().diff()])
        self.ideal = 0.5 * self.gap / (1 + snr)  # the terms of the ideal denoiser of pixels N(0, 1)

    def prior(self, x_0: Tensor) -> Tensor:
        """Compute KL(q(x_T | x_0) || N(0, sigma_T^2)), the noise that sampling starts with."""
        return 0.5 * (x_0.double() * (self.alpha_T / self.sigma_T)).square().sum(dim=(1, 2, 3))

    def middle(self, x_0: Tensor, t: Tensor, eps: Tensor, estimate: Estimate) -> Tensor:
        """Compute (b,) KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t ≥ 1. See `diffusion.vlb_terms`."""
        gap, log_range = (table.to(t.device)[t].view(-1, 1, 1, 1) for table in (self.gap, self.log_range))
        error = gap * (estimate.x_0.clamp(-1, 1) - x_0).double().square()
        if estimate.fraction is None:
            return 0.5 * error.sum(dim=(1, 2, 3))
        log_ratio = estimate.fraction.double() * log_range
        kl = 0.5 * (log_ratio + torch.expm1(-log_ratio) + torch.exp(-log_ratio) * error)
        return kl.sum(dim=(1, 2, 3))

    def decoder(self, x_0: Tensor, t: Tensor, eps: Tensor, estimate: Estimate) -> Tensor:
        """Compute (b,) -log p(x | x_0), x being the image and x_0 here the first noised one."""
        mean = estimate.x_0.clamp(-1, 1).double()
        log_p = log_probability(x_0.double(), mean, math.sqrt(self.variance), self.levels)
        return -log_p.sum(dim=(1, 2, 3))

    def proposal(self) -> Tensor:
        """Return the probability to draw each t with, (T,) float64; 0 at 0.

        Three quarters are in proportion to the terms of the ideal denoiser of pixels N(0, 1), one is uniform.
        """
        q = 0.75 * self.ideal / self.ideal.sum() + 0.25 / (len(self.ideal) - 1)
        q[0] = 0
        return q


def decoder_variance(schedule: NoiseSchedule) -> float:
    """Return the variance of the last step: that of the step before, as its own posterior has none (Ho et al. 2020)."""
    if schedule.num_timesteps == 1:
        return schedule.sigma[0].item() ** 2
    return posterior(schedule.at(1), schedule.at(0)).variance


def grey_levels(images: Tensor, levels: int) -> Tensor:
    """Convert uint8 images to their grey levels 0 … levels-1, int64. Raises ValueError where they have others."""
    exact = images.double() * ((levels - 1) / 255)
    level = exact.round()
    if ((level - exact).abs() > 0.5 * (levels - 1) / 255 + 1e-9).any():
        raise ValueError(f"levels = {levels}: the images have greys between these levels")
    return level.long()


def log_probability(x: Tensor, mean: Tensor, std: float, levels: int) -> Tensor:
    """Compute the log probability, in nats, that N(mean, std^2) lies nearest to the grey level of x; float64.

    The discretized Gaussian of Ho et al. 2020, eq. 13: levels evenly over [-1, 1], the outer ones open to infinity.
    """
    half = 1 / (levels - 1)
    level = ((x + 1) / (2 * half)).round()
    low = torch.where(level == 0, -math.inf, ((2 * level - 1) * half - 1 - mean) / std)
    high = torch.where(level == levels - 1, math.inf, ((2 * level + 1) * half - 1 - mean) / std)
    flip = low > 0  # the tail on the left, where log_ndtr keeps its digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_high = torch.special.log_ndtr(high)
    log_p: Tensor = log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
    return log_p
