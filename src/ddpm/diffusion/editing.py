"""Images with a starting point: filling in, variations, interpolation, and the way to noise and back.

Generators in the style of `ddpm.diffusion.samplers`: `levels` runs from the noisiest to the clean image,
`noise(k)` returns the batch's k-th standard normal tensor, and a `Step` comes out after each level.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import count, pairwise

import torch
from torch import Tensor

from ddpm.diffusion.process import add_noise, posterior
from ddpm.diffusion.samplers import Denoise, Noise, Step, ddim, ddim_inverse
from ddpm.diffusion.schedules import Level
from ddpm.errors import within


def repaint(
    denoiser: Denoise,
    levels: Sequence[Level],
    x: Tensor,
    known: Tensor,
    mask: Tensor,
    noise: Noise,
    *,
    jump_length: int = 3,
    jump_n_sample: int = 4,
) -> Iterator[Step]:
    """Draw the pixels by RePaint (Lugmayr et al. 2022, algorithm 1) where `mask` (N, 1, H, W) is true.

    Each step is ancestral for the unknown pixels, while the known ones are those of `known` (N, C, H, W) with noise of
    the next level (ibid. eq. 8, which prints alpha_bar_t for t-1). The two do not match yet, so every stretch of
    `jump_length` levels is walked `jump_n_sample` times, with a jump back by q(x_t | x_s) in between (ibid. section
    4.2). Here the last stretch is repeated too, from the clean image, so that the cost is jump_n_sample evaluations
    for each level. The paper jumps 10 of 250 levels; with 50, long jumps forget what was agreed on (the test on a
    known Gaussian), short ones make the draws too alike, so the default is 3. Known pixels come out bit by bit.
    """
    within("jump_length", jump_length, 1, math.inf)
    within("jump_n_sample", jump_n_sample, 1, math.inf)
    draws = count()
    for first in range(0, len(levels) - 1, jump_length):
        stretch = levels[first : first + jump_length + 1]
        for repeat in range(jump_n_sample):
            if repeat > 0:
                x = _jump_back(x, stretch[-1], stretch[0], noise(next(draws)))
            for t, s in pairwise(stretch):
                x_0 = denoiser(x, t, last=s.sigma == 0).x_0
                q = posterior(t, s)
                unknown, given = q.x_t_factor * x + q.x_0_factor * x_0, known
                if s.sigma > 0:
                    z = noise(next(draws))  # one for both: no pixel is known and unknown
                    unknown = unknown + math.sqrt(q.variance) * z
                    given = add_noise(known, z, s.alpha, s.sigma)
                x = torch.where(mask, unknown, given)
                yield Step(x, x_0, s)


def _jump_back(x: Tensor, s: Level, t: Level, eps: Tensor) -> Tensor:
    """Draw from q(x_t | x_s), all the levels from s back up to t at once (Kingma et al. 2021, appendix A.1)."""
    return t.alpha / s.alpha * x + math.sqrt(posterior(t, s).transition_variance) * eps


def sdedit(
    levels: Sequence[Level], x_0: Tensor, eps: Tensor, strength: float
) -> tuple[Tensor, Sequence[Level]]:
    """Return SDEdit's start (Meng et al. 2022, section 3) and the levels from there on, for any sampler.

    The start is x_0 with the noise of the level at the share `strength`, in [0, 1], of the steps from the end.

    strength = 0 is x_0 itself with no step to go; strength = 1 is generation, with nothing of x_0 left.
    """
    within("strength", strength, 0, 1)
    num_steps = len(levels) - 1
    steps = max(round(strength * num_steps), math.ceil(strength))
    rest = levels[num_steps - steps :]
    return add_noise(x_0, eps, rest[0].alpha if steps < num_steps else 0.0, rest[0].sigma), rest


def slerp(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    """Interpolate noise spherically (Shoemake 1985), as in Song et al. 2021 (*DDIM*), appendix D.5.

    From a (N, C, H, W) at part (N,) = 0 to b at 1, both exact. On a straight line the middle would have too
    small a norm to be noise; the straight line is taken only where the two (nearly) agree or are opposite.
    """
    share = part.double().view(-1, 1)
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    angle = torch.acos(torch.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1))[:, None]
    straight = torch.sin(angle) < 1e-6
    whole = torch.where(straight, 1.0, torch.sin(angle))
    from_a = torch.where(straight, 1 - share, torch.sin((1 - share) * angle) / whole)
    from_b = torch.where(straight, share, torch.sin(share * angle) / whole)
    return (from_a * flat_a + from_b * flat_b).to(a.dtype).view_as(a)


def reconstruct(denoiser: Denoise, levels: Sequence[Level], x_0: Tensor) -> Iterator[Step]:
    """Go from images to noise by `ddim_inverse`, and back by `ddim` with eta = 0. The denoiser must not clip."""
    x = x_0
    for step in ddim_inverse(denoiser, levels, x_0):
        yield step
        x = step.x
    yield from ddim(denoiser, levels, x, _no_noise, eta=0.0)


def _no_noise(k: int) -> Tensor:
    raise AssertionError("with eta = 0 there is none")


def encode(denoiser: Denoise, levels: Sequence[Level], x_0: Tensor) -> Tensor:
    """Return the noise (N, C, H, W) that `ddim` with eta = 0 makes the images from."""
    for step in ddim_inverse(denoiser, levels, x_0):
        x = step.x
    return x


def grey_level_errors(images: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's (mean squared error, largest difference) in grey levels of 0 … 255, (N,) each.

    x is (N, C, H, W) in [-1, 1], `images` uint8 of the same shape.
    """
    difference = ((x + 1) * 127.5 - images).flatten(1)
    return difference.square().mean(1), difference.abs().amax(1)
