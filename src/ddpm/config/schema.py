"""What a config may say: every key of every command, declared once. No Hydra, no torch, nothing run.

`key(help, allowed, absent=…, path=…, experiment=…)` beside a field's type is its declaration; its default stands in a
YAML file under configs/. For the groups with a choice (dataset, model, schedule, sampler) the YAML file of the choice
is the schema: its keys, and values of the same type. Command lines and configs stored in checkpoints pass through here.
"""

# ruff: noqa: RUF009 (`key` returns a dataclass field, no default)
import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ddpm.config.choices import Component, check_choice, check_keys
from ddpm.config.limits import GROUP_KEYS, REQUIRED, Between, Key, Labels, Several, like, number_or_name
from ddpm.config.tables import Names
from ddpm.errors import UserError


def key(*declared: Any, **more: Any) -> Any:
    """Declare a field of a config; the arguments are those of `Key`."""
    return dataclasses.field(metadata={"key": Key(*declared, **more)})


STEPS = Between(0, 10**9)
AT_LEAST_ONE = Between(1, 10**9)
PART = Between(0, 1)
AUTO = ("auto", "true", "false")
FIGURES = ("val_eps_mse", "val_loss")

# Keys of several commands.
_seed = partial(key, "every random number follows from it", Between(0, 2**63 - 1))
_device = partial(key, "auto, cpu, cuda, cuda:1", experiment=False)
_data_root = partial(
    key, "folder of the datasets (default: $DDPM_DATA, else data)", path=True, experiment=False
)
_ckpt = partial(key, "a checkpoint file, a run folder, or latest", path=True)
_ema = partial(key, "averaged weights; false: the last ones")
_batch_size = partial(key, "how many at once", Between(1, 2**20))
_precision = partial(
    key, "the network's; auto: bf16 on a GPU that has it, else fp32", ("auto", "fp32", "bf16")
)
_n = partial(key, allowed=Between(1, 10**8))
_guidance = partial(key, allowed=Between(0, 1000))
_out = partial(key, path=True)


@dataclass(frozen=True)
class Objective:
    prediction: str = key(allowed=Names("prediction"))
    weight: str = key(allowed=Names("weight"))
    min_snr_gamma: float = key(allowed=Between(0, above=True))
    p2_gamma: float = key(allowed=Between(0))
    sigmoid_bias: float = key(allowed=Between(-100, 100))
    timesteps: str = key(allowed=Names("timesteps"))
    logit_normal_mean: float = key(allowed=Between(-100, 100))
    logit_normal_std: float = key(allowed=Between(0, 100, above=True))
    label_dropout: float = key(allowed=PART)
    learned_variance: bool = key()
    vlb_weight: float = key(allowed=Between(0))


@dataclass(frozen=True)
class Optimizer:
    name: str = key(allowed=Names("optimizer"), absent="adamw")
    lr: float = key(allowed=Between(0, above=True))
    beta_1: float = key(allowed=Between(0, 0.99999))
    beta_2: float = key(allowed=Between(0, 0.9999999))
    weight_decay: float = key(allowed=Between(0))
    warmup_steps: int = key(allowed=STEPS)
    decay: str = key(allowed=("constant", "cosine", "halving"))
    halvings: int = key(allowed=Between(0, 64), absent=5)


@dataclass(frozen=True)
class Trainer:
    max_steps: int = key(allowed=AT_LEAST_ONE)
    max_epochs: int | None = key(allowed=AT_LEAST_ONE)
    batch_size: int = key(allowed=Between(1, 2**20))
    accumulate: int = key(allowed=Between(1, 2**16))
    precision: str = key(allowed=("auto", "fp32", "tf32", "bf16", "fp16"))
    channels_last: bool = key()
    compile: str = key(allowed=AUTO)
    cuda_graph: str = key(allowed=AUTO, absent="auto")
    ema_decay: float = key(allowed=Between(0, 0.9999999))
    grad_clip: float = key(allowed=Between(0, above=True))
    log_every: int = key(allowed=AT_LEAST_ONE)
    validate_every: int = key(allowed=STEPS)
    sample_every: int = key(allowed=STEPS)
    checkpoint_every: int = key(allowed=STEPS)
    keep: int = key(allowed=Between(1, 10**6))
    resume: str | None = key(path=True, experiment=False)
    init_from: str | None = key(path=True, absent=None)
    deterministic: bool = key()


