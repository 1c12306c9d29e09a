"""Load a trained model from a checkpoint, and make the denoiser and noise levels that samplers need."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm import build
from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate, verify
from ddpm.checkpoint.header import Meta
from ddpm.config.choices import Component
from ddpm.config.limits import nearest
from ddpm.config.schema import DrawConfig, EvalConfig, SampleConfig, TrainConfig
from ddpm.data import info
from ddpm.data.info import DatasetInfo
from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.samplers import sample_levels
from ddpm.diffusion.schedules import Level, NoiseSchedule
from ddpm.errors import UserError
from ddpm.runtime import device as runtime_device
from ddpm.runtime.distributed import broadcast_object, raise_on_all_ranks
from ddpm.runtime.world import World


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network with its schedule, config and data facts."""

    network: nn.Module
    schedule: NoiseSchedule
    config: TrainConfig
    facts: DatasetInfo  # of the images it was trained on
    device: torch.device
    step: int = 0  # of the training
    figures: Mapping[str, float] = field(default_factory=dict)  # at that step: val_loss, val_eps_mse, …
    folder: Path | None = None  # of the checkpoint
    precision: torch.dtype = torch.float32  # of the network when it samples; it is evaluated in float32

    @property
    def conditional(self) -> bool:
        return bool(self.config.model.params["conditional"])

    @property
    def precision_name(self) -> str:
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.precision)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.facts.channels, self.facts.image_size, self.facts.image_size


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: scale 1 is off, 0 is unconditional; see `Denoiser`."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, math.inf)


def guidance(config: TrainConfig | SampleConfig | EvalConfig | DrawConfig) -> Guidance:
    """Return the guidance of a config. Without an interval it is everywhere, where sigma / alpha is infinite too."""
    low, high = config.guidance_interval or (0.0, math.inf)
    return Guidance(config.guidance_scale, config.guidance_rescale, (low, high))


SHOWN = 40  # names of classes in a message
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_newest(
    ckpt: str, world: World, device: torch.device, ema: bool = True, precision: str = "fp32"
) -> tuple[Path, Model, Meta, list[str]]:
    """Load the newest whole checkpoint that `ckpt` means, in all processes, which may be one of a run that trains.

    Returns its path, the model, the metadata, and a warning for each that is broken. Raises UserError.
    """

    def read(file: Path) -> tuple[Model, Meta]:
        return load(file, device, ema, precision)

    path, notes, loaded = Path(), list[str](), None
    with raise_on_all_ranks(world):
        if world.first:
            path, loaded, notes = locate.read_wanted(ckpt, read)
    path = broadcast_object(world, path)
    with raise_on_all_ranks(world):
        loaded = loaded or read(path)
    assert loaded is not None
    return path, *loaded, notes


def load(path: Path, device: torch.device, ema: bool = True, precision: str = "fp32") -> tuple[Model, Meta]:
    """Rebuild the model from a checkpoint alone. Returns it and the metadata. Raises UserError."""
    which, fitting = "ema" if ema else "model", list[tuple[TrainConfig, nn.Module]]()
    meta, tensors = checkpoint.load(
        path, which, check=lambda meta, table: fitting.append(verify.fitting(path, meta, table))
    )
    config, network = fitting[0]
    verify.load_weights(path, network, checkpoint.part(tensors, which))
    network.to(device).eval()
    if config.trainer.channels_last:
        network.to(memory_format=torch.channels_last)
    schedule, facts = build.schedule(config.schedule), info.facts(meta.facts)
    about = (meta.step, meta.figures, path.parent, runtime_device.precision(precision, device))
    return Model(network, schedule, config, facts, device, *about), meta


def labels(
    model: Model, wanted: Sequence[int | str] | str | None, index: Tensor, guidance: Guidance
) -> Tensor | None:
    """Return the class of each image: wanted[i mod K] for image i; `wanted` defaults to all classes.

    None for an unconditional model. Raises UserError for labels and scales that do not fit the model.
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
    every = range(model.facts.num_classes)
    classes = [class_number(model.facts, label) for label in (every if wanted in (None, "all") else wanted)]
    return torch.tensor(classes, device=index.device)[index % len(classes)]


def class_number(facts: DatasetInfo, label: int | str) -> int:
    """Return the number of a class, given by number or, where it is none, by name. Raises UserError."""
    if isinstance(label, int) and 0 <= label < facts.num_classes:
        return label
    if str(label) in facts.class_names:
        return facts.class_names.index(str(label))
    last, names = facts.num_classes - 1, facts.class_names
    named = ""
    if names != tuple(map(str, range(len(names)))):
        named = f" or, by name, {', '.join(names[:SHOWN])}{', …' * (len(names) > SHOWN)}"
        named += nearest(str(label), names)
    raise UserError(f"label={label}: {facts.name} has the labels 0 to {last}{named}")


def ambiguous(facts: DatasetInfo, wanted: Sequence[int | str] | str | None) -> list[str]:
    """Return a line for each number in `wanted` that is the name of another class, too."""
    names = facts.class_names
    both = [label for label in wanted or [] if isinstance(label, int) and label < len(names)]
    return [
        f"label={label} is class number {label}, named {names[label]}; the class named {label} is label="
        f"{names.index(str(label))}"
        for label in dict.fromkeys(both)
        if str(label) in names and names[label] != str(label)
    ]


def levels(model: Model, sampler: Component) -> list[Level]:
    """Return the noise levels of a sampler config, from high to low. Raises UserError."""
    num_steps = sampler.params["num_steps"] or model.schedule.num_timesteps
    try:
        return sample_levels(model.schedule, num_steps, sampler.params["spacing"], sampler.params["rho"])
    except ValueError as error:
        raise UserError(f"sampler.{error}") from None


def denoiser(model: Model, sampler: Component, y: Tensor | None, guidance: Guidance) -> Denoiser:
    """Return the denoiser that samplers call, for images of the classes y (N,). Raises UserError."""
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
