"""A run: all that changes while training, how it begins, and how it is kept in a checkpoint."""

import copy
import hashlib
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm import __version__, build
from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint.header import Entry, Meta
from ddpm.config.schema import TrainConfig, to_dict
from ddpm.data.dataset import Dataset, Facts, Split
from ddpm.diffusion.process import Objective
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.timesteps import empty_history
from ddpm.errors import CheckpointError, UserError
from ddpm.networks.kernels import group_norm
from ddpm.runtime import distributed
from ddpm.runtime.world import ALONE, World
from ddpm.train.optimizers import OPTIMIZERS, Optimizer, state_names


@dataclass(eq=False)
class Run:
    """All that changes while training, and what it is made of."""

    config: TrainConfig
    facts: Facts
    schedule: NoiseSchedule
    objective: Objective
    network: nn.Module
    ema: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    max_steps: int
    environment: dict[str, str]  # what it is trained with, for people and for the promise of equal bits
    history: Tensor  # of losses by t, for loss-aware timesteps
    bad: Tensor  # step, loss and gradient norm of the first update that was not finite; step -1: none was
    loss_sum: Tensor  # of the steps since the last line of metrics.jsonl,
    since: int = 0  # which was written at this step
    step: int = 0
    notes: list[str] = field(default_factory=list)  # for the user, of how it began
    world: World = ALONE
    parallel: DistributedDataParallel | None = None  # around `network`, where several processes train it


def prepare(config: TrainConfig, data: Dataset, device: torch.device) -> Run:
    """Schedule, network, its average and the optimizer, new. Raises UserError for combinations that do not fit."""
    torch.manual_seed(config.seed)
    schedule = build.schedule(config.schedule)
    objective = build.objective(config.objective, schedule, device)
    network = build.network(config.model, config.objective, data.facts).to(device)
    if config.trainer.channels_last:
        network.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    o = config.optimizer
    optimizer = OPTIMIZERS[o.name](network, lr=o.lr, betas=(o.beta_1, o.beta_2), weight_decay=o.weight_decay)
    scaler = torch.amp.GradScaler(
        device.type, enabled=precision(config.trainer.precision, device) == torch.float16
    )
    max_steps = config.trainer.max_steps
    if config.trainer.max_epochs is not None:
        max_steps = math.ceil(config.trainer.max_epochs * len(data.train.images) / config.trainer.batch_size)
    return Run(
        config,
        data.facts,
        schedule,
        objective,
        network,
        ema,
        optimizer,
        scaler,
        device,
        max_steps,
        environment(config, data, device),
        history=empty_history(schedule.num_timesteps, device),
        bad=torch.tensor([-1.0, 0.0, 0.0], device=device),
        loss_sum=torch.zeros((), device=device),
    )


