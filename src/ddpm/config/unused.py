"""Typed settings that the other settings leave without effect: they are refused, so that none is swallowed."""

from collections.abc import Iterable, Sequence
from typing import Any

from ddpm.config.limits import Key
from ddpm.config.schema import declared, to_dict
from ddpm.config.tables import REGISTERED, Names
from ddpm.errors import UserError

# What a key or a group needs, "key=value" or "key!=value" of others, to have an effect. Resources that a command may
# or may not come to use (device, data_root, seed) need nothing.
_OWN_STEPS = ("task!=inpaint",)  # whose steps are ancestral, whichever sampler the levels are of
_CHURN = (*_OWN_STEPS, "sampler.churn!=0")
_COMPARED: tuple[str, ...] = ("compare=null",)
_DRAWN: tuple[str, ...] = ("ckpt!=null",)
NEEDS: dict[str, tuple[str, ...]] = {
    "objective.min_snr_gamma": ("objective.weight=min_snr",),
    "objective.p2_gamma": ("objective.weight=p2",),
    "objective.sigmoid_bias": ("objective.weight=sigmoid",),
    "objective.logit_normal_mean": ("objective.timesteps=logit_normal",),
    "objective.logit_normal_std": ("objective.timesteps=logit_normal",),
    "objective.label_dropout": ("model.conditional=true",),
    "objective.vlb_weight": ("objective.learned_variance=true",),
    "optimizer.halvings": ("optimizer.decay=halving",),
    "sampler.eta": _OWN_STEPS,
    "sampler.variance": _OWN_STEPS,
    "sampler.order": _OWN_STEPS,
    "sampler.cap": _OWN_STEPS,
    "sampler.churn": _OWN_STEPS,
    "sampler.churn_min": _CHURN,
    "sampler.churn_max": _CHURN,
    "sampler.churn_noise": _CHURN,
    "sampler.rho": ("sampler.spacing=karras",),
    "sampler.dynamic_percentile": ("sampler.clip=dynamic",),
    "overwrite": ("run_dir!=null",),
    "gpus": ("device!=cpu",),
    "jobs_per_gpu": ("gpus!=null",),
    "guidance_rescale": ("guidance_scale!=1", "guidance_scale!=0"),
    "guidance_interval": ("guidance_scale!=1",),
    "jump_length": ("task=inpaint",),
    "jump_n_sample": ("task=inpaint",),
    "strength": ("task=variation",),
    "nrow": ("save=grid",),
}
_NEEDS_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "eval": dict.fromkeys(("dataset", "n", "seed", "device", "data_root", "measure", "out"), _COMPARED)
    | dict.fromkeys(("sampler", "batch_size", "precision", "ema", "guidance_scale"), _DRAWN),
    "report": dict.fromkeys(("sampler", "n", "seed", "device"), ("contact=true",)),
}


def refuse_unused(program: str, jobs: Iterable[tuple[Sequence[str], Any]]) -> None:
    """Raise UserError for an override that has no effect in any of the jobs: the overrides and the config of each.

    A value that says "off" (null, false, 0) is no setting. What a plug-in reads is not known.
    """
    found = [_unused(program, overrides, config) for overrides, config in jobs]
    for key, message in found[0].items():
        if all(key in each for each in found):
            raise UserError(message)


def _unused(program: str, overrides: Sequence[str], config: Any) -> dict[str, str]:
    """Return a message for each typed key without effect, by the key."""
    keys, values, found = declared(type(config)), to_dict(config), dict[str, str]()
    table = NEEDS | _NEEDS_OF.get(program, {})
    for override in overrides:
        key, _, typed = override.lstrip("+").partition("=")
        needs = [need for each in dict.fromkeys([key.partition(".")[0], key]) for need in table.get(each, ())]
        for need in needs if _value(values, key) else []:
            if not _holds(need, keys, values):
                gate = need.partition("=")[0].rstrip("!")
                now = f"{gate}={_text(_value(values, gate))}"
                wanted = (
                    need.replace("!=null", "=…") if "!" not in need or "null" in need else f"another {gate}"
                )
                found[key] = f"{key}={typed}: has no effect with {now}; it needs {wanted}"
                break
    return found


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _holds(need: str, keys: dict[str, Key], values: dict[str, Any]) -> bool:
    """Return whether a need is fulfilled, as it is where the command lacks its key or a plug-in is chosen."""
    key, _, wanted = need.partition("=")
    key, unwanted = key.rstrip("!"), key.endswith("!")
    if key.partition(".")[0] not in values:
        return True
    value = _value(values, key)
    if key in keys and isinstance(allowed := keys[key].allowed, Names) and value in REGISTERED[allowed.kind]:
        return True
    return (wanted in (value if isinstance(value, list) else [_text(value)])) != unwanted


def _text(value: Any) -> str:
    """Return a value as it is typed."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list():
            return f"[{','.join(map(_text, value))}]"
    return str(value)
