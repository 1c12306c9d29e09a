"""What a config may say: every key of every command, declared once. No Hydra, no torch, nothing run.

`key(help, allowed, absent=…, path=…, experiment=…, needs=…)` beside a field's type is its declaration; its default
stands in a YAML file under configs/. For the groups with a choice (dataset, model, schedule, sampler) the YAML file of
the choice is the schema: its keys, and values of the same type. Command lines and configs stored in checkpoints are
checked against it.
"""

# ruff: noqa: RUF009 (`key` returns a dataclass field, no default)
from dataclasses import dataclass
from functools import partial
from typing import Any

from ddpm.config.checking import by_key, declared, key
from ddpm.config.checking import check as check  # which programs import from here
from ddpm.config.checking import to_dict as to_dict
from ddpm.config.choices import Component
from ddpm.config.limits import GROUP_KEYS, REQUIRED, Between, Interval, Labels, Several
from ddpm.config.tables import Names

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
# A training recommends its guidance, as it does a sampler: ddpm-sample and ddpm-eval take it from there.
_guidance_scale = partial(
    key, "1 is off; above 1 more typical of the class, 0 without class", Between(0, 1000), absent=1.0
)
_guidance_rescale = partial(
    key,
    "0 to 1: back towards the contrast without guidance",
    PART,
    absent=0.0,
    needs="guidance_scale!=1.0 guidance_scale!=0.0",
)
_guidance_interval = partial(
    key,
    "guide only where sigma/alpha is within [low, high]; null: everywhere",
    Between(0),
    absent=None,
    needs="guidance_scale!=1.0",
)
_out = partial(key, path=True)


_LOGIT_NORMAL = "objective.timesteps=logit_normal"


@dataclass(frozen=True)
class Objective:
    prediction: str = key(allowed=Names("prediction"))
    weight: str = key(allowed=Names("weight"))
    min_snr_gamma: float = key(allowed=Between(0, above=True), needs="objective.weight=min_snr")
    p2_gamma: float = key(allowed=Between(0), needs="objective.weight=p2")
    sigmoid_bias: float = key(allowed=Between(-100, 100), needs="objective.weight=sigmoid")
    timesteps: str = key(allowed=Names("timesteps"))
    logit_normal_mean: float = key(allowed=Between(-100, 100), needs=_LOGIT_NORMAL)
    logit_normal_std: float = key(allowed=Between(0, 100, above=True), needs=_LOGIT_NORMAL)
    label_dropout: float = key(allowed=PART, needs="model.conditional=true")
    learned_variance: bool = key()
    vlb_weight: float = key(allowed=Between(0), needs="objective.learned_variance=true")


