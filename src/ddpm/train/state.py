"""A run: all that changes while training, how it begins, and how it is kept in a checkpoint."""

import copy
import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm import build
from ddpm.config.schema import TrainConfig, to_dict
from ddpm.data.dataset import Dataset
from ddpm.data.info import DatasetInfo
from ddpm.diffusion.objective import Objective
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.timesteps import empty_history
from ddpm.runtime import distributed
from ddpm.runtime.device import precision
from ddpm.runtime.world import ALONE, World
from ddpm.train.environment import environment
from ddpm.train.optimizers import OPTIMIZERS, Optimizer, state_names


@dataclass(eq=False)
class TrainState:
    """All that changes while training, and what it is made of."""

    config: TrainConfig
    facts: DatasetInfo
    schedule: NoiseSchedule
    objective: Objective
    network: nn.Module
    ema: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    max_steps: int
    environment: dict[str, str]  # what it is trained with, for people and for the promise of equal bits
    loss_history: Tensor  # of losses by t, for loss-aware timesteps
    first_nonfinite: (
        Tensor  # step, loss and gradient norm of the first update that was not finite; step -1: none was
    )
    loss_sum: Tensor  # of the steps since the last line of metrics.jsonl,
    last_logged_step: int = 0  # which was written at this step
    step: int = 0
    notes: list[str] = field(default_factory=list)  # for the user, of how it began
    world: World = ALONE
    parallel: DistributedDataParallel | None = None  # around `network`, where several processes train it

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Those of `network`. To list them anew takes a millisecond, which every step would pay."""
        return list(self.network.parameters())

    @cached_property
    def averages(self) -> list[Tensor]:
        """The parameters of `ema`, in the same order."""
        return list(self.ema.parameters())


def prepare(config: TrainConfig, data: Dataset, device: torch.device) -> TrainState:
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
    return TrainState(
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
        loss_history=empty_history(schedule.num_timesteps, device),
        first_nonfinite=torch.tensor([-1.0, 0.0, 0.0], device=device),
        loss_sum=torch.zeros((), device=device),
    )


_OWN_TO_A_MACHINE = ("data_root", "run_dir", "overwrite", "device", "dataset")  # the data itself is compared


def join(run: TrainState, world: World) -> None:
    """Make the runs of all processes one: rank 0's state for all, and gradients that are averaged over them.

    Raises UserError where they were not told the same or have other data.
    """
    if world.size == 1:
        return
    ours = {key: value for key, value in to_dict(run.config).items() if key not in _OWN_TO_A_MACHINE}
    versions = {key: run.environment[key] for key in ("data", "ddpm", "torch", "precision")}
    distributed.check_equal_on_all_ranks(world, {**versions, **ours})
    run.world, run.environment["processes"] = world, str(world.size)
    run.step, run.last_logged_step, moments, scaler = distributed.broadcast_object(
        world, (run.step, run.last_logged_step, bool(run.optimizer.state), run.scaler.state_dict())
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
    distributed.broadcast_tensors(world, [*weights, *of_optimizer, run.loss_history, run.loss_sum])
    run.parallel = DistributedDataParallel(
        run.network,
        device_ids=[run.device] if run.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )  # no network has buffers, which it would otherwise send around in every forward pass
