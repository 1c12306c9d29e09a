"""From a checkpoint to images: the model in it, rebuilt, and the sampler a config names, run on images by index."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ddpm.config.choices import Component
from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.samplers import SAMPLERS, Step
from ddpm.diffusion.schedules import Level
from ddpm.errors import UserError
from ddpm.runtime import device, memory
from ddpm.runtime.randomness import normal
from ddpm.sample.model import Guidance, Model, denoiser, levels


def draw(model: Model, sampler: Component, denoise: Denoiser, index: Tensor, seed: int) -> Iterator[Step]:
    """The steps that draw images `index` (N,) int64 of a seed. Image i depends on (seed, i) alone."""
    path = levels(model, sampler)
    x_T = normal(seed, "x_T", 0, index, model.shape) * path[0].sigma
    return run(model, sampler, denoise, path, x_T, index, seed)


def run(
    model: Model,
    sampler: Component,
    denoise: Denoiser,
    path: list[Level],
    x: Tensor,
    index: Tensor,
    seed: int,
) -> Iterator[Step]:
    """The sampler along the levels `path`, from x at the first of them. Raises UserError."""
    common = ("num_steps", "spacing", "rho", "clip", "dynamic_percentile")
    own = {key: value for key, value in sampler.params.items() if key not in common}
    if own.get("variance") == "learned" and not model.config.objective.learned_variance:
        raise UserError(
            "sampler.variance=learned: this model was trained with objective.learned_variance=false"
        )
    try:
        yield from SAMPLERS[sampler.name](
            denoise, path, x, lambda k: normal(seed, "sampler", k, index, model.shape), **own
        )
    except ValueError as error:
        raise UserError(f"sampler.{error}") from None


def finite(steps: Iterator[Step], names: Tensor) -> Iterator[Step]:
    """The same steps; after the last, raises UserError if an image stopped being finite, and says which, and when.

    `names` (N,) are the images' numbers. Looked at on the device, and read once, so that no step waits.
    """
    since, number = torch.zeros(len(names)), 0  # the first such step of each image, 0 for none
    for number, step in enumerate(steps, start=1):
        largest = step.x.flatten(1).abs().amax(1)  # inf and nan are carried along
        since = torch.zeros_like(largest) if number == 1 else since
        since = torch.where((since == 0) & ~largest.isfinite(), number, since)
        yield step
    if (broken := (since := since.cpu()) > 0).any():
        images = names[broken].tolist()
        listed = ", ".join(map(str, images[:10])) + (
            f" and {len(images) - 10} more" if len(images) > 10 else ""
        )
        raise UserError(
            f"not finite from sampling step {int(since[broken].min())} of {number} on: image "
            f"{listed}; try sampler.clip=clip, more steps, or another checkpoint"
        )


@torch.inference_mode()
def last(steps: Iterator[Step]) -> Tensor:
    """The images at the end of a sampler, (N, C, H, W)."""
    for step in steps:
        x = step.x
    return x


@contextmanager
def drawing(model: Model) -> Iterator[None]:
    """Without gradients, and with the weights cast to the model's precision once, not at every step.

    Autocast keeps what it casts until the outermost of its contexts ends, enabled or not; in inference mode, otherwise
    the faster one, it keeps nothing.
    """
    low = model.precision != torch.float32
    with (
        torch.no_grad() if low else torch.inference_mode(),
        torch.autocast(model.device.type, enabled=False),
        device.ieee_float32(),
    ):
        torch.clear_autocast_cache()  # a caller's autocast may hold casts of older weights,
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # and must not get these, which have no gradients


Steps = Callable[
    [Denoiser, Tensor], Iterator[Step]
]  # those that draw the results at some places (k,) of 0 … n-1


def generation(model: Model, sampler: Component, index: Tensor, seed: int) -> Steps:
    """From pure noise: result i is image index[i] of the seed."""
    return lambda denoise, places: draw(model, sampler, denoise, index[places].to(model.device), seed)


def draw_all(
    model: Model,
    sampler: Component,
    guidance: Guidance,
    y: Tensor | None,
    places: Tensor,
    steps: Steps,
    batch_size: int,
    watch: Callable[[Tensor, Step], object],
    halved: Callable[[int, int], object],
) -> tuple[Tensor, int]:
    """The results at some `places` (k,), (k, C, H, W) on the CPU, and the network's evaluations for each of them.

    y (n,) are the classes of all places 0 … n-1.
    In chunks of batch_size, or of half of it where memory does not suffice, and so on: `halved` gets how many
    results are left, and the new size. `watch` sees each step, with the places. Raises UserError.
    """
    images = [torch.empty(0, *model.shape)]
    evaluations, size, n = 0, batch_size, len(places)
    while (done := sum(len(x) for x in images)) < n:
        now = places[done : done + size]
        try:
            with drawing(model):
                labels = None if y is None else y[now].to(model.device)
                denoise = denoiser(model, sampler, labels, guidance)
                for step in finite(steps(denoise, now), now):
                    watch(now, step)
                images.append(step.x.cpu())
        except (RuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
        else:
            evaluations = denoise.evaluations
            continue
        if size == 1:  # what filled the memory is free only now that the error itself is gone
            raise UserError(f"out of memory on {model.device}, even for 1 image at a time")
        size = max(1, len(now) // 2)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        halved(n - done, size)
    return torch.cat(images), evaluations  # a tensor like any other, as it is made outside inference mode
