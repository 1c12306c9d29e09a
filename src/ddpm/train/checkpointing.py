"""Save a training as a checkpoint, restore it, or begin one with another's weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate, verify
from ddpm.checkpoint.header import Entry, Meta
from ddpm.config.schema import to_dict
from ddpm.data import info
from ddpm.errors import CheckpointError, UserError
from ddpm.train.optimizers import state_names
from ddpm.train.state import TrainState


def save(run: TrainState, path: Path, record: Mapping[str, float]) -> None:
    """Save the training as one file. Raises CheckpointError if it cannot be written or is not finite."""
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    for what, numbers in (
        ("weights", run.network.parameters()),
        ("averaged weights", run.ema.parameters()),
        ("optimizer's moments", moments),
    ):
        if not _finite(numbers):
            cause = (
                f"not finite at step {run.step} (optimizer.lr={run.config.optimizer.lr:g}: try a smaller one)"
            )
            raise CheckpointError(f"the {what} are {cause}: {path.name} was not written")
    tensors = {f"model.{name}": tensor for name, tensor in run.network.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in run.ema.state_dict().items()}
    for name, parameter in run.network.named_parameters():
        state = run.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    tensors |= {
        f"scaler.{key}": torch.tensor(value, dtype=torch.float64)
        for key, value in run.scaler.state_dict().items()
    }
    if run.keeps_history:
        tensors["timesteps.history"] = run.loss_history
    tensors |= {"log.loss_sum": run.loss_sum, "log.since": torch.tensor(run.last_logged_step)}
    figures = {key: float(value) for key, value in record.items() if key != "step"}
    facts = {**vars(run.facts), "class_names": list(run.facts.class_names)}
    checkpoint.save(path, tensors, Meta(to_dict(run.config), facts, run.step, figures, run.environment, ""))


def _finite(numbers: Iterable[Tensor]) -> bool:
    """Return whether all are finite, by one transfer from the device: the largest magnitude shows an inf, and a nan."""
    tensors = [tensor.detach() for tensor in numbers]
    return not tensors or bool(torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all())


def restore(run: TrainState, path: Path) -> None:
    """Resume from a checkpoint. Raises CheckpointError where it is broken or does not fit network or data."""
    meta, table = checkpoint.read_meta(path)
    then, now = vars(info.facts(meta.facts)), vars(run.facts)
    if other := [f"{key} was {then[key]!r}, is {now[key]!r}" for key in now if then[key] != now[key]]:
        raise CheckpointError(f"{path} was trained on other data: {'; '.join(other)[:300]}")
    verify.check_tensors(path, table, run.network, run.schedule.num_timesteps)
    _check_complete(path, run, table)
    meta, tensors = checkpoint.load(path)
    verify.load_weights(path, run.network, checkpoint.part(tensors, "model"))
    verify.load_weights(path, run.ema, checkpoint.part(tensors, "ema"))
    for name, tensor in tensors.items():  # an empty place in the history of losses is a nan
        if name != "timesteps.history" and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} cannot be used: '{name}' holds numbers that are not finite")
        if name.startswith("optimizer.") and name.endswith((".step", ".exp_avg_sq")) and (tensor < 0).any():
            raise CheckpointError(f"{path} cannot be used: '{name}' holds numbers below 0")
    optimizer = checkpoint.part(tensors, "optimizer")
    for name, parameter in run.network.named_parameters():
        if state := checkpoint.part(optimizer, name):
            # in the parameter's own memory layout, as the fused kernel assumes
            run.optimizer.state[parameter] = {
                key: value.to(run.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in state.items()
            }
    if run.scaler.is_enabled() and (scaler := checkpoint.part(tensors, "scaler")):
        now = {"scale": float(scaler["scale"]), "_growth_tracker": int(scaler["_growth_tracker"])}
        run.scaler.load_state_dict(run.scaler.state_dict() | now)
    if history := checkpoint.part(tensors, "timesteps"):
        run.loss_history = history["history"].to(run.device)
    if log := checkpoint.part(tensors, "log"):
        run.loss_sum, run.last_logged_step = log["loss_sum"].to(run.device), min(int(log["since"]), meta.step)
    run.step = meta.step


LISTED = 6  # tensors in a note


def init_from(run: TrainState, ckpt: str) -> list[str]:
    """Load another run's averaged weights into network and average, where name and shape are the same.

    `ckpt` is a checkpoint file, a run folder or "latest". Returns lines for the user: where the weights are from,
    and which of the run's tensors stay as they are. Raises UserError if nothing fits, or nothing there is whole.
    """
    path, (meta, tensors), notes = locate.read_wanted(
        ckpt,
        lambda file: checkpoint.load(
            file, "ema", check=lambda meta, table: verify.fitting(file, meta, table)
        ),
    )
    found, own = checkpoint.part(tensors, "ema"), run.network.state_dict()
    fits = {name: found[name] for name in own if name in found and found[name].shape == own[name].shape}
    new = [
        f"{name} {_shape(own[name])}, there {_shape(found[name]) if name in found else 'is none'}"
        for name in own
        if name not in fits
    ]
    listed = "; ".join(new[:LISTED]) + (f"; and {len(new) - LISTED} more" if len(new) > LISTED else "")
    if not fits:
        raise UserError(f"trainer.init_from={ckpt}: no tensor of {path} fits this network: {listed}")
    for network in (run.network, run.ema):
        verify.load_weights(path, network, {**network.state_dict(), **fits})
    notes.append(f"begins with {len(fits)} of {len(own)} tensors from step {meta.step:,} of {path}")
    return [*notes, f"new: {listed}"] if new else notes


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _check_complete(path: Path, run: TrainState, table: Mapping[str, Entry]) -> None:
    """Raises CheckpointError unless all of the optimizer's and the scaler's numbers are there, or none."""
    moments = {
        f"optimizer.{name}.{key}"
        for name, parameter in run.network.named_parameters()
        for key in state_names(run.optimizer, parameter)
    }
    scaler = {name for name in table if name.startswith("scaler.")}
    found = {name for name in table if name.startswith("optimizer.")}
    for part, complete in (("optimizer", found in (set(), moments)), ("scaler", len(scaler) in (0, 5))):
        if not complete:
            raise CheckpointError(f"{path} does not fit its own config: the {part}'s state is not whole")
