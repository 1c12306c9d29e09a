"""The schema: what a config may say. Plain data in, checked and typed data out; no Hydra, no torch, nothing run.

Closed parts (trainer, optimizer, objective) are dataclasses. For groups with a choice (dataset, model, schedule,
sampler) the YAML file of the choice is its schema: its keys, and values of the same type. Both command lines and
configs stored in checkpoints pass through here.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ddpm.errors import UserError

_PACKAGED = Path(__file__).parent / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"


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
    lr: float
    beta_1: float
    beta_2: float
    weight_decay: float
    warmup_steps: int
    decay: str


@dataclass(frozen=True)
class Trainer:
    max_steps: int
    max_epochs: int | None
    batch_size: int
    accumulate: int
    precision: str
    channels_last: bool
    compile: bool
    ema_decay: float
    grad_clip: float
    log_every: int
    validate_every: int
    sample_every: int
    checkpoint_every: int
    keep: int
    resume: str | None
    deterministic: bool


@dataclass(frozen=True)
class TrainConfig:
    seed: int
    device: str
    data_root: str
    run_dir: str | None
    overwrite: bool
    dataset: Choice
    model: Choice
    schedule: Choice
    objective: Objective
    optimizer: Optimizer
    sampler: Choice
    trainer: Trainer


@dataclass(frozen=True)
class SampleConfig:
    ckpt: str
    n: int
    seed: int
    batch_size: int
    device: str
    ema: bool
    sampler: Choice
    save: list[str]
    out: str | None
    nrow: int | None


@dataclass(frozen=True)
class InfoConfig:
    ckpt: str


class Between(typing.NamedTuple):
    """Allowed numbers: low … high, without low itself where `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"a finite number {'above' if self.above else 'of at least'} {self.low}"
        return f"a number {'above' if self.above else 'from'} {self.low} {'up ' if self.above else ''}to {self.high}"


Allowed = Between | tuple[str, ...]
_ONE_TO_MANY = Between(1, 10**9)
_OFTEN = Between(0, 10**9)
_PART = Between(0, 1)

# Every number and every word that is checked, by its full key. A list is checked item by item.
LIMITS: dict[str, Allowed] = {
    "seed": Between(0, 2**63 - 1),
    "dataset.image_size": Between(4, 256),
    "model.channels": Between(1, 2048),
    "model.num_blocks": Between(1, 16),
    "model.attention": Between(0, 15),
    "model.head_dim": Between(1, 512),
    "model.norm_groups": Between(1, 512),
    "model.dropout": Between(0, 0.95),
    "model.hidden": Between(1, 65536),
    "model.num_layers": Between(1, 64),
    "schedule.num_timesteps": Between(1, 100_000),
    "schedule.beta_start": Between(0, 1, above=True),
    "schedule.beta_end": Between(0, 1, above=True),
    "schedule.s": Between(0, 1),
    "schedule.start": Between(-100, 100),
    "schedule.end": Between(-100, 100),
    "schedule.tau": Between(0, 100, above=True),
    "objective.prediction": ("eps", "x_0", "v", "flow"),
    "objective.weight": ("uniform", "plain", "min_snr", "p2", "sigmoid"),
    "objective.timesteps": ("uniform", "stratified", "logit_normal", "loss_aware"),
    "objective.label_dropout": _PART,
    "objective.min_snr_gamma": Between(0, above=True),
    "objective.p2_gamma": Between(0),
    "objective.sigmoid_bias": Between(-100, 100),
    "objective.vlb_weight": Between(0),
    "objective.logit_normal_mean": Between(-100, 100),
    "objective.logit_normal_std": Between(0, 100, above=True),
    "optimizer.lr": Between(0, above=True),
    "optimizer.beta_1": Between(0, 0.99999),
    "optimizer.beta_2": Between(0, 0.9999999),
    "optimizer.weight_decay": Between(0),
    "optimizer.warmup_steps": _OFTEN,
    "optimizer.decay": ("constant", "cosine"),
    "sampler.num_steps": Between(1, 100_000),
    "sampler.eta": _PART,
    "sampler.rho": Between(0, 100, above=True),
    "sampler.dynamic_percentile": Between(0, 1, above=True),
    "sampler.variance": ("small", "large", "learned"),
    "sampler.order": Between(2, 3),
    "sampler.churn": Between(0),
    "sampler.churn_min": Between(0),
    "sampler.churn_max": Between(0),
    "sampler.churn_noise": Between(0, above=True),
    "sampler.clip": ("none", "clip", "dynamic"),
    "trainer.max_steps": _ONE_TO_MANY,
    "trainer.max_epochs": _ONE_TO_MANY,
    "trainer.batch_size": Between(1, 2**20),
    "trainer.accumulate": Between(1, 2**16),
    "trainer.precision": ("auto", "fp32", "bf16", "fp16"),
    "trainer.ema_decay": Between(0, 0.9999999),
    "trainer.grad_clip": Between(0, above=True),
    "trainer.log_every": _ONE_TO_MANY,
    "trainer.validate_every": _OFTEN,
    "trainer.sample_every": _OFTEN,
    "trainer.checkpoint_every": _OFTEN,
    "trainer.keep": Between(1, 10**6),
    "n": Between(1, 10**8),
    "batch_size": Between(1, 2**20),
    "nrow": Between(1, 10**6),
    "save": ("grid", "images", "npz", "trajectory"),
}
MAX_ITEMS = 4096  # in a list


def check(schema: type, raw: Mapping[str, Any], path: str = "") -> Any:
    """`raw` as an instance of the dataclass `schema`.

    Raises UserError with one line: the full key, the value, and what is allowed.
    """
    fields = {field.name: hint for field, hint in zip(dataclasses.fields(schema), _hints(schema), strict=True)}
    _check_keys(raw, fields, path)
    return schema(**{key: _value(hint, raw[key], path + key) for key, hint in fields.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """A checked config as plain data, the inverse of `check`."""
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        key: part.to_dict() if isinstance(part, Choice) else dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part
        for key, part in parts.items()
    }


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint "; did you mean …?" or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


@cache
def choices(group: str) -> dict[str, dict[str, Any]]:
    """The files of a group, `{file name without .yaml: its content}`."""
    files = sorted((CONFIG_DIR / group).glob("*.yaml"))
    return {file.stem: typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file))) for file in files}


def _hints(schema: type) -> list[Any]:
    hints = typing.get_type_hints(schema)
    return [hints[field.name] for field in dataclasses.fields(schema)]


def _check_keys(raw: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    known = list(known)
    for key in raw:
        if key not in known:
            raise UserError(f"unknown key '{path}{key}'{nearest(str(key), known)} (known: {', '.join(known)})")
    for key in known:
        if key not in raw:
            raise UserError(f"'{path}{key}' is missing")


def _value(hint: Any, value: Any, path: str) -> Any:
    if hint is Choice:
        return _choice(value, path)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}: must be a set of keys")
        return check(typing.cast(type, hint), value, path + ".")
    if isinstance(hint, types.UnionType):  # T | None
        return None if value is None else _value(typing.get_args(hint)[0], value, path)
    if typing.get_origin(hint) is list:
        return _like([typing.get_args(hint)[0]()], value, path)
    return _like(hint(), value, path)


def _choice(raw: Any, path: str) -> Choice:
    names = {content["name"] for content in choices(path).values()}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        raise UserError(f"{path}={raw!r}: must be a set of keys with a name (one of {', '.join(sorted(names))})")
    if raw["name"] not in names:
        hint = nearest(raw["name"], names)
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
        return _like([0.0], value, path)
    return _like(next((example for example in examples if example is not None), None), value, path)


def _like(example: Any, value: Any, path: str) -> Any:
    """`value`, if it is of the example's type and within the limits of its key."""
    match example:
        case None:
            result, kind = value, "plain data"
            fits = value is None or isinstance(value, str | int | float | bool | list)
        case bool():
            result, kind, fits = value, "true or false", isinstance(value, bool)
        case int():
            result, kind, fits = value, "a whole number", isinstance(value, int) and not isinstance(value, bool)
        case float():
            fits, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
            result = float(value) if fits and abs(value) < 1e300 else value
        case str():
            result, kind, fits = value, "a text", isinstance(value, str) and len(value) <= 4096 and "\0" not in value
        case list():
            if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
                raise UserError(f"{path}={value!r}: must be a list such as [1, 2]")
            item = example[0] if example else 0
            return [_like(item, each, path) for each in value]
        case _:
            raise AssertionError(f"{path}: a config holds plain values and lists of them")
    allowed = LIMITS.get(path)
    if not fits:
        raise UserError(f"{path}={_show(value)}: must be {_describe(allowed) or kind}")
    if allowed and value is not None and not isinstance(value, list) and result not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) and isinstance(allowed, tuple) else ""
        raise UserError(f"{path}={_show(value)}: must be {_describe(allowed)}{hint}")
    if isinstance(result, float) and not math.isfinite(result):
        raise UserError(f"{path}={_show(value)}: must be a finite number")
    return result


def _describe(allowed: Allowed | None) -> str:
    return f"one of {', '.join(allowed)}" if isinstance(allowed, tuple) and not isinstance(allowed, Between) else str(allowed or "")


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 80 else text[:77] + "…"
