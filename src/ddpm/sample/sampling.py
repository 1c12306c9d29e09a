"""From a checkpoint to images: the model in it, rebuilt, and the sampler a config names, run on images by index."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import build
from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint.header import Meta
from ddpm.config.schema import Choice, DrawConfig, TrainConfig, check, choose_sampler
from ddpm.data.dataset import Facts
from ddpm.diffusion.process import Denoiser
from ddpm.diffusion.samplers import SAMPLERS, Step, sample_levels
from ddpm.diffusion.schedules import Level, NoiseSchedule
from ddpm.errors import UserError
from ddpm.runtime import memory
from ddpm.runtime.randomness import normal
from ddpm.sample import sampler_file


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network and all that is needed to draw from it."""

    network: nn.Module
    schedule: NoiseSchedule
    config: TrainConfig
    facts: Facts  # of the images it was trained on
    device: torch.device
    step: int = 0  # of the training
    figures: Mapping[str, float] = field(default_factory=dict)  # at that step: val_loss, val_eps_mse, …
    folder: Path | None = None  # of the checkpoint
    precision: torch.dtype = (
        torch.float32
    )  # of the network when it draws; what it says of real images is float32

    @property
    def conditional(self) -> bool:
        return bool(self.config.model.params["conditional"])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.facts.channels, self.facts.image_size, self.facts.image_size

    def sample(
        self,
        n: int = 64,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
        label: int | Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        batch_size: int = 256,
        **settings: Any,
    ) -> Tensor:
        """New images, float32 (n, C, H, W) in [-1, 1] on the CPU: those that ddpm-sample draws for the same values.

        Image i of a seed is the same whatever n, batch_size or the others are; `index` names the images, instead
        of 0 … n-1. Image i has the class label[i mod K], of all classes where none is given. `sampler` is that of
        sampler.yaml beside the checkpoint, else of the training or, by name, another one with its own defaults;
        `settings` are its keys, such as num_steps, spacing, clip, eta. Raises UserError, with the key, for what is
        out of range or does not fit the model.
        """
        typed = {"n": n, "seed": seed, "index": index, "label": label, "guidance_scale": guidance_scale}
        typed = {key: _plain(value) for key, value in {**typed, "batch_size": batch_size}.items()}
        todo: DrawConfig = check(DrawConfig, typed)
        base = sampler if sampler is not None else sampler_file.default(self.config, self.folder)[0]
        chosen = choose_sampler(base, {key: _plain(value) for key, value in settings.items()})
        numbers = torch.tensor(todo.index) if todo.index else torch.arange(todo.n)
        guidance = Guidance(todo.guidance_scale)
        y = labels(self, todo.label, numbers, guidance)

        def halved(left: int, size: int) -> None:
            warnings.warn(f"out of memory: going on with batch_size={size}", RuntimeWarning, stacklevel=4)

        steps = generation(self, chosen, numbers, todo.seed)
        places, size = torch.arange(len(numbers)), todo.batch_size
        x, _ = draw_all(self, chosen, guidance, y, places, steps, size, lambda at, step: None, halved)
        return x.clamp_(-1, 1)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: scale 1 is off, 0 is unconditional; see `Denoiser`."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, float("inf"))


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(path: Path, device: torch.device, ema: bool = True, precision: str = "fp32") -> tuple[Model, Meta]:
    """The model in a checkpoint, rebuilt from the file alone. Raises CheckpointError, UserError."""
    meta, config, network = build.outline(path)
    which = "ema" if ema else "model"
    _, tensors = checkpoint.load(path, which)
    build.load_weights(path, network, checkpoint.part(tensors, which))
    network.to(device).eval()
    if config.trainer.channels_last:
        network.to(memory_format=torch.channels_last)
    schedule, facts = build.schedule(config.schedule), build.facts(meta.facts)
    about = (meta.step, meta.figures, path.parent, PRECISIONS[precision])
    return Model(network, schedule, config, facts, device, *about), meta


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
            precision=model.precision,
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
    since, number = torch.zeros(()), 0  # the first such step of each image, 0 for none
    for number, step in enumerate(steps, start=1):
        largest = step.x.flatten(1).abs().amax(1)  # inf and nan are carried along
        since = torch.where((since == 0) & ~largest.isfinite(), number, since)
        yield step
    if number and (broken := (since := since.cpu()) > 0).any():
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
    with torch.no_grad() if low else torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        torch.clear_autocast_cache()  # a caller's autocast may hold casts of older weights,
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # and must not get these, which have no gradients


Steps = Callable[
    [Denoiser, Tensor], Iterator[Step]
]  # those that draw the results at some places (k,) of 0 … n-1


def generation(model: Model, sampler: Choice, index: Tensor, seed: int) -> Steps:
    """From pure noise: result i is image index[i] of the seed."""
    return lambda denoise, places: draw(model, sampler, denoise, index[places].to(model.device), seed)


def draw_all(
    model: Model,
    sampler: Choice,
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


def _plain(value: Any) -> Any:
    """Sequences and numbers of other libraries as config checks know them."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
