"""From checked configs to objects: the one place where a name becomes a dataset, schedule, network or sampler."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.config import Choice
from ddpm.config import Objective as ObjectiveConfig
from ddpm.datasets import DATASETS
from ddpm.datasets.types import Dataset, Facts
from ddpm.diffusion import Objective, make_objective
from ddpm.errors import CheckpointError, UserError
from ddpm.networks import NETWORKS
from ddpm.schedules import SCHEDULES, NoiseSchedule


def device(name: str) -> torch.device:
    """The device a user means by auto, cpu, cuda or cuda:1. Raises UserError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or (":" in name and not number):
        raise UserError(f"device={name}: must be auto, cpu, cuda or cuda:<number>")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise UserError(f"device={name}: this machine has {count} CUDA devices; device=cpu works everywhere")
    return torch.device("cuda", int(number or 0))


def dataset(choice: Choice, data_root: str) -> Dataset:
    return _call("dataset", DATASETS, choice, data_root=Path(data_root))  # type: ignore[no-any-return]


def schedule(choice: Choice) -> NoiseSchedule:
    return _call("schedule", SCHEDULES, choice)  # type: ignore[no-any-return]


def network(choice: Choice, objective: ObjectiveConfig, facts: Facts) -> nn.Module:
    """The network for images of these facts; twice the channels out where the variance is learned too."""
    params = {**choice.params}
    conditional = params.pop("conditional")
    if conditional and not facts.num_classes:
        raise UserError(f"model.conditional=true: the dataset {facts.name} has no labels")
    facts_of_data = {
        "image_size": facts.image_size,
        "in_channels": facts.channels,
        "out_channels": facts.channels * (2 if objective.learned_variance else 1),
        "num_classes": facts.num_classes if conditional else 0,
    }
    return _call("model", NETWORKS, Choice(choice.name, params), **facts_of_data)  # type: ignore[no-any-return]


def objective(config: ObjectiveConfig, schedule: NoiseSchedule, device: torch.device) -> Objective:
    """Raises UserError with the reason for combinations that cannot be trained."""
    try:
        return make_objective(
            schedule,
            device,
            prediction=config.prediction,
            weight=config.weight,
            learned_variance=config.learned_variance,
            vlb_weight=config.vlb_weight,
            min_snr_gamma=config.min_snr_gamma,
            p2_gamma=config.p2_gamma,
            sigmoid_bias=config.sigmoid_bias,
        )
    except ValueError as error:
        raise UserError(f"objective.{error}") from None


def facts(stored: Mapping[str, Any]) -> Facts:
    """The facts of the data a checkpoint was trained on. Raises CheckpointError where they cannot be."""
    fields = {
        "name": str,
        "channels": int,
        "image_size": int,
        "num_classes": int,
        "class_names": list,
        "levels": int,
    }
    if stored.keys() != fields.keys() or not all(type(stored[key]) is kind for key, kind in fields.items()):
        raise CheckpointError(f"the checkpoint's facts of its data are not complete: {dict(stored)}")
    if not (
        1 <= stored["channels"] <= 16
        and 1 <= stored["image_size"] <= 1024
        and 0 <= stored["num_classes"] <= 10_000
    ):
        raise CheckpointError(f"the checkpoint's facts of its data are out of range: {dict(stored)}")
    return Facts(**{**stored, "class_names": tuple(map(str, stored["class_names"]))})


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, naming the first tensor that does not fit."""
    wanted = network.state_dict()
    for name in wanted.keys() | weights.keys():
        has, needs = weights.get(name), wanted.get(name)
        if has is None or needs is None or has.shape != needs.shape:
            shapes = [tuple(tensor.shape) if tensor is not None else "nothing" for tensor in (has, needs)]
            raise CheckpointError(
                f"the checkpoint does not fit its own config: '{name}' is {shapes[0]}, needs {shapes[1]}"
            )
    network.load_state_dict(weights)


def _call(group: str, table: Mapping[str, Callable[..., Any]], choice: Choice, **given: Any) -> Any:
    function = table[choice.name]
    try:
        inspect.signature(function).bind(**given, **choice.params)
    except TypeError as error:
        raise UserError(f"{group}={choice.name}: {error}") from None
    try:
        return function(**given, **choice.params)
    except ValueError as error:  # what the function itself says about its parameters
        raise UserError(f"{group}={choice.name}: {error}") from None
