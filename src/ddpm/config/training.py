"""The keys of ddpm-train's groups without a choice: objective, optimizer, trainer."""

from dataclasses import dataclass

from ddpm.config.limits import PART, Between, key
from ddpm.config.tables import Names

STEPS = Between(0, 10**9)
AT_LEAST_ONE = Between(1, 10**9)
AUTO = ("auto", "true", "false")


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
