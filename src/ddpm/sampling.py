"""From a checkpoint to images: the model in it, rebuilt, and the sampler a config names, run on images by index."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm import build, checkpoint
from ddpm.config import Choice, TrainConfig
from ddpm.datasets.types import Facts
from ddpm.diffusion import Denoiser
from ddpm.errors import UserError
from ddpm.meta import Meta
from ddpm.randomness import normal
from ddpm.samplers import SAMPLERS, Step, sample_levels
from ddpm.schedules import Level, NoiseSchedule


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network and all that is needed to draw from it."""

    network: nn.Module
    schedule: NoiseSchedule
    config: TrainConfig
    facts: Facts
    device: torch.device

    @property
    def conditional(self) -> bool:
        return bool(self.config.model.params["conditional"])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.facts.channels, self.facts.image_size, self.facts.image_size


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: scale 1 is off, 0 is unconditional; see `Denoiser`."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, float("inf"))


def load(path: Path, device: torch.device, ema: bool = True) -> tuple[Model, Meta]:
    """The model in a checkpoint, rebuilt from the file alone. Raises CheckpointError, UserError."""
    meta, config, network = build.outline(path)
    which = "ema" if ema else "model"
    _, tensors = checkpoint.load(path, which)
    build.load_weights(path, network, checkpoint.part(tensors, which))
    network.to(device).eval()
    if config.trainer.channels_last:
        network.to(memory_format=torch.channels_last)
    return Model(network, build.schedule(config.schedule), config, build.facts(meta.facts), device), meta


def labels(model: Model, wanted: Sequence[int] | None, index: Tensor, guidance: Guidance) -> Tensor | None:
    """The class of each image: image i has wanted[i mod K], of all classes where none are wanted.

    None for an unconditional model. Raises UserError for labels and scales that the model cannot serve.
    """
    if not model.conditional:
        if wanted is not None or guidance.scale != 1:
            raise UserError(
                "label and guidance_scale need a model trained with model.conditional=true; this one was not"
            )
        return None
    if guidance.scale != 1 and model.config.objective.label_dropout == 0:
        raise UserError(
            f"guidance_scale={guidance.scale:g}: this model was trained with objective.label_dropout=0 and knows no "
            "images without label; only 1 works"
        )
    if wanted is None:
        wanted = range(model.facts.num_classes)
    for label in wanted:
        if not 0 <= label < model.facts.num_classes:
            raise UserError(
                f"label={label}: {model.facts.name} has the labels 0 to {model.facts.num_classes - 1}"
            )
    return torch.tensor(list(wanted), device=index.device)[index % len(wanted)]


def levels(model: Model, sampler: Choice) -> list[Level]:
    """The noise levels a sampler config asks for. Raises UserError."""
    num_steps = sampler.params["num_steps"] or model.schedule.num_timesteps
    try:
        return sample_levels(model.schedule, num_steps, sampler.params["spacing"], sampler.params["rho"])
    except ValueError as error:
        raise UserError(f"sampler.{error}") from None


def denoiser(model: Model, sampler: Choice, y: Tensor | None, guidance: Guidance) -> Denoiser:
    """The model as samplers see it, for images of the classes y (N,). Raises UserError."""
    try:
        return Denoiser(
            model.network,
            model.schedule,
            model.config.objective.prediction,
            y,
            clip=sampler.params["clip"],
            dynamic_percentile=sampler.params["dynamic_percentile"],
            guidance_scale=guidance.scale,
            guidance_rescale=guidance.rescale,
            guidance_interval=guidance.interval,
            null_label=model.facts.num_classes if model.conditional else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def draw(model: Model, sampler: Choice, denoise: Denoiser, index: Tensor, seed: int) -> Iterator[Step]:
    """The steps that draw images `index` (N,) int64 of a seed. Image i depends on (seed, i) alone."""
    path = levels(model, sampler)
    x_T = normal(seed, "x_T", 0, index, model.shape) * path[0].sigma
    return run(model, sampler, denoise, path, x_T, index, seed)


def run(
    model: Model, sampler: Choice, denoise: Denoiser, path: list[Level], x: Tensor, index: Tensor, seed: int
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
    first = torch.zeros(len(names), dtype=torch.int64)  # the step, from 1; 0 is none
    number = 0
    for number, step in enumerate(steps, start=1):
        first = first.to(step.x.device)
        broken = ~torch.isfinite(step.x).flatten(1).all(1)
        first = torch.where(broken & (first == 0), number, first)
        yield step
    if first.any():
        images = names[(first > 0).cpu()].tolist()
        listed = ", ".join(map(str, images[:10])) + (
            f" and {len(images) - 10} more" if len(images) > 10 else ""
        )
        raise UserError(
            f"not finite from sampling step {int(first[first > 0].min())} of {number} on: image {listed}; try "
            "sampler.clip=clip, more steps, or another checkpoint"
        )


@torch.inference_mode()
def last(steps: Iterator[Step]) -> Tensor:
    """The images at the end of a sampler, (N, C, H, W)."""
    for step in steps:
        x = step.x
    return x
