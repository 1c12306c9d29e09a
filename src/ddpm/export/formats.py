"""Convert a model to files of other tools, bytes by path: a folder of diffusers, or weights and config alone.

diffusers itself is not needed: its folders hold JSON and safetensors.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddpm.config.choices import Component
from ddpm.config.schema import DEFAULTS_FOR_OLD_CHECKPOINTS, NOT_PART_OF_THE_EXPERIMENT, to_dict
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.errors import UserError
from ddpm.export.diffusers_map import diffusers_config, to_diffusers
from ddpm.sample.model import Model

WRITTEN_FOR = "0.35.0"  # the oldest diffusers that these folders are tested with
PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
MOST_STEPS, FEWEST_STEPS = 50, 10

Files = dict[str, bytes]  # by path in the folder


def diffusers_files(model: Model) -> Files:
    """Return unet/, scheduler/ and, for an unconditional model, model_index.json. Raises UserError."""
    if (reason := _not_in_diffusers(model)) is not None:
        raise UserError(f"format=diffusers: {reason}; format=safetensors takes any model")
    files = {
        "unet/config.json": _json({"_class_name": "UNet2DModel", **unet_config(model)}),
        "unet/diffusion_pytorch_model.safetensors": _tensors(to_diffusers(model.network.state_dict())),
        "scheduler/scheduler_config.json": _json({"_class_name": "DDPMScheduler", **scheduler_config(model)}),
    }
    if not model.conditional:  # no pipeline of diffusers hands labels on
        parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        files["model_index.json"] = _json({"_class_name": "DDPMPipeline", **parts})
    return files


def safetensors_files(model: Model) -> Files:
    """Return the weights under our own names, and the config that rebuilds the model."""
    about = {
        "config": public_config(model),
        "facts": {**vars(model.facts), "class_names": list(model.facts.class_names)},
        "step": model.step,
        "figures": dict(model.figures),
    }
    return {"config.json": _json(about), "model.safetensors": _tensors(model.network.state_dict())}


FORMATS: dict[str, Callable[[Model], Files]] = {
    "diffusers": diffusers_files,
    "safetensors": safetensors_files,
}


def unet_config(model: Model) -> dict[str, object]:
    """Return the keyword arguments of diffusers' `UNet2DModel`."""
    channels, size, _ = model.shape
    params = {key: value for key, value in model.config.model.params.items() if key != "conditional"}
    num_classes = model.facts.num_classes if model.conditional else 0
    return diffusers_config(size, channels, channels, num_classes, **params)


def scheduler_config(model: Model) -> dict[str, object]:
    """Return the keyword arguments of diffusers' `DDPMScheduler` and `DDIMScheduler` for our schedule.

    `trailing` is the spacing in which diffusers goes from pure noise to the clean image, all steps alike.
    """
    sampler = model.config.sampler
    large = sampler.name == "ddpm" and sampler.params["variance"] == "large"
    return {
        "num_train_timesteps": model.schedule.num_timesteps,
        "trained_betas": trained_betas(model.schedule),
        "prediction_type": PREDICTION_TYPES[model.config.objective.prediction],
        "clip_sample": sampler.params["clip"] != "none",
        "clip_sample_range": 1.0,
        "variance_type": "fixed_large" if large else "fixed_small",
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }


def trained_betas(schedule: NoiseSchedule) -> list[float]:
    """Return betas (T,), each a float32, whose running product of 1 - beta is alpha_bar to float32's last digit.

    Schedulers multiply float32 numbers; each beta takes up what the rounding of those before has left.
    """
    betas, product = [], 1.0
    for alpha_bar in (schedule.alpha**2).tolist():
        beta = torch.tensor(1 - alpha_bar / product if product else 1.0, dtype=torch.float32)
        product *= (1 - beta).item()
        betas.append(beta.item())
    return betas


def ddim_steps(num_timesteps: int) -> int:
    """Return about 50 steps that divide the timesteps: diffusers' DDIM takes all steps to be of one length."""
    steps = max(n for n in range(1, MOST_STEPS + 1) if num_timesteps % n == 0)
    return steps if steps >= FEWEST_STEPS else num_timesteps


def ddim_as_exported(model: Model) -> Component:
    """Return our sampler that draws what diffusers' DDIM draws from the exported folder, from the same noise."""
    params = {
        "num_steps": ddim_steps(model.schedule.num_timesteps),
        "spacing": "trailing",
        "rho": 7.0,
        "clip": "none" if model.config.sampler.params["clip"] == "none" else "clip",
        "dynamic_percentile": 0.995,
        "eta": 0.0,
    }
    return Component("ddim", params)


def public_config(model: Model) -> dict[str, Any]:
    """Return the config for publication: without paths and settings of one machine."""
    config = to_dict(model.config)
    config |= {"data_root": "data", "run_dir": None, "overwrite": False, "device": "auto"}
    config |= {
        key: value for key, value in DEFAULTS_FOR_OLD_CHECKPOINTS.items() if key in NOT_PART_OF_THE_EXPERIMENT
    }
    config["trainer"] = {**config["trainer"], "resume": None, "init_from": None}
    if "path" in config["dataset"]:
        config["dataset"] = {**config["dataset"], "path": ""}
    return config


def _not_in_diffusers(model: Model) -> str | None:
    """Return why diffusers cannot hold this model, or None if it can."""
    objective, schedule = model.config.objective, model.schedule
    if not getattr(model.network, "in_diffusers", False):
        return f"model={model.config.model.name} is none of its networks, only unet is"
    if objective.prediction not in PREDICTION_TYPES:
        known = ", ".join(PREDICTION_TYPES)
        return f"objective.prediction={objective.prediction} is not known to its schedulers, only {known} are"
    if objective.learned_variance:
        return "objective.learned_variance=true: its DDIMScheduler takes no network with twice the channels"
    if ((schedule.alpha**2 + schedule.sigma**2 - 1).abs() > 1e-9).any():
        return f"schedule={model.config.schedule.name} is not variance-preserving, as its schedulers are"
    return None


def _json(content: Mapping[str, object]) -> bytes:
    if "_class_name" in content:
        content = {"_class_name": content["_class_name"], "_diffusers_version": WRITTEN_FOR, **content}
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialize as safetensors, with the `format` that Hugging Face's readers look for."""
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return save(own, metadata={"format": "pt"})
