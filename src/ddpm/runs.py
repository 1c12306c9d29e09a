"""A run: all that changes while training, how it begins, and how it is kept in a checkpoint."""

import copy
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm import __version__, build, checkpoint
from ddpm.config import TrainConfig, to_dict
from ddpm.datasets.types import Dataset, Facts
from ddpm.diffusion import Objective
from ddpm.schedules import NoiseSchedule
from ddpm.timesteps import empty_history


@dataclass(eq=False)
class Run:
    """All that changes while training, and what it is made of."""

    config: TrainConfig
    facts: Facts
    schedule: NoiseSchedule
    objective: Objective
    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    device: torch.device
    max_steps: int
    history: Tensor  # of losses by t, for loss-aware timesteps
    step: int = 0


def prepare(config: TrainConfig, data: Dataset, device: torch.device) -> Run:
    """Schedule, network, its average and the optimizer, new. Raises UserError for combinations that do not fit."""
    torch.manual_seed(config.seed)
    schedule = build.schedule(config.schedule)
    objective = build.objective(config.objective, schedule, device)
    network = build.network(config.model, config.objective, data.facts).to(device)
    if config.trainer.channels_last:
        network.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    if config.trainer.compile:
        network.compile()  # in place: names of parameters stay as they are
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=o.lr, betas=(o.beta_1, o.beta_2), weight_decay=o.weight_decay, fused=True
    )
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
        empty_history(schedule.num_timesteps, device),
    )


def precision(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def save(run: Run, path: Path, record: Mapping[str, float]) -> None:
    """The run as one checkpoint file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in run.network.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in run.ema.state_dict().items()}
    for name, parameter in run.network.named_parameters():
        moments = run.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    tensors |= {
        f"scaler.{key}": torch.tensor(value, dtype=torch.float64)
        for key, value in run.scaler.state_dict().items()
    }
    if run.config.objective.timesteps == "loss_aware":
        tensors["timesteps.history"] = run.history
    figures = {key: float(value) for key, value in record.items() if key != "step"}
    config = to_dict(run.config)
    facts = {**vars(run.facts), "class_names": list(run.facts.class_names)}
    checkpoint.save(
        path, tensors, checkpoint.Meta(config, facts, run.step, figures, versions(run.device), "")
    )


def restore(run: Run, tensors: Mapping[str, Tensor], step: int) -> None:
    """Go on from a checkpoint's tensors. Raises CheckpointError where they do not fit the network."""
    build.load_weights(run.network, checkpoint.part(tensors, "model"))
    build.load_weights(run.ema, checkpoint.part(tensors, "ema"))
    optimizer = checkpoint.part(tensors, "optimizer")
    for name, parameter in run.network.named_parameters():
        state = checkpoint.part(optimizer, name)
        run.optimizer.state[
            parameter
        ] = {  # in the parameter's own memory layout, which the fused kernel takes for granted
            key: torch.empty_like(parameter).copy_(value) if key != "step" else value.to(parameter.device)
            for key, value in state.items()
        }
    if scaler := checkpoint.part(tensors, "scaler"):
        run.scaler.load_state_dict({key: value.item() for key, value in scaler.items()})
    if history := checkpoint.part(tensors, "timesteps"):
        run.history = history["history"].to(run.device)
    run.step = step


def versions(device: torch.device) -> dict[str, str]:
    """What a run was made with."""
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "ddpm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": hardware,
    }