@dataclass(frozen=True)
class TrainConfig:
    seed: int = _seed()
    device: str = _device()
    data_root: str = _data_root()
    run_dir: str | None = key(
        "the run's folder (default: a new outputs/train/<date>/<time>)", path=True, experiment=False
    )
    overwrite: bool = key("replace a run that is there already", experiment=False)
    gpus: str | None = key(
        "take a free GPU, no other run's: auto, or 0,2,3 to choose among; a sweep's default is auto",
        absent=None,
        experiment=False,
    )
    jobs_per_gpu: int = key(
        "how many may share one; all of them must say so", Between(1, 64), absent=1, experiment=False
    )
    minimize: str = key(
        "what a sweep's jobs return and its table is sorted by: the lowest of a run",
        FIGURES,
        absent="val_eps_mse",
        experiment=False,
    )
    logger: str = key(
        "files, or tensorboard as well: event files in the run's folder",
        Names("logger"),
        absent="files",
        experiment=False,
    )
    dataset: Component = key()
    model: Component = key()
    schedule: Component = key()
    objective: Objective = key()
    optimizer: Optimizer = key()
    sampler: Component = key()
    trainer: Trainer = key()


@dataclass(frozen=True)
class SampleConfig:
    ckpt: str = _ckpt()
    n: int | None = _n("how many images: 64; of each input: 1; from end to end of an interpolation: 8")
    seed: int = _seed()
    index: Several | None = key(
        "only this image of the seed (or a list; of the input): the same whatever n is", Between(0, 2**53)
    )
    batch_size: int = _batch_size()
    device: str = _device()
    precision: str = _precision()
    ema: bool = _ema()
    label: Labels | None = key("a class's number or name, a list [0,1,2], or all: image i has class i mod K")
    guidance_scale: float = _guidance("1 is off; above 1 more typical of the class, 0 without class")
    guidance_rescale: float = key("0 to 1: back towards the contrast without guidance", PART)
    guidance_interval: list[float] | None = key(
        "guide only where sigma/alpha is within [low, high]; null: everywhere", Between(0)
    )
    task: str = key(
        "generate, inpaint, variation, interpolate or reconstruct",
        ("generate", "inpaint", "variation", "interpolate", "reconstruct"),
    )
    input: str | None = key(
        "to start from: a picture, a folder of them, or mnist:test:0-15 (train, val, test)", path=True
    )
    data_root: str = _data_root()
    mask: str | None = key(
        "inpaint: left, top, centre, random, or a picture: what is white is drawn", path=True
    )
    jump_length: int = key("inpaint: levels between which RePaint goes to and fro", Between(1, 100_000))
    jump_n_sample: int = key(
        "inpaint: how often; the cost is num_steps × jump_n_sample evaluations", Between(1, 1000)
    )
    strength: float = key("variation: 0 returns the input, 1 forgets it", PART)
    seeds: list[int] | None = key(
        "interpolate: the two ends (default: seed and seed+1); with input: every two images",
        Between(0, 2**63 - 1),
    )
    sampler: Component = key()
    save: list[str] = key("any of grid, images, npz, trajectory", ("grid", "images", "npz", "trajectory"))
    out: str | None = _out("folder for the results (of ddpm-sample by default a new one under the run's)")
    nrow: int | None = key("images in a row of the grid", Between(1, 10**6))


@dataclass(frozen=True)
class DrawConfig:
    """What `Model.sample` takes beside a sampler."""

    n: int = _n()
    seed: int = _seed()
    index: Several | None = key(allowed=Between(0, 2**53))
    label: Labels | None = key()
    guidance_scale: float = _guidance()
    batch_size: int = _batch_size()


@dataclass(frozen=True)
class ExportConfig:
    ckpt: str = _ckpt()
    format: str = key("diffusers or safetensors", ("diffusers", "safetensors"))
    out: str = _out("folder for the results (of ddpm-sample by default a new one under the run's)")
    ema: bool = _ema()


@dataclass(frozen=True)
class InfoConfig:
    ckpt: str = _ckpt()


@dataclass(frozen=True)
class EvalConfig:
    ckpt: str | None = _ckpt()
    samples: str | None = key(
        "instead of ckpt: an .npz file, a folder of pictures, or mnist:test, mnist:train:0-9999", path=True
    )
    compare: list[str] | None = key(
        "instead of either: evaluation.json files, or their folders, side by side"
    )
    dataset: Component | None = key(  # None: that of the checkpoint
        "what they are held against (default: the checkpoint's own; needed for samples)"
    )
    n: int = _n("how many images; distances from fewer than a few thousand say little")
    seed: int = _seed()
    batch_size: int = _batch_size()
    device: str = _device()
    precision: str = _precision()
    ema: bool = _ema()
    guidance_scale: float = _guidance("1 is off, as models are compared")
    sampler: Component = key()
    data_root: str = _data_root()
    measure: list[str] = key(
        "any of distance, neighbours, memorization, likelihood, cas; what does not apply is left out",
        Names("metric"),
    )
    out: str | None = _out(
        "folder for the results (default: a new one under the run's, or under outputs/evaluations)"
    )


