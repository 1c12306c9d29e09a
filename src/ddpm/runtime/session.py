"""Open a session: choose a device, join the processes, set up torch's arithmetic."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from ddpm.runtime import device as devices
from ddpm.runtime import distributed, gpu_locks, memory
from ddpm.runtime.console import tell
from ddpm.runtime.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """This process: which of how many it is, and its device."""

    world: World
    device: torch.device

    def rank_zero_first(self, make: Callable[[], T]) -> T:
        """Call `make` in one process on each machine, then in the others. Raises UserError in all."""
        return distributed.rank_zero_first(self.world, make)

    def raise_on_all_ranks(self) -> AbstractContextManager[None]:
        """Raise the same UserError in all processes where the block goes wrong in one of them."""
        return distributed.raise_on_all_ranks(self.world)


@contextmanager
def open_session(
    world: World, device: str, *, gpus: str | None, sharing: int, deterministic: bool, tf32: bool
) -> Iterator[Session]:
    """Set up torch, lock a GPU if `gpus` names some, and join the other processes. Raises UserError.

    At most `sharing` processes lock one GPU; the lock is held until the process ends and its memory is free.
    """
    memory.keep_freed()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    devices.set_up_cuda(tf32=tf32)
    # only where it is a change: to set it imports the compiler, which takes a second
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    lock = gpu_locks.take(gpus, device, sharing, tell)
    chosen = devices.device(lock.device if lock else device, world)
    with distributed.process_group(world, chosen):
        yield Session(world, chosen)