@dataclass(frozen=True)
class Optimizer:
    name: str = key(allowed=Names("optimizer"), absent="adamw")
    lr: float = key(allowed=Between(0, above=True))
    beta_1: float = key(allowed=Between(0, 0.99999))
    beta_2: float = key(allowed=Between(0, 0.9999999))
    weight_decay: float = key(allowed=Between(0))
    warmup_steps: int = key(allowed=STEPS)
    decay: str = key(allowed=("constant", "cosine", "halving"))
    halvings: int = key(allowed=Between(0, 64), absent=5, needs="optimizer.decay=halving")


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
    overwrite: bool = key("replace a run that is there already", experiment=False, needs="run_dir!=null")
    gpus: str | None = key(
        "take a free GPU, no other run's: auto, or 0,2,3 to choose among; a sweep's default is auto",
        absent=None,
        experiment=False,
        needs="device!=cpu",
    )
    jobs_per_gpu: int = key(
        "how many may share one; all of them must say so",
        Between(1, 64),
        absent=1,
        experiment=False,
        needs="gpus!=null",
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
    guidance_scale: float = _guidance_scale(needs="model.conditional=true")
    guidance_rescale: float = _guidance_rescale()
    guidance_interval: Interval | None = _guidance_interval()
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
    guidance_scale: float = _guidance_scale()
    guidance_rescale: float = _guidance_rescale()
    guidance_interval: Interval | None = _guidance_interval()
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
    jump_length: int = key(
        "inpaint: levels between which RePaint goes to and fro", Between(1, 100_000), needs="task=inpaint"
    )
    jump_n_sample: int = key(
        "inpaint: how often; the cost is num_steps × jump_n_sample evaluations",
        Between(1, 1000),
        needs="task=inpaint",
    )
    strength: float = key("variation: 0 returns the input, 1 forgets it", PART, needs="task=variation")
    seeds: list[int] | None = key(
        "interpolate: the two ends (default: seed and seed+1); with input: every two images",
        Between(0, 2**63 - 1),
    )
    sampler: Component = key()
    save: list[str] = key("any of grid, images, npz, trajectory", ("grid", "images", "npz", "trajectory"))
    out: str | None = _out("folder for the results (of ddpm-sample by default a new one under the run's)")
    nrow: int | None = key("images in a row of the grid", Between(1, 10**6), needs="save=grid")


@dataclass(frozen=True)
class DrawConfig:
    """What `Model.sample` takes beside a sampler."""

    n: int = _n()
    seed: int = _seed()
    index: Several | None = key(allowed=Between(0, 2**53))
    label: Labels | None = key()
    guidance_scale: float = _guidance_scale()
    guidance_rescale: float = _guidance_rescale()
    guidance_interval: Interval | None = _guidance_interval()
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


_MEASURED = "compare=null"  # `compare` reads evaluations and measures nothing
_DRAWN = f"{_MEASURED} samples=null"


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
        "what they are held against (default: the checkpoint's own; needed for samples)",
        needs=_MEASURED,
    )
    n: int = _n("how many images; distances from fewer than a few thousand say little", needs=_MEASURED)
    seed: int = _seed(needs=_MEASURED)
    batch_size: int = _batch_size(needs=_DRAWN)
    device: str = _device(needs=_MEASURED)
    precision: str = _precision(needs=_DRAWN)
    ema: bool = _ema(needs=_DRAWN)
    guidance_scale: float = _guidance_scale()
    guidance_rescale: float = _guidance_rescale()
    guidance_interval: Interval | None = _guidance_interval()
    sampler: Component = key(needs=_DRAWN)
    data_root: str = _data_root(needs=_MEASURED)
    measure: list[str] = key(
        "any of distance, neighbours, memorization, likelihood, cas, fid; what does not apply is left out",
        Names("metric"),
        needs=_MEASURED,
    )
    features: str = key(
        "what distance and neighbours compare: own, inception or dinov2",
        ("own", "inception", "dinov2"),
        needs=_MEASURED,
    )
    features_path: str | None = key(
        "for dinov2: folder of its weights, as transformers saves them", path=True, needs="features=dinov2"
    )
    out: str | None = _out(
        "folder for the results (default: a new one under the run's, or under outputs/evaluations)",
        needs=_MEASURED,
    )


_IN_CONTACT = "contact=true"


@dataclass(frozen=True)
class ReportConfig:
    folder: list[str] = key(
        "a sweep, a run, or a folder of them; or a list; the key itself need not be typed"
    )
    figure: str = key("what runs are ranked by, at its best over each run: val_eps_mse or val_loss", FIGURES)
    contact: bool = key("false: no contact.png, which takes the longest")
    n: int = _n("images of each run in contact.png, 1 to 64: the same noise for all", needs=_IN_CONTACT)
    seed: int = _seed(needs=_IN_CONTACT)
    sampler: Component | None = key("one for all runs (default: each run's own)", needs=_IN_CONTACT)
    device: str = _device(needs=_IN_CONTACT)
    out: str | None = _out("folder for the files (default: the folder itself; for several a new one)")


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "info": InfoConfig,
    "report": ReportConfig,
}


PATH_KEYS = {name for schema in SCHEMAS.values() for name, key in declared(schema).items() if key.path}
_OF_TRAINING = {name: key for name, key in declared(TrainConfig).items() if name not in GROUP_KEYS}
NOT_PART_OF_THE_EXPERIMENT = {name for name, key in _OF_TRAINING.items() if not key.experiment}
DEFAULTS_FOR_OLD_CHECKPOINTS = {
    name: key.absent for name, key in _OF_TRAINING.items() if key.absent is not REQUIRED
}


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return what the experiment is, by key."""
    return {key: value for key, value in by_key(config).items() if key not in NOT_PART_OF_THE_EXPERIMENT}
