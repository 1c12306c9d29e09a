"""PyTorch's global switches for CUDA: the precision of float32 arithmetic, and which attention kernels may run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_up_cuda(*, tf32: bool = False) -> None:
    """Choose one precision for all float32 arithmetic of this process, and leave out cuDNN's attention kernels.

    By default PyTorch computes float32 convolutions in TF32 and matrix products in IEEE float32. Here both are IEEE
    float32, or both are TF32. cuDNN's fused attention has had gradients that are NaN; PyTorch's own kernels suffice.
    """
    # Not the newer fp32_precision: set for convolutions alone, it makes torch.backends.cudnn.flags raise.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 in IEEE arithmetic inside of the block, and restore the caller's choice after it."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = (matmul.fp32_precision, convolution.fp32_precision)
    matmul.fp32_precision = convolution.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before


@contextmanager
def without_cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose by its heuristics, for batch sizes that come too seldom to be worth a search."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
