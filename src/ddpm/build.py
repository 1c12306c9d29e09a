"""From checked configs to objects: the one place where a name becomes a dataset, schedule, network or sampler."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddpm.config.choices import Component
from ddpm.config.training import Objective as ObjectiveConfig
from ddpm.data.dataset import Dataset, check_dataset
from ddpm.data.datasets import DATASETS
from ddpm.data.info import DatasetInfo
from ddpm.diffusion.objective import Objective, make_objective
from ddpm.diffusion.schedules import SCHEDULES, NoiseSchedule
from ddpm.errors import UserError
from ddpm.networks import NETWORKS

if not TYPE_CHECKING:
    from ddpm.old_names import names_of

    __getattr__ = names_of(__name__)


def dataset(choice: Component, data_root: str) -> Dataset:
    """Raises DataError where the images are not what a dataset must be, a plug-in's too."""
    return check_dataset(_call("dataset", DATASETS, choice, data_root=Path(data_root)))


def schedule(choice: Component) -> NoiseSchedule:
    return _call("schedule", SCHEDULES, choice)  # type: ignore[no-any-return]


def network(choice: Component, objective: ObjectiveConfig, facts: DatasetInfo) -> nn.Module:
    """Build the network for images of these facts, with twice the output channels for a learned variance."""
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
    made: nn.Module = _call("model", NETWORKS, Component(choice.name, params), **facts_of_data)
    # a program that uses ddpm may have another default dtype, which layers take
    return made if torch.get_default_dtype() == torch.float32 else made.float()


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


def _call(group: str, table: Mapping[str, Callable[..., Any]], choice: Component, **given: Any) -> Any:
    function = table[choice.name]
    try:
        inspect.signature(function).bind(**given, **choice.params)
    except TypeError as error:
        raise UserError(f"{group}={choice.name}: {error}") from None
    try:
        return function(**given, **choice.params)
    except ValueError as error:  # what the function itself says about its parameters
        raise UserError(f"{group}={choice.name}: {error}") from None
