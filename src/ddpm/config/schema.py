"""The schema: what a config may say. Plain data in, checked and typed data out; no Hydra, no torch, nothing run.

Closed parts (trainer, optimizer, objective) are dataclasses. For groups with a choice (dataset, model, schedule,
sampler) the YAML file of the choice is its schema: its keys, and values of the same type. Both command lines and
configs stored in checkpoints pass through here.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ddpm.config import yaml_files
from ddpm.config.values import like, nearest
from ddpm.errors import UserError

_PACKAGED = Path(__file__).parents[1] / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "configs"


# Where and how a run is made, which says nothing about what it is.
CIRCUMSTANCES = (
    *("data_root", "run_dir", "overwrite", "device", "gpus", "jobs_per_gpu", "minimize", "logger"),
    "trainer.resume",
)


@dataclass(frozen=True)
class Choice:
    """A named function or class and its parameters, as in `configs/<group>/<file>.yaml`."""

    name: str
    params: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.params}


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
    dataset: Choice
    model: Choice
    schedule: Choice
    objective: Objective
    optimizer: Optimizer
    sampler: Choice
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
    sampler: Choice
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


def trained_sampler(config: TrainConfig) -> Choice:
    """The sampler a model was trained with, in no more steps than the model has timesteps."""
    params = dict(config.sampler.params)
    if params["num_steps"] is not None:  # written for many timesteps; this model may have few
        params["num_steps"] = min(params["num_steps"], config.schedule.params["num_timesteps"])
    return Choice(config.sampler.name, params)


def choose_sampler(base: Choice | str, settings: Mapping[str, Any]) -> Choice:
    """A sampler, or one by its file's name, with these settings. Raises UserError."""
    if isinstance(base, Choice):
        return check_choice("sampler", {**base.to_dict(), **settings})
    if base not in (known := choices("sampler")):
        hint = plugin_hint("sampler") + nearest(str(base), known)
        raise UserError(f"sampler={base}: must be one of {', '.join(known)}{hint}")
    return check_choice("sampler", {**known[base], **settings})


def to_dict(config: Any) -> dict[str, Any]:
    """A checked config as plain data, the inverse of `check`."""

    def plain(part: Any) -> Any:
        if isinstance(part, Choice):
            return part.to_dict()
        return vars(part) if dataclasses.is_dataclass(part) else part

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


ADDED: dict[str, dict[str, dict[str, Any]]] = {}  # choices without a file, by group and name


def add_choice(group: str, content: dict[str, Any]) -> None:
    """What `ddpm.register` adds. Raises UserError where a key has another type or limits in its group."""
    for key, value in content.items():
        others = [c[key] for c in choices(group).values() if key in c and c["name"] != content["name"]]
        _like_any([*others, value], value, f"{group}.{key}")
    ADDED.setdefault(group, {})[content["name"]] = content


def choices(group: str) -> dict[str, dict[str, Any]]:
    """All choices of a group, `{file name without .yaml: its content}`."""
    return _files(group) | ADDED.get(group, {})


@cache
def _files(group: str) -> dict[str, dict[str, Any]]:
    files = sorted((CONFIG_DIR / group).glob("*.yaml"))
    return {file.stem: yaml_files.read(file) for file in files}


def plugin_hint(group: str) -> str:
    """For an unknown name in a group that `ddpm.register` adds to."""
    return "; if it comes from a plug-in, add plugins=[…]" * (group in ("dataset", "schedule", "sampler"))


def _check_keys(raw: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    known = list(known)
    for key in raw:
        if key not in known:
            raise UserError(
                f"unknown key '{path}{key}'{nearest(str(key), known)} (known: {', '.join(known)})"
            )
    for key in known:
        if key not in raw:
            raise UserError(f"'{path}{key}' is missing")


def _value(hint: Any, value: Any, path: str) -> Any:
    if hint is Choice:
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


def check_choice(path: str, raw: Any) -> Choice:
    """What `path`, a group, is to be: a name and all of its keys. Raises UserError."""
    names = {content["name"] for content in choices(path).values()}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        raise UserError(
            f"{path}={raw!r}: must be a set of keys with a name (one of {', '.join(sorted(names))})"
        )
    if raw["name"] not in names:
        hint = plugin_hint(path) + nearest(raw["name"], names)
        raise UserError(f"{path}.name='{raw['name']}': must be one of {', '.join(sorted(names))}{hint}")
    template: dict[str, list[Any]] = {}
    for content in choices(path).values():
        if content["name"] == raw["name"]:
            template |= {key: [] for key in content}
    for content in choices(path).values():  # a key means the same in every file of its group
        for key in template.keys() & content.keys():
            template[key].append(content[key])
    _check_keys(raw, template, path + ".")
    params = {key: _like_any(template[key], raw[key], f"{path}.{key}") for key in template if key != "name"}
    return Choice(raw["name"], params)


def _like_any(examples: list[Any], value: Any, path: str) -> Any:
    """Like one of the examples: null where one of them is, a list where that is another way to say it."""
    if value is None and None in examples:
        return None
    if path == "sampler.spacing" and isinstance(value, list):
        return like([0.0], value, path)
    return like(next((example for example in examples if example is not None), None), value, path)
