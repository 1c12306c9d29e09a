"""Rank and world size of this process, from torchrun's environment variables. Imports no torch, to start fast."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ddpm.errors import UserError

MOST = 1 << 20  # processes


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; on its machine `local_rank` of `local_size`. The default is a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank zero, which writes files and prints."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Prefix for what only this process prints."""
        return f"rank {self.rank}: " if self.size > 1 else ""

    def share(self, n: int, rank: int | None = None) -> slice:
        """Return this rank's part of 0 … n-1 (or another's): in order, the first parts larger by at most 1."""
        rank = self.rank if rank is None else rank
        each, more = divmod(n, self.size)
        return slice(rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more))

    def lengths(self, n: int) -> list[int]:
        """Return the length of each rank's share."""
        return [len(range(n)[self.share(n, rank)]) for rank in range(self.size)]


ALONE = World()


def world(environment: Mapping[str, str] = os.environ) -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Raises UserError where they contradict each other."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return ALONE
    size = _number(environment, "WORLD_SIZE", 1, MOST)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1, size)
    rank = _number(environment, "RANK", 0, size - 1)
    return World(rank, size, _number(environment, "LOCAL_RANK", 0, local_size - 1), local_size)


def world_for_errors() -> World:
    """Return the world, or that of a single process where the environment contradicts itself."""
    try:
        return world()
    except UserError:
        return ALONE


def _number(environment: Mapping[str, str], key: str, low: int, high: int) -> int:
    text = environment.get(key, "")
    if not (text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        size = environment["WORLD_SIZE"]
        raise UserError(f"{key}={text}: must be a number from {low} to {high} where WORLD_SIZE={size}")
    return int(text)
