"""Several processes that train or sample as one (torch.distributed). With world.size = 1 nothing here waits.

Two process groups: the default one carries tensors on their device (NCCL between GPUs, gloo between CPUs). A second
one, always gloo, carries Python objects (errors, requests to stop), so that these never wait for a GPU.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ddpm.errors import UserError
from ddpm.io.files import reason
from ddpm.runtime.memory import is_exhausted
from ddpm.runtime.world import World

T = TypeVar("T")
WAIT = timedelta(days=1)  # for a slower rank, or one that downloads a dataset; a lost one is noticed at once
FIND = timedelta(minutes=30)  # for machines that start one after the other
_control_group: Any = None  # the gloo group for objects


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the processes as a group inside the block. Raises UserError where they do not find each other."""
    global _control_group
    if world.size == 1:
        yield
        return
    gpu = device.type == "cuda"
    try:
        if gpu:
            torch.cuda.set_device(device)
        store = _own_store(world)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            device_id=device if gpu else None,
        )
        _control_group = dist.new_group(backend="gloo", timeout=WAIT)
    except (RuntimeError, ValueError, OSError) as error:
        _leave(broken=True)
        why = str(error).partition("\n")[0]
        raise UserError(f"the {world.size} processes do not find each other: {why}") from None
    try:
        yield
    except BaseException:
        _leave(broken=True)
        raise
    _leave(broken=False)


def _own_store(world: World) -> Any:
    """Return torchrun's store under a key prefix unique to this start.

    torchrun's store survives restarts and still holds dead ranks' addresses, and no variable of torchrun numbers the
    starts alike on all machines. So each rank posts a random token; rank 0 answers every token, dead ranks' too, with
    its own random prefix, and goes on when all ranks have read it.
    """
    store, _, _ = next(iter(rendezvous("env://", world.rank, world.size)))
    own, end = secrets.token_hex(16), time.monotonic() + FIND.total_seconds()
    prefix, answered = own, set[str]()
    if not world.first:
        store.set(f"ddpm/asks/{world.rank}", own)
        _wait_until(lambda: store.check([f"ddpm/answer/{own}"]), end)
        prefix = store.get(f"ddpm/answer/{own}").decode()
        store.add(f"ddpm/came/{prefix}", 1)
        return PrefixStore(prefix, store)

    def all_came() -> bool:
        asks = [key for rank in range(1, world.size) if store.check([key := f"ddpm/asks/{rank}"])]
        for name in {store.get(key).decode() for key in asks} - answered:
            store.set(f"ddpm/answer/{name}", prefix)
            answered.add(name)
        return bool(store.add(f"ddpm/came/{prefix}", 0) == world.size - 1)

    _wait_until(all_came, end)
    return PrefixStore(prefix, store)


def _wait_until(condition: Callable[[], bool], end: float) -> None:
    """Poll in Python, so that signal handlers run. Raises RuntimeError after the time `end`."""
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"waited for {FIND} for the others")
        time.sleep(0.02)


def _leave(broken: bool) -> None:
    """Leave the group. A broken NCCL group is aborted, as `destroy_process_group` would wait for lost processes."""
    global _control_group
    _control_group = None
    if broken and dist.is_initialized() and dist.get_backend() == "nccl":
        assert dist.group.WORLD is not None
        dist.group.WORLD.abort()
    elif dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def raise_on_all_ranks(world: World) -> Iterator[None]:
    """Raise the same UserError in all processes where the block, which all run, goes wrong in one of them.

    The block itself must not wait for other processes, or they would wait for each other forever.
    """
    if world.size == 1:
        yield
        return
    wrong_here: str | None = None
    try:
        yield
    except UserError as error:
        wrong_here = str(error)
    except OSError as error:
        wrong_here = f"{reason(error)}: {error.filename or 'a file'}"
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        wrong_here = f"out of memory: {str(error).partition(chr(10))[0]}"
    messages: list[str | None] = [None] * world.size
    dist.all_gather_object(messages, wrong_here, group=_control_group)
    wrong = [rank for rank, message in enumerate(messages) if message is not None]
    if wrong:
        everywhere = wrong[0] == 0 or len(wrong) == world.size
        raise UserError(f"{messages[wrong[0]]}" if everywhere else f"rank {wrong[0]}: {messages[wrong[0]]}")


def rank_zero_first(world: World, make: Callable[[], T]) -> T:
    """Call `make` in one process on each machine, then in the others, which find what it fetched.

    Raises UserError in all processes.
    """
    made: list[T] = []
    for turn in (True, False):
        with raise_on_all_ranks(world):
            if (world.local_rank == 0) is turn:
                made.append(make())
    return made[0]


def broadcast_object(world: World, value: T) -> T:
    """Return rank 0's `value`, any object that can be pickled, in all processes."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control_group)
    return box[0]


def check_equal_on_all_ranks(world: World, what: dict[str, Any]) -> None:
    """Raises UserError, in all processes, where they differ in what must be the same: {name: value}."""
    first = broadcast_object(world, what)
    with raise_on_all_ranks(world):
        for name, value in what.items():
            if value != first[name]:
                raise UserError(f"{name} is {str(value)[:200]}, but in rank 0 {str(first[name])[:200]}")


def broadcast_tensors(world: World, tensors: Sequence[Tensor]) -> None:
    """Copy rank 0's tensors into those of all ranks, in place. They keep their memory layout."""
    if world.size == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            packed = tensor.detach().contiguous()
            dist.broadcast(packed, src=0)
            tensor.copy_(packed)


def all_gather_columns(world: World, part: Tensor, n: int) -> Tensor:
    """Return (k, n) from every rank's own (k, share): one sum of rows that are 0 elsewhere, without a CPU-GPU sync."""
    if world.size == 1:
        return part
    whole = part.new_zeros(len(part), n)
    whole[:, world.share(n)] = part
    dist.all_reduce(whole)
    return whole


def gather_to_rank_zero(world: World, part: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return on rank 0 (sum of lengths, …) from every rank's own (its length, …), on the CPU; elsewhere its part.

    Rank 0's own part must not be empty: it gives the rest of the shape.
    """
    if world.size == 1:
        return part
    part = part.contiguous()
    if not world.first:
        if len(part):
            dist.send(part, dst=0, group=_control_group)
        return part
    parts = [part, *(part.new_empty(length, *part.shape[1:]) for length in lengths[1:])]
    for rank in range(1, world.size):
        if lengths[rank]:
            dist.recv(parts[rank], src=rank, group=_control_group)
    return torch.cat(parts)


def all_reduce_max_async(world: World, numbers: Sequence[int]) -> Callable[[], list[int]]:
    """Start an all-reduce for the largest of each number over all ranks. Returns a function that waits for it."""
    if world.size == 1:
        return lambda: list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.int64)
    work: Any = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_control_group, async_op=True)

    def wait() -> list[int]:
        work.wait()
        return [int(number) for number in tensor]

    return wait


def is_lost(error: BaseException) -> bool:
    """Return whether an error means that another process of the group is gone."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "c10d"))
    )
