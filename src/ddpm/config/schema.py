"""The schema: what a config may say. Plain data in, checked and typed data out; no Hydra, no torch, nothing run.

Closed parts (trainer, optimizer, objective) are dataclasses. For groups with a choice (dataset, model, schedule,
sampler) the YAML file of the choice is its schema: its keys, and values of the same type. Both command lines and
configs stored in checkpoints pass through here.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddpm.config.choices import Component, _check_keys, check_choice
from ddpm.config.limits import like
from ddpm.errors import UserError

# Where and how a run is made, which says nothing about what it is.
NOT_PART_OF_THE_EXPERIMENT = (
    *("data_root", "run_dir", "overwrite", "device", "gpus", "jobs_per_gpu", "minimize", "logger"),
    "trainer.resume",
)


@dataclass(frozen=True)
class Objective:
    prediction: str
    weight: str
    min_snr_gamma: float
    p2_gamma: float
    sigmoid_bias: float
    timesteps: str
    logit_normal_mean: float
    logit_normal_std: float
    label_dropout: float
    learned_variance: bool
    vlb_weight: float


@dataclass(frozen=True)
class Optimizer:
    name: str
    lr: float
    beta_1: float
    beta_2: float
    weight_decay: float
    warmup_steps: int
    decay: str
    halvings: int


@dataclass(frozen=True)
class Trainer:
    max_steps: int
    max_epochs: int | None
    batch_size: int
    accumulate: int
    precision: str
    channels_last: bool
    compile: str
    cuda_graph: str
    ema_decay: float
    grad_clip: float
    log_every: int
    validate_every: int
    sample_every: int
    checkpoint_every: int
    keep: int
    resume: str | None
    init_from: str | None
    deterministic: bool


@dataclass(frozen=True)
class TrainConfig:
    seed: int
    device: str
    data_root: str
    run_dir: str | None
    overwrite: bool
    gpus: str | None
    jobs_per_gpu: int
    minimize: str
    logger: str
    dataset: Component
    model: Component
    schedule: Component
    objective: Objective
    optimizer: Optimizer
    sampler: Component
    trainer: Trainer


class Several(list[int]):
    """One whole number, or a list of them."""


@dataclass(frozen=True)
class SampleConfig:
    ckpt: str
    n: int | None
    seed: int
    index: Several | None
    batch_size: int
    device: str
    precision: str
    ema: bool
    label: Several | str | None  # "all": every class
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: list[float] | None
    task: str
    input: str | None
    data_root: str
    mask: str | None
    jump_length: int
    jump_n_sample: int
    strength: float
    seeds: list[int] | None
    sampler: Component
    save: list[str]
    out: str | None
    nrow: int | None


@dataclass(frozen=True)
class DrawConfig:
    """What `Model.sample` takes beside a sampler."""

    n: int
    seed: int
    index: Several | None
    label: Several | None
    guidance_scale: float
    batch_size: int


@dataclass(frozen=True)
class ExportConfig:
    ckpt: str
    format: str
    out: str
    ema: bool


@dataclass(frozen=True)
class InfoConfig:
    ckpt: str


def check(schema: type, raw: Mapping[str, Any], path: str = "") -> Any:
    """`raw` as an instance of the dataclass `schema`.

    Raises UserError with one line: the full key, the value, and what is allowed.
    """
    fields = typing.get_type_hints(schema)
    _check_keys(raw, fields, path)
    return schema(**{key: _value(hint, raw[key], path + key) for key, hint in fields.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """A checked config as plain data, the inverse of `check`."""

    def plain(part: Any) -> Any:
        if isinstance(part, Component):
            return part.to_dict()
        return vars(part) if dataclasses.is_dataclass(part) else part

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _value(hint: Any, value: Any, path: str) -> Any:
    if hint is Component:
        return check_choice(path, value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}: must be a set of keys")
        return check(typing.cast(type, hint), value, path + ".")
    if isinstance(hint, types.UnionType):  # … | None, with a text for what numbers do not say
        kinds = typing.get_args(hint)
        if value is None:
            return None
        return str(value) if str in kinds[1:] and isinstance(value, str) else _value(kinds[0], value, path)
    if hint is Several:
        if value == []:
            raise UserError(f"{path}=[]: must be a number, or a list of at least one")
        return Several(like([0], value if isinstance(value, list) else [value], path))
    if typing.get_origin(hint) is list:
        return like([typing.get_args(hint)[0]()], value, path)
    return like(hint(), value, path)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Flat, and the name of a choice under its group, as it is typed."""
    flat: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        for inner, item in value.items() if isinstance(value, dict) else [("", value)]:
            flat[key if inner in ("", "name") else f"{key}.{inner}"] = item
    return {key: value for key, value in flat.items() if key not in NOT_PART_OF_THE_EXPERIMENT}


@dataclass(frozen=True)
class EvalConfig:
    ckpt: str | None
    samples: str | None
    compare: list[str] | None
    dataset: Component | None  # None: that of the checkpoint
    n: int
    seed: int
    batch_size: int
    device: str
    precision: str
    ema: bool
    guidance_scale: float
    sampler: Component
    data_root: str
    measure: list[str]
    out: str | None


@dataclass(frozen=True)
class ReportConfig:
    folder: list[str]
    figure: str
    contact: bool
    n: int
    seed: int
    sampler: Component | None  # None: each run's own
    device: str
    out: str | None
