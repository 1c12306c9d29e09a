"""Hold a split on the device, and compute the batch of any step from (seed, step) alone."""

from functools import lru_cache

import torch
from torch import Tensor

from ddpm.data.dataset import Split
from ddpm.io.images import normalise
from ddpm.runtime.randomness import permutation


class Batches:
    """Batches of a split that is held as uint8 on `device`.

    Batch k holds positions k B … (k + 1) B - 1 of an endless sequence of epochs, each with its own permutation. So
    training resumes within an epoch without stored state, and no image is dropped at the end of an epoch.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, device: torch.device) -> None:
        self.images = split.images.to(device)
        self.labels = None if split.labels is None else split.labels.to(device)
        self.batch_size, self.seed = batch_size, seed
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def batch(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Return x_0 (B, C, H, W) float32 in [-1, 1] and labels (B,) int64 or None."""
        chosen = self.positions(k * self.batch_size, (k + 1) * self.batch_size)
        return normalise(self.images[chosen]), None if self.labels is None else self.labels[chosen]

    def positions(self, start: int, stop: int) -> Tensor:
        """Return the images' indices at positions start … stop - 1 of the sequence, (stop - start,) int64."""
        n, parts = len(self.images), []
        while start < stop:
            epoch, offset = divmod(start, n)
            parts.append(self._order(epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _draw_order(self, epoch: int) -> Tensor:
        order = permutation(self.seed, "order", epoch, len(self.images))
        if self.images.is_cuda:  # from pageable memory the copy would wait for the GPU's queued work
            order = order.pin_memory()
        return order.to(self.images.device, non_blocking=True)
