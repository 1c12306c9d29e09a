"""What numbers and words a config may hold, by full key. A list is checked item by item."""

import math
import typing


class Between(typing.NamedTuple):
    """Allowed numbers: low … high, without low itself where `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if (
            not isinstance(value, int | float) or not abs(value) < math.inf
        ):  # also true of integers beyond any float
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

LIMITS: dict[str, Allowed] = {
    "logger": ("files", "tensorboard"),
    "seed": Between(0, 2**63 - 1),
    "jobs_per_gpu": Between(1, 64),
    "minimize": ("val_eps_mse", "val_loss"),
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
    "optimizer.name": ("adamw", "muon"),
    "optimizer.lr": Between(0, above=True),
    "optimizer.beta_1": Between(0, 0.99999),
    "optimizer.beta_2": Between(0, 0.9999999),
    "optimizer.weight_decay": Between(0),
    "optimizer.warmup_steps": _OFTEN,
    "optimizer.decay": ("constant", "cosine", "halving"),
    "optimizer.halvings": Between(0, 64),
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
    "trainer.compile": ("auto", "true", "false"),
    "trainer.ema_decay": Between(0, 0.9999999),
    "trainer.grad_clip": Between(0, above=True),
    "trainer.log_every": _ONE_TO_MANY,
    "trainer.validate_every": _OFTEN,
    "trainer.sample_every": _OFTEN,
    "trainer.checkpoint_every": _OFTEN,
    "trainer.keep": Between(1, 10**6),
    "n": Between(1, 10**8),
    "index": Between(0, 2**53),
    "label": Between(0, 10**6),
    "guidance_scale": Between(0, 1000),
    "guidance_rescale": _PART,
    "guidance_interval": Between(0),
    "precision": ("fp32", "bf16"),
    "task": ("generate", "inpaint", "variation", "interpolate", "reconstruct"),
    "jump_length": Between(1, 100_000),
    "jump_n_sample": Between(1, 1000),
    "strength": _PART,
    "seeds": Between(0, 2**63 - 1),
    "batch_size": Between(1, 2**20),
    "nrow": Between(1, 10**6),
    "figure": ("val_eps_mse", "val_loss"),
    "format": ("diffusers", "safetensors"),
    "save": ("grid", "images", "npz", "trajectory"),
    "measure": ("distance", "neighbours", "memorization", "likelihood", "cas"),
}


def describe(allowed: Allowed | None) -> str:
    return (
        f"one of {', '.join(allowed)}"
        if isinstance(allowed, tuple) and not isinstance(allowed, Between)
        else str(allowed or "")
    )
