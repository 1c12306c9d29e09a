"""Run the sampler that a config names on a trained model, for images by index."""

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
from ddpm.sample.cuda_graph import CapturedCalls
from ddpm.sample.model import Guidance, Model, denoiser, levels

COMMON = ("num_steps", "spacing", "rho", "clip", "dynamic_percentile")  # keys of every sampler

# (denoiser, places (k,) of 0 … n-1) -> the steps that draw the results at these places
Steps = Callable[[Denoiser, Tensor], Iterator[Step]]


def draw(model: Model, sampler: Component, denoise: Denoiser, index: Tensor, seed: int) -> Iterator[Step]:
    """Draw images `index` (N,) int64 of a seed, step by step. Image i depends on (seed, i) alone."""
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
    """Run the sampler along the levels `path`, from x at the first of them. Raises UserError."""
    own = {key: value for key, value in sampler.params.items() if key not in COMMON}
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
    """Yield the same steps; then raise UserError with the images that were not finite, and since when.

    `names` (N,) are the images' numbers. The check stays on the device and is read once, so that no step waits for it.
    """
    since, number = torch.zeros(len(names)), 0  # the first such step of each image, 0 for none
    for number, step in enumerate(steps, start=1):
        largest = step.x.flatten(1).abs().amax(1)  # inf and nan are carried along
        since = torch.zeros_like(largest) if number == 1 else since
        since = torch.where((since == 0) & ~largest.isfinite(), number, since)
        yield step
    if (broken := (since := since.cpu()) > 0).any():
        images = names[broken].tolist()
        listed = ", ".join(map(str, images[:10]))
        if len(images) > 10:
            listed += f" and {len(images) - 10} more"
        raise UserError(
            f"not finite from sampling step {int(since[broken].min())} of {number} on: image "
            f"{listed}; try sampler.clip=clip, more steps, or another checkpoint"
        )


@torch.inference_mode()
def last(steps: Iterator[Step]) -> Tensor:
    """Return the images (N, C, H, W) of a sampler's last step."""
    for step in steps:
        x = step.x
    return x


@contextmanager
def drawing(model: Model) -> Iterator[None]:
    """Disable gradients, and cast the weights to the model's precision once rather than at every step.

    Autocast caches casts until the outermost autocast context ends, even a disabled one. It caches none in inference
    mode, which is used where nothing is cast because it is faster.
    """
    low = model.precision != torch.float32
    with (
        torch.no_grad() if low else torch.inference_mode(),
        torch.autocast(model.device.type, enabled=False),
        device.ieee_float32(),
    ):
        torch.clear_autocast_cache()  # a caller's autocast may hold casts of older weights
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # these casts have no gradients


def generation(model: Model, sampler: Component, index: Tensor, seed: int) -> Steps:
    """Draw from pure noise: result i is image index[i] of the seed."""
    return lambda denoise, places: draw(
        model, sampler, denoise, index[places].to(model.device, non_blocking=True), seed
    )


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
    """Draw the results at some `places` (k,), in batches, and count the evaluations for each of them.

    Returns images (k, C, H, W) on the CPU and the count. y (n,) are the classes of all places 0 … n-1; `watch` gets
    each step and its places; for `halved` see `memory.in_batches`. Raises UserError.
    """

    def run_batch(now: Tensor) -> tuple[Tensor, int]:
        with drawing(model):
            labels = None if y is None else y[now].to(model.device, non_blocking=True)
            denoise = denoiser(model, sampler, labels, guidance)
            if model.device.type == "cuda":
                denoise.network = CapturedCalls(model.network)
            for step in finite(steps(denoise, now), now):
                watch(now, step)
            return step.x.cpu(), denoise.evaluations

    batches = memory.in_batches(run_batch, places, batch_size, model.device, halved)
    none = torch.empty(0, *model.shape, dtype=torch.float32)
    images = torch.cat([none, *(x for x, _ in batches)])  # not an inference-mode tensor
    return images, batches[-1][1] if batches else 0
