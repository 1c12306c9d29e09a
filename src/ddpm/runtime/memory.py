"""Memory: keep what was freed, recognize out-of-memory errors, estimate the batch that fits."""

import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ddpm.errors import UserError

T = TypeVar("T")

SPARE = 0.9  # of the free memory, as allocators need some air
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error means out of memory, of the GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = [
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "ALLOC_FAILED",
        "unable to find an engine",  # cuDNN's way to say that there is no room for its workspace
        "Unable to find a valid cuDNN algorithm",
    ]
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)


def in_batches(
    run: Callable[[Tensor], T],
    index: Tensor,
    size: int,
    device: torch.device,
    halved: Callable[[int, int], object] = lambda left, size: None,
) -> list[T]:
    """Return `run` of each `size` numbers of `index` (n,); halve `size` when memory ends.

    `halved` gets how many numbers are left and the new size. Raises UserError if memory ends with a size of 1.
    """
    results, done = list[T](), 0
    while done < len(index):
        batch = index[done : done + size]
        try:
            results.append(run(batch))
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
        else:
            done += len(batch)
            continue
        # Outside the except block: the error refers to the frames that hold the memory.
        if len(batch) == 1:
            raise UserError(f"out of memory on {device}, even for 1 image at a time")
        size = len(batch) // 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
        halved(len(index) - done, size)
    return results


def largest_batch(peak: Callable[[int], int], free: int, failed: int) -> int | None:
    """Estimate how many images fit into `free` bytes: fewer than the `failed` that did not. None if not even one.

    `peak(n)` runs n images and returns the bytes they took at most. The need is taken for a straight line through
    n = 1 and n = 4. Where that line says that what failed would have fitted, the answer is half of it.
    """
    if failed <= 1:
        return None
    try:
        one, four = peak(1), peak(4)
    except (RuntimeError, MemoryError) as error:
        if is_exhausted(error):
            return None
        raise
    each = max((four - one) / 3, 1)
    fits = max(1, int(1 + (SPARE * free - one) / each))
    return fits if fits < failed else failed // 2


def peak_on_gpu(step: Callable[[int], object], device: torch.device) -> Callable[[int], int]:
    """Return `peak` for `largest_batch`: the bytes that `step(n)` allocates at most beyond those allocated before."""

    def peak(n: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(n)
        return torch.cuda.max_memory_allocated(device) - before

    return peak


def keep_freed() -> bool:
    """Make glibc malloc keep freed memory for reuse. Return False on other allocators.

    Every step on a CPU takes and frees the same hundreds of megabytes. glibc returns them to the kernel each time,
    which then clears every page anew: an eighth of a training step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    raised = any(
        mallopt(M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)
    )  # not every glibc takes the first
    return raised and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