@dataclass(frozen=True)
class ReportConfig:
    folder: list[str] = key(
        "a sweep, a run, or a folder of them; or a list; the key itself need not be typed"
    )
    figure: str = key("what runs are ranked by, at its best over each run: val_eps_mse or val_loss", FIGURES)
    contact: bool = key("false: no contact.png, which takes the longest")
    n: int = _n("images of each run in contact.png, 1 to 64: the same noise for all")
    seed: int = _seed()
    sampler: Component | None = key("one for all runs (default: each run's own)")
    device: str = _device()
    out: str | None = _out("folder for the files (default: the folder itself; for several a new one)")


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "info": InfoConfig,
    "report": ReportConfig,
}


def declared(schema: type) -> dict[str, Key]:
    """Return every key of a command by its full name, those of its groups too."""
    found: dict[str, Key] = {}
    for field in dataclasses.fields(schema):
        found[field.name] = field.metadata["key"]
        if dataclasses.is_dataclass(field.type) and field.type is not Component:
            inner = declared(typing.cast(type, field.type))
            found |= {f"{field.name}.{name}": inside for name, inside in inner.items()}
        elif Component in (field.type, *typing.get_args(field.type)):
            found |= {
                name: inside for name, inside in GROUP_KEYS.items() if name.startswith(f"{field.name}.")
            }
    return found


def groups(schema: type) -> list[str]:
    """Return the keys that choose a file."""
    return [
        field.name
        for field in dataclasses.fields(schema)
        if any(map(dataclasses.is_dataclass, (field.type, *typing.get_args(field.type))))
    ]


PATH_KEYS = {name for schema in SCHEMAS.values() for name, key in declared(schema).items() if key.path}
_OF_TRAINING = {name: key for name, key in declared(TrainConfig).items() if name not in GROUP_KEYS}
NOT_PART_OF_THE_EXPERIMENT = {name for name, key in _OF_TRAINING.items() if not key.experiment}
DEFAULTS_FOR_OLD_CHECKPOINTS = {
    name: key.absent for name, key in _OF_TRAINING.items() if key.absent is not REQUIRED
}


def check(schema: type, raw: Mapping[str, Any], path: str = "") -> Any:
    """Return `raw` as an instance of the dataclass `schema`.

    Raises UserError with one line: the full key, the value, and what is allowed.
    """
    fields = dataclasses.fields(schema)
    check_keys(raw, [field.name for field in fields], path)
    return schema(
        **{f.name: _value(f.type, raw[f.name], path + f.name, f.metadata["key"].allowed) for f in fields}
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a checked config as plain data, the inverse of `check`."""

    def plain(part: Any) -> Any:
        if isinstance(part, Component):
            return part.to_dict()
        return vars(part) if dataclasses.is_dataclass(part) else part

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def by_key(config: Any) -> dict[str, Any]:
    """Return a checked config by key, as it is typed: flat, the name of a choice under its group."""
    flat: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        for inner, item in value.items() if isinstance(value, dict) else [("", value)]:
            flat[key if inner in ("", "name") else f"{key}.{inner}"] = item
    return flat


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return what the experiment is, by key."""
    return {key: value for key, value in by_key(config).items() if key not in NOT_PART_OF_THE_EXPERIMENT}


def _value(hint: Any, value: Any, path: str, allowed: Any) -> Any:
    if hint is Component:
        return check_choice(path, value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}: must be a set of keys")
        return check(typing.cast(type, hint), value, path + ".")
    if isinstance(hint, types.UnionType):  # … | None
        return None if value is None else _value(typing.get_args(hint)[0], value, path, allowed)
    if hint in (Several, Labels):
        if value == []:
            raise UserError(f"{path}=[]: must be a number, or a list of at least one")
        items = value if isinstance(value, list) else [value]
        if hint is Several:
            return Several(like([0], items, path, allowed))
        names = like([""], items, path, allowed)
        return "all" if names == ["all"] else Labels(map(number_or_name, names))
    if typing.get_origin(hint) is list:
        return like([typing.get_args(hint)[0]()], value, path, allowed)
    return like(hint(), value, path, allowed)
