"""What numbers and words a config may hold, by full key. A list is checked item by item."""

import difflib
import math
import typing
from collections.abc import Iterable
from typing import Any

from ddpm.errors import UserError, is_plain


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
    "trainer.precision": ("auto", "fp32", "tf32", "bf16", "fp16"),
    "trainer.compile": ("auto", "true", "false"),
    "trainer.cuda_graph": ("auto", "true", "false"),
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


MAX_ITEMS = 4096  # in a list


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint "; did you mean …?" or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def like(example: Any, value: Any, path: str) -> Any:
    """`value`, if it is of the example's type and within the limits of its key `path`. Raises UserError."""
    match example:
        case None:
            result, kind = value, "plain data"
            fits = value is None or isinstance(value, str | int | float | bool | list)
        case bool():
            result, kind, fits = value, "true or false", isinstance(value, bool)
        case int():
            result, kind = value, "a whole number"
            fits = isinstance(value, int) and not isinstance(value, bool)
        case float():
            fits, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
            result = float(value) if fits and abs(value) < 1e300 else value
        case str():
            if isinstance(value, bool) and (word := str(value).lower()) in LIMITS.get(path, ()):
                value = word  # no text to YAML, nor in checkpoints of before there was a third word
            result, kind = value, "a text without control characters"
            fits = isinstance(value, str) and len(value) <= 4096 and is_plain(value)
        case list():
            if not isinstance(value, list | tuple) or len(value) > MAX_ITEMS:
                raise UserError(f"{path}={value!r}: must be a list such as [1, 2]")
            item = example[0] if example else 0
            return [like(item, each, path) for each in value]
        case _:
            raise AssertionError(f"{path}: a config holds plain values and lists of them")
    allowed = LIMITS.get(path)
    if not fits:
        raise UserError(f"{path}={_show(value)}: must be {describe(allowed) or kind}")
    if allowed and value is not None and not isinstance(value, list) and result not in allowed:
        words = () if isinstance(allowed, Between) or not isinstance(value, str) else allowed
        hint = nearest(value, words) if words else ""
        raise UserError(f"{path}={_show(value)}: must be {describe(allowed)}{hint}")
    if isinstance(result, float) and not math.isfinite(result):
        raise UserError(f"{path}={_show(value)}: must be a finite number")
    return result


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 80 else text[:77] + "…"
