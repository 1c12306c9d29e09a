"""Out of memory: how to tell, and what would have fitted."""

from collections.abc import Callable

import torch

SPARE = 0.9  # of the free memory, as allocators need some air


def is_exhausted(error: BaseException) -> bool:
    """Whether an error means that memory, of the GPU or of the machine, has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)


def largest_batch(peak: Callable[[int], int], free: int, limit: int) -> int | None:
    """How many images fit into `free` bytes, from the peak that two small batches need; None if not even one.

    `peak(n)` runs n images and returns the bytes they took at most. The need is taken for a straight line in n.
    """
    try:
        one, four = peak(1), peak(4)
    except (RuntimeError, MemoryError) as error:
        if is_exhausted(error):
            return None
        raise
    each = max((four - one) / 3, 1)
    return max(1, min(limit, int(1 + (SPARE * free - one) / each)))


def peak_on_gpu(step: Callable[[int], object], device: torch.device) -> Callable[[int], int]:
    """`peak` for `largest_batch`: the bytes that a call of `step` takes beyond what is taken already."""

    def peak(n: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(n)
        return torch.cuda.max_memory_allocated(device) - before

    return peak