def precision(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def slow_in_bf16(key: str, name: str, device: torch.device) -> str:
    """What to tell a user whose `key` asks for bf16 on a CPU that has no instructions for it; else nothing."""
    if device.type != "cpu" or precision(name, device) != torch.bfloat16:
        return ""
    asked = getattr(torch.cpu, "get_capabilities", None)  # younger than the oldest torch that will do
    if asked is None or any(asked().get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16")):
        return ""
    return f"{key}={name}: this CPU has no instructions for it; fp32 is likely to be faster"


# of the environment
DECIDES_BITS = ("torch", "device", "precision", "deterministic", "data", "processes", "group_norm")
_OWN_TO_A_MACHINE = ("data_root", "run_dir", "overwrite", "device", "dataset")  # the data itself is compared


def environment(config: TrainConfig, data: Dataset, device: torch.device) -> dict[str, str]:
    """What a run is made with. Where two runs agree in `DECIDES_BITS`, they agree in every bit."""
    cuda = device.type == "cuda"
    return {
        "ddpm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu(),
        "precision": str(precision(config.trainer.precision, device)).removeprefix("torch."),
        "deterministic": "yes" if config.trainer.deterministic or not cuda else "no",
        "data": _fingerprint(data.train, data.val),
        "group_norm": "own" if _own_group_norm(config, device) else "torch",
    }


def _own_group_norm(config: TrainConfig, device: torch.device) -> bool:
    plain = device.type == "cpu" and config.trainer.channels_last and config.trainer.compile != "true"
    return plain and config.model.name == "unet" and not group_norm.missing()


def _cpu() -> str:
    """What decides in which order a CPU adds."""
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _fingerprint(*splits: Split) -> str:
    """Of images and labels."""
    sha = hashlib.sha256()
    for split in splits:
        for tensor in (split.images, split.labels):
            sha.update(b"" if tensor is None else tensor.contiguous().numpy().data)
    return sha.hexdigest()[:16]


def save(run: Run, path: Path, record: Mapping[str, float]) -> None:
    """The run as one checkpoint file. Raises CheckpointError if it cannot be written, or is not worth writing."""
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    for what, numbers in (
        ("weights", run.network.parameters()),
        ("averaged weights", run.ema.parameters()),
        ("optimizer's moments", moments),
    ):
        if not _finite(numbers):
            raise CheckpointError(
                f"the {what} are not finite at step {run.step} (optimizer.lr={run.config.optimizer.lr:g}): "
                f"{path.name} was not written; try a smaller optimizer.lr"
            )
    tensors = {f"model.{name}": tensor for name, tensor in run.network.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in run.ema.state_dict().items()}
    for name, parameter in run.network.named_parameters():
        state = run.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    tensors |= {
        f"scaler.{key}": torch.tensor(value, dtype=torch.float64)
        for key, value in run.scaler.state_dict().items()
    }
    if run.config.objective.timesteps == "loss_aware":
        tensors["timesteps.history"] = run.history
    tensors |= {"log.loss_sum": run.loss_sum, "log.since": torch.tensor(run.since)}
    figures = {key: float(value) for key, value in record.items() if key != "step"}
    facts = {**vars(run.facts), "class_names": list(run.facts.class_names)}
    checkpoint.save(path, tensors, Meta(to_dict(run.config), facts, run.step, figures, run.environment, ""))


def _finite(numbers: Iterable[Tensor]) -> bool:
    """One look at all of them on the device: the largest magnitude shows an inf, and carries a nan along."""
    tensors = [tensor.detach() for tensor in numbers]
    largest = torch._foreach_norm(tensors, float("inf")) if tensors else [torch.zeros(())]
    return bool(torch.stack(largest).isfinite().all())


def restore(run: Run, path: Path) -> None:
    """Go on from a checkpoint. Raises CheckpointError where it is broken or does not fit the network."""
    meta, table = checkpoint.read_meta(path)
    build.check_tensors(path, table, run.network, run.schedule.num_timesteps)
    _check_complete(path, run, table)
    then, now = vars(build.facts(meta.facts)), vars(run.facts)
    if other := [f"{key} was {then[key]!r}, is {now[key]!r}" for key in now if then[key] != now[key]]:
        raise CheckpointError(f"{path} was trained on other data: {'; '.join(other)[:300]}")
    meta, tensors = checkpoint.load(path)
    build.load_weights(path, run.network, checkpoint.part(tensors, "model"))
    build.load_weights(path, run.ema, checkpoint.part(tensors, "ema"))
    for name, tensor in tensors.items():  # an empty place in the history of losses is a nan
        if name != "timesteps.history" and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} cannot be used: '{name}' holds numbers that are not finite")
        if name.startswith("optimizer.") and name.endswith((".step", ".exp_avg_sq")) and (tensor < 0).any():
            raise CheckpointError(f"{path} cannot be used: '{name}' holds numbers below 0")
    optimizer = checkpoint.part(tensors, "optimizer")
    for name, parameter in run.network.named_parameters():
        if state := checkpoint.part(optimizer, name):
            run.optimizer.state[
                parameter
            ] = {  # in the parameter's own memory layout, as the fused kernel assumes
                key: value.to(run.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in state.items()
            }
    if run.scaler.is_enabled() and (scaler := checkpoint.part(tensors, "scaler")):
        now = {"scale": float(scaler["scale"]), "_growth_tracker": int(scaler["_growth_tracker"])}
        run.scaler.load_state_dict(run.scaler.state_dict() | now)
    if history := checkpoint.part(tensors, "timesteps"):
        run.history = history["history"].to(run.device)
    if log := checkpoint.part(tensors, "log"):
        run.loss_sum, run.since = log["loss_sum"].to(run.device), min(int(log["since"]), meta.step)
    run.step = meta.step


LISTED = 6  # tensors in a note


def init_from(run: Run, ckpt: str) -> list[str]:
    """Begin with another run's averaged weights: what has the same name and shape goes into network and average.

    `ckpt` is a checkpoint file, a run folder or "latest". Returns lines for the user: where the weights are from,
    and which of the run's tensors stay as they are. Raises UserError if nothing fits, or nothing there is whole.
    """
    path, notes = checkpoint.newest_good(checkpoint.find(ckpt), check=build.examine)
    meta, tensors = checkpoint.load(path, "ema")
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
        build.load_weights(path, network, {**network.state_dict(), **fits})
    notes.append(f"begins with {len(fits)} of {len(own)} tensors from step {meta.step:,} of {path}")
    return [*notes, f"new: {listed}"] if new else notes


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def join(run: Run, world: World) -> None:
    """Make the runs of all processes one: rank 0's state for all, and gradients that are averaged over them.

    Raises UserError where they were not told the same or have other data.
    """
    if world.size == 1:
        return
    ours = {key: value for key, value in to_dict(run.config).items() if key not in _OWN_TO_A_MACHINE}
    versions = {key: run.environment[key] for key in ("data", "ddpm", "torch", "precision")}
    distributed.same(world, {**versions, **ours})
    run.world, run.environment["processes"] = world, str(world.size)
    run.step, run.since, moments, scaler = distributed.told(
        world, (run.step, run.since, bool(run.optimizer.state), run.scaler.state_dict())
    )
    run.scaler.load_state_dict(scaler)
    if moments and not world.first:
        for parameter in run.network.parameters():
            run.optimizer.state[parameter] = {
                key: torch.zeros((), device=run.device) if key == "step" else torch.empty_like(parameter)
                for key in state_names(run.optimizer, parameter)
            }
    of_optimizer = [
        run.optimizer.state[parameter][key]
        for parameter in (run.network.parameters() if moments else ())
        for key in state_names(run.optimizer, parameter)
    ]
    weights = [*run.network.state_dict().values(), *run.ema.state_dict().values()]
    distributed.spread(world, [*weights, *of_optimizer, run.history, run.loss_sum])
    run.parallel = DistributedDataParallel(
        run.network,
        device_ids=[run.device] if run.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )  # no network has buffers, which it would otherwise send around in every forward pass


def _check_complete(path: Path, run: Run, table: Mapping[str, Entry]) -> None:
    """All of the optimizer's moments or, before the first step, none; likewise the scaler's numbers."""
    moments = {
        f"optimizer.{name}.{key}"
        for name, parameter in run.network.named_parameters()
        for key in state_names(run.optimizer, parameter)
    }
    scaler = {name for name in table if name.startswith("scaler.")}
    found = {name for name in table if name.startswith("optimizer.")}
    for part, complete in (("optimizer", found in (set(), moments)), ("scaler", len(scaler) in (0, 5))):
        if not complete:
            raise CheckpointError(
                f"{path} does not fit its own config: a part of the {part}'s state is missing"
            )
