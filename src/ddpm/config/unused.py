"""Refuse typed settings that have no effect beside the other settings."""

from collections.abc import Iterable, Sequence
from typing import Any

from ddpm.config.overrides import literal
from ddpm.config.schema import by_key
from ddpm.config.tables import REGISTERED
from ddpm.errors import UserError

# By key or group: the settings that it needs to have an effect, as "key=value" or "key!=value". Resources that not
# every task uses (device, data_root, seed) need nothing.
_NOT_INPAINT = ("task!=inpaint",)  # RePaint takes ancestral steps, whatever the sampler
_WITH_CHURN = (*_NOT_INPAINT, "sampler.churn!=0.0")
NEEDS: dict[str, tuple[str, ...]] = {
    "objective.min_snr_gamma": ("objective.weight=min_snr",),
    "objective.p2_gamma": ("objective.weight=p2",),
    "objective.sigmoid_bias": ("objective.weight=sigmoid",),
    "objective.logit_normal_mean": ("objective.timesteps=logit_normal",),
    "objective.logit_normal_std": ("objective.timesteps=logit_normal",),
    "objective.label_dropout": ("model.conditional=true",),
    "objective.vlb_weight": ("objective.learned_variance=true",),
    "optimizer.halvings": ("optimizer.decay=halving",),
    "sampler.eta": _NOT_INPAINT,
    "sampler.variance": _NOT_INPAINT,
    "sampler.order": _NOT_INPAINT,
    "sampler.cap": _NOT_INPAINT,
    "sampler.churn": _NOT_INPAINT,
    "sampler.churn_min": _WITH_CHURN,
    "sampler.churn_max": _WITH_CHURN,
    "sampler.churn_noise": _WITH_CHURN,
    "sampler.rho": ("sampler.spacing=karras",),
    "sampler.dynamic_percentile": ("sampler.clip=dynamic",),
    "overwrite": ("run_dir!=null",),
    "gpus": ("device!=cpu",),
    "jobs_per_gpu": ("gpus!=null",),
    "guidance_rescale": ("guidance_scale!=1.0", "guidance_scale!=0.0"),
    "guidance_interval": ("guidance_scale!=1.0",),
    "jump_length": ("task=inpaint",),
    "jump_n_sample": ("task=inpaint",),
    "strength": ("task=variation",),
    "nrow": ("save=grid",),
    "features_path": ("features=dinov2",),
}
_MEASURED: tuple[str, ...] = ("compare=null",)  # `compare` reads evaluations and measures nothing
_DRAWN = (*_MEASURED, "samples=null")
NEEDS_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"guidance_scale": ("model.conditional=true",)},
    "eval": dict.fromkeys(
        ("dataset", "n", "seed", "device", "data_root", "measure", "features", "out"), _MEASURED
    )
    | dict.fromkeys(("sampler", "batch_size", "precision", "ema"), _DRAWN),
    "report": {key: ("contact=true",) for key in ("sampler", "n", "seed", "device")},
}


def refuse_unused(program: str, jobs: Iterable[tuple[Sequence[str], Any]]) -> None:
    """Raise UserError for an override that has no effect in any of the jobs: the overrides and the config of each.

    A value that says "off" (null, false, 0) is no setting. What a plug-in reads is not known.
    """
    found = [_unused(NEEDS | NEEDS_OF.get(program, {}), *job) for job in jobs]
    for key, message in found[0].items():
        if all(key in each for each in found):
            raise UserError(message)


def _unused(table: dict[str, tuple[str, ...]], overrides: Sequence[str], config: Any) -> dict[str, str]:
    """Return a message for each typed key without effect, by the key."""
    values, found = by_key(config), dict[str, str]()
    for override in overrides:
        key, _, typed = override.lstrip("+").partition("=")
        needs = [need for each in {key.partition(".")[0], key} for need in table.get(each, ())]
        for need in needs if values.get(key) else []:
            gate, _, wanted = need.partition("=")
            gate, other = gate.rstrip("!"), gate.endswith("!")
            if not _holds(gate, wanted, other, values):
                now = f"{gate}={literal(values[gate])}".replace("'", "")
                if other:
                    need = f"{gate}=…" if wanted == "null" else f"another {gate}"
                found.setdefault(key, f"{key}={typed}: has no effect with {now}; it needs {need}")
    return found


def _holds(gate: str, wanted: str, other: bool, values: dict[str, Any]) -> bool:
    """Return whether the key `gate` has the wanted value, or any other; the command may lack the key."""
    if gate not in values:
        return True
    value = values[gate] if isinstance(values[gate], list) else [literal(values[gate]).strip("'")]
    registered = {name for names in REGISTERED.values() for name in names}
    return bool(registered.intersection(value)) or (wanted in value) != other
