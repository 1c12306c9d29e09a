"""Set up a training: new, from another run's weights, or from a checkpoint to resume; the same in all processes."""

from pathlib import Path

from ddpm.config.schema import TrainConfig
from ddpm.data.dataset import Dataset
from ddpm.networks import NETWORKS
from ddpm.networks.kernels import group_norm
from ddpm.runtime.device import slow_in_bf16
from ddpm.runtime.session import Session
from ddpm.train import checkpointing, environment, state
from ddpm.train.state import TrainState


def set_up(config: TrainConfig, data: Dataset, session: Session, source: Path | None) -> TrainState:
    """Return the state of a training, ready to run; `source` is rank 0's checkpoint to resume, if there is one.

    Raises UserError, in all processes, where settings, data and checkpoint do not fit.
    """
    with session.raise_on_all_ranks():
        run = state.prepare(config, data, session.device)
        run.notes += _slow(config, session)
        if source is not None:
            checkpointing.restore(run, source)
        elif session.world.first and config.trainer.init_from is not None:
            run.notes += checkpointing.init_from(run, config.trainer.init_from)
        run.environment.update(environment.commits())
    state.join(run, session.world)
    return run


def _slow(config: TrainConfig, session: Session) -> list[str]:
    """Say what makes the training slower than it could be on this machine."""
    notes = [slow_in_bf16("trainer.precision", config.trainer.precision, session.device)]
    own = getattr(NETWORKS[config.model.name], "own_group_norm", False)
    if session.device.type == "cpu" and own and (why := group_norm.missing()):
        notes.append(f"GroupNorm is PyTorch's own, and takes longer: {why}")
    return [note for note in notes if note]
