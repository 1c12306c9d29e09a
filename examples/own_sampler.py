"""Draw 16 images with a sampler of one's own: re-noise the estimate of the clean image for each lower noise level.

python examples/own_sampler.py latest grid.png          on the command line: plugins=own_sampler sampler=renoise
"""

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

import ddpm
from ddpm.diffusion.samplers import Denoise, Noise, Step
from ddpm.diffusion.schedules import Level


@ddpm.register("sampler", num_steps=20)
def renoise(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise, *, fresh: float = 0.5
) -> Iterator[Step]:
    """x (N, C, H, W) is pure noise; levels go down to sigma = 0. `fresh` is the share of new noise: 0 is DDIM."""
    for k, (t, s) in enumerate(pairwise(levels)):
        estimate = denoiser(x, t, last=s.sigma == 0)  # of x_0 and of eps in x = alpha x_0 + sigma eps
        eps = math.sqrt(1 - fresh**2) * estimate.eps + fresh * noise(k)
        x = s.alpha * estimate.x_0 + s.sigma * eps
        yield Step(x, estimate.x_0, s)


if __name__ == "__main__":
    model = ddpm.load(sys.argv[1])
    ddpm.save_grid(model.sample(16, seed=0, sampler="renoise", num_steps=10, fresh=0.3), sys.argv[2])
