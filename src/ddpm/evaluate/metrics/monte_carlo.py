"""Stratified estimates over t: draw noise levels, evaluate the network at them, and estimate the mean's error."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.data.dataset import Split
from ddpm.diffusion.denoiser import Estimate
from ddpm.diffusion.process import add_noise, invert, split
from ddpm.errors import UserError
from ddpm.io.images import normalise
from ddpm.runtime import distributed, memory
from ddpm.runtime.randomness import normal, permutation, uniform
from ddpm.runtime.world import World
from ddpm.sample.model import Model

GROUP = 32  # neighbouring draws that are taken as one stratum, to estimate the variance from


class Draws(NamedTuple):
    """n evaluations, in rising order of t. The noise of draw j is that of (seed, stream, j)."""

    seed: int
    stream: str
    image: Tensor  # (n,) int64, of the split
    t: Tensor  # (n,) int64
    weight: Tensor  # (n,) float64: the mean of weight · f(t) is the sum of f over all t that can be drawn

    @property
    def n(self) -> int:
        return len(self.t)


Measure = Callable[[Tensor, Tensor, Tensor, Estimate], Tensor]  # of x_0, t, eps and estimate (b, …): (b,)


def stratified(seed: int, stream: str, n: int, images: Tensor, probability: Tensor) -> Draws:
    """Draw n of t = 0 … T-1 with `probability` (T,) float64, one in each of n slices of equal probability.

    The images (k,) int64 take turns in an order drawn at random: each serves n / k times, rounded up or down.
    """
    index = torch.arange(n)
    part = (index + uniform(seed, f"{stream}/t", 0, index).double()) / n
    below = (probability / probability.sum()).cumsum(0)
    possible = probability.nonzero()[:, 0]
    t = torch.searchsorted(below, part, right=True).clamp(possible[0], possible[-1])
    image = images[permutation(seed, f"{stream}/image", 0, len(images))][index % len(images)]
    return Draws(seed, stream, image, t, probability.sum() / probability[t])


@torch.inference_mode()
def evaluate(
    model: Model, data: Split, draws: Draws, of: Measure, *, labelled: bool, batch_size: int, world: World
) -> Tensor:
    """Compute `of` for each draw, (n,) float64 on the CPU, the same for every batch_size and number of processes.

    The network is evaluated in float32, with the images' labels or (labelled=False) without. The draws are spread over
    the processes, which all get the same; a batch is halved where memory does not suffice. Raises UserError where a
    result is not finite, or memory does not suffice for one image.
    """
    device, shape = model.device, model.shape
    tables = (model.schedule.alpha.to(device), model.schedule.sigma.to(device))

    def run(index: Tensor) -> Tensor:
        image, t = draws.image[index], draws.t[index].to(device)
        x_0 = normalise(data.images[image].to(device))
        y = data.labels[image].to(device) if labelled and data.labels is not None else None
        eps = normal(draws.seed, f"{draws.stream}/eps", 0, index.to(device), shape)
        alpha, sigma = (table[t].float().view(-1, 1, 1, 1) for table in tables)
        x_t = add_noise(x_0, eps, alpha, sigma)
        output, fraction = split(model.network(x_t, t, y).float(), shape[0])
        estimate = Estimate(*invert(model.config.objective.prediction, output, x_t, alpha, sigma), fraction)
        return of(x_0, t, eps, estimate).double()

    own = world.share(draws.n)
    with distributed.raise_on_all_ranks(world):
        parts = memory.in_batches(run, torch.arange(own.start, own.stop), batch_size, device)
    part = torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *parts])
    values = distributed.all_gather_columns(world, part[None], draws.n)[0].cpu()
    if not (finite := torch.isfinite(values)).all():
        worst = int(draws.t[int(finite.int().argmin())])
        raise UserError(
            f"the network's answers at t = {worst} are not finite, so its likelihood has no value"
        )
    return values


def mean_of(draws: Draws, values: Tensor, num_images: int) -> tuple[float, Tensor]:
    """Return the mean of `values` (n,), and what each image (num_images,) adds to its error.

    The images are a sample, and so are the draws: the squares of the additions add up to the variance of the mean.
    Draws are compared with their neighbours in t, not with all, as the strata keep them apart (collapsed strata:
    Cochran 1977, *Sampling Techniques*, section 5A.12, a little too large rather than too small); those of the
    same image are summed first, as they err together.
    """
    n = len(values)
    groups = max(1, n // GROUP)
    group = torch.arange(n) * groups // n
    size = torch.zeros(groups).double().index_add_(0, group, torch.ones(n).double())
    mean = torch.zeros(groups).double().index_add_(0, group, values) / size
    off = (values - mean[group]) * (size / (size - 1).clamp(min=1)).sqrt()[group]
    return values.mean().item(), torch.zeros(num_images).double().index_add_(0, draws.image, off / n)


def root_of_squares(additions: Tensor) -> float:
    """Return the standard error that the additions of `mean_of` make."""
    return additions.square().sum().sqrt().item()
