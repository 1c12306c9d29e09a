"""From checked configs to objects: the one place where a name becomes a dataset, schedule, network or sampler."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint.header import DTYPES, Entry, Meta
from ddpm.config.schema import Choice, TrainConfig
from ddpm.config.schema import Objective as ObjectiveConfig
from ddpm.data.dataset import Dataset, Facts, check_dataset
from ddpm.data.datasets import DATASETS
from ddpm.diffusion.process import Objective, make_objective
from ddpm.diffusion.schedules import SCHEDULES, NoiseSchedule
from ddpm.diffusion.timesteps import HISTORY
from ddpm.errors import CheckpointError, UserError
from ddpm.networks import NETWORKS
from ddpm.runtime.world import ALONE, World
from ddpm.train.optimizers import ADAMW_STATE


def device(name: str, world: World = ALONE) -> torch.device:
    """The device a user means by auto, cpu, cuda or cuda:1. Raises UserError where there is none.

    Of several processes on a machine each takes a GPU of its own.
    """
    if world.size > 1 and name in ("auto", "cuda") and (name == "cuda" or torch.cuda.is_available()):
        if (count := torch.cuda.device_count()) < world.local_size:
            raise UserError(
                f"device={name}: {world.local_size} processes on a machine with {count} CUDA devices: one process "
                "for each device (torchrun --nproc-per-node), or device=cpu"
            )
        return torch.device("cuda", world.local_rank)
    if world.size > 1 and name not in ("auto", "cpu"):
        raise UserError(
            f"device={name}: {world.size} processes: must be auto, cpu or cuda, one device for each"
        )
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
    """Raises DataError where the images are not what a dataset must be, a plug-in's too."""
    return check_dataset(_call("dataset", DATASETS, choice, data_root=Path(data_root)))


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
    """The facts of the data a checkpoint was trained on, as `meta.py` has checked them."""
    return Facts(**{**stored, "class_names": tuple(stored["class_names"])})


def outline(path: Path) -> tuple[Meta, TrainConfig, nn.Module]:
    """What a checkpoint says it is, compared with its header before memory is taken: its network is on the meta device.

    Raises CheckpointError.
    """
    meta, table = checkpoint.read_meta(path)
    config = checkpoint.config(path, meta)
    try:
        with torch.device("meta"):
            blank = network(config.model, config.objective, facts(meta.facts))
        timesteps = schedule(config.schedule).num_timesteps
    except UserError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    check_tensors(path, table, blank, timesteps)
    return meta, config, blank


def examine(path: Path) -> None:
    """All of a checkpoint: first that it fits its own config, then that it is whole. Raises CheckpointError."""
    outline(path)
    checkpoint.verify(path)


def check_tensors(path: Path, table: Mapping[str, Entry], network: nn.Module, num_timesteps: int) -> None:
    """Compare what a header promises with what its own config needs, before memory is taken for either.

    The network may be on the meta device. Raises CheckpointError, naming the first tensor that does not fit.
    """
    weights = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    needed = {f"{part}.{name}": kind for part in ("model", "ema") for name, kind in weights.items()}
    allowed = needed | {
        f"optimizer.{name}.{key}": (torch.float32, () if key == "step" else tuple(parameter.shape))
        for name, parameter in network.named_parameters()
        for key in (*ADAMW_STATE, "momentum")
    }
    scaler = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    allowed |= {f"scaler.{key}": (torch.float64, ()) for key in scaler}
    allowed |= {"timesteps.history": (torch.float32, (num_timesteps, HISTORY))}
    allowed |= {"log.loss_sum": (torch.float32, ()), "log.since": (torch.int64, ())}
    for name in sorted(needed.keys() | table.keys()):
        has = (f"{DTYPES[table[name].dtype][0]}", table[name].shape) if name in table else "nothing"
        needs = (str(allowed[name][0]), allowed[name][1]) if name in allowed else "nothing"
        if has != needs:
            raise CheckpointError(f"{path} does not fit its own config: '{name}' is {has}, needs {needs}")


def load_weights(path: Path, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights that `check_tensors` has seen into the network. Raises CheckpointError if one is not finite."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} cannot be used: '{name}' holds numbers that are not finite")
    network.load_state_dict(weights, assign=any(parameter.is_meta for parameter in network.parameters()))


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
