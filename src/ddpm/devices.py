"""PyTorch's global switches for CUDA: the precision of float32 arithmetic, and which attention kernels may run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_up_cuda(*, tf32: bool = False) -> None:
    """Choose one precision for all float32 arithmetic of this process, and leave out cuDNN's attention kernels.

    By default PyTorch computes float32 convolutions in TF32 and matrix products in IEEE float32. Here both are IEEE
    float32, or both are TF32. cuDNN's fused attention has had gradients that are NaN; PyTorch's own kernels suffice.
    """
    _set_float32("tf32" if tf32 else "ieee", "tf32" if tf32 else "ieee")
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 in IEEE arithmetic inside of the block, and restore the caller's choice after it."""
    before = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
    _set_float32("ieee", "ieee")
    try:
        yield
    finally:
        _set_float32(*before)


@contextmanager
def without_cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose by its heuristics, for batch sizes that come too seldom to be worth a search."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _set_float32(matmul: str, convolution: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.backends.cudnn.conv.fp32_precision = convolution  # type: ignore[attr-defined]
