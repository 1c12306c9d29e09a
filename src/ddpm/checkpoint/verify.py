"""Verify that a checkpoint's tensors fit the network that its config describes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.build import network, schedule
from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint.header import DTYPES, Entry, Meta
from ddpm.config.schema import TrainConfig
from ddpm.data.info import facts
from ddpm.diffusion.timesteps import HISTORY
from ddpm.errors import CheckpointError, UserError

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


def outline(path: Path) -> tuple[Meta, TrainConfig, nn.Module]:
    """Read a checkpoint's metadata, and return them with what `fitting` does. Raises CheckpointError."""
    meta, table = checkpoint.read_meta(path)
    return meta, *fitting(path, meta, table)


def fitting(path: Path, meta: Meta, table: Mapping[str, Entry]) -> tuple[TrainConfig, nn.Module]:
    """Compare a checkpoint's header with the network that its config needs. Returns the config and the network.

    The network is on the meta device: no memory is allocated for tensors. Raises CheckpointError.
    """
    config = checkpoint.config(path, meta)
    try:
        with torch.device("meta"):
            blank = network(config.model, config.objective, facts(meta.facts))
        timesteps = schedule(config.schedule).num_timesteps
    except UserError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    check_tensors(path, table, blank, timesteps)
    return config, blank


def examine(path: Path) -> None:
    """Check that a checkpoint fits its own config and that its hashes match. Raises CheckpointError."""
    outline(path)
    checkpoint.verify(path)


def check_tensors(path: Path, table: Mapping[str, Entry], network: nn.Module, num_timesteps: int) -> None:
    """Compare a header's entries with the tensors that the checkpoint's config needs.

    The network may be on the meta device. Raises CheckpointError that names the first tensor that does not fit.
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
    """Load weights that passed `check_tensors`. Raises CheckpointError if one is not finite."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} cannot be used: '{name}' holds numbers that are not finite")
    network.load_state_dict(weights, assign=any(parameter.is_meta for parameter in network.parameters()))
