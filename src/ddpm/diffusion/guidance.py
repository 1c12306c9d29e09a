"""What is done to a network's answers while sampling: classifier-free guidance and thresholds on x_0."""

import torch
from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, channels: int, scale: float, rescale: float) -> Tensor:
    """uncond + scale (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w), of two network outputs.

    Then taken by the part `rescale` to the standard deviation of cond (Lin et al. 2023, section 3.4).
    Channels beyond the first `channels` say the variance and stay those of cond.
    """
    mean, uncond_mean = cond[:, :channels], uncond[:, :channels]
    guided = uncond_mean + scale * (mean - uncond_mean)
    if rescale > 0:
        wanted, has = (x.std(dim=(1, 2, 3), correction=0, keepdim=True) for x in (mean, guided))
        guided = guided * (rescale * wanted / has.clamp(min=1e-12) + (1 - rescale))
    return torch.cat([guided, cond[:, channels:]], dim=1)


def threshold(x_0: Tensor, percentile: float | None) -> Tensor:
    """x_0 within [-1, 1]: clipped, or with a percentile clipped at that percentile of the image's |x_0|, if
    above 1, and divided by it (Saharia et al. 2022, section 2.3: dynamic thresholding).
    """
    if percentile is None:
        return x_0.clamp(-1, 1)
    largest = torch.quantile(x_0.abs().flatten(1), percentile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return x_0.clamp(-largest, largest) / largest
