"""GroupNorm (Wu & He 2018) with what comes before and after it in a U-Net: a bias of each image, and SiLU.

On a CPU, in channels_last, all of it is one pass over memory in C (group_norm.c, by native.py): PyTorch takes five
passes, and two more in bf16, whose GroupNorm it is slower in than in float32. Elsewhere PyTorch's own operations.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm.networks.kernels import native


def normed(norm: nn.GroupNorm, x: Tensor, extra: Tensor | None = None, *, silu: bool = True) -> Tensor:
    """SiLU (unless told not to) of `norm` of x (N, C, H, W) + extra (N, C), in the dtype of x.

    In float32 whatever x is: under autocast, x comes in bf16 and the weights of `norm` are float32.
    """
    if _fits(norm, x, extra):
        result: Tensor = _GroupNorm.apply(
            x,
            None if extra is None else extra.float().contiguous(),
            norm.weight,
            norm.bias,
            norm.num_groups,
            norm.eps,
            silu,
        )
        return result
    if extra is not None:
        x = x + extra[:, :, None, None]
    h: Tensor = norm(x.to(norm.weight.dtype)).to(x.dtype)
    return F.silu(h) if silu else h


def missing() -> str:
    """Why `normed` takes PyTorch's operations on a CPU; empty where our own code runs."""
    found = _functions()
    return found if isinstance(found, str) else ""


def _fits(norm: nn.GroupNorm, x: Tensor, extra: Tensor | None) -> bool:
    """Whether C may see all of this: it takes every address and size at its word."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and x.ndim == 4
        and x.shape[1] == norm.num_channels
        and x.is_contiguous(memory_format=torch.channels_last)
        and (extra is None or (extra.device == x.device and extra.shape == x.shape[:2]))
        and all(
            p is not None and p.device == x.device and p.dtype == torch.float32 and p.is_contiguous()
            for p in (norm.weight, norm.bias)
        )
        and not torch.compiler.is_compiling()
        and not missing()
    )


@cache
def _functions() -> tuple[Any, Any] | str:
    """The two compiled functions, or why there are none."""
    try:
        library = native.library(Path(__file__).with_suffix(".c"))
    except native.Unavailable as reason:
        return str(reason)
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    forward, backward = library.group_norm_forward, library.group_norm_backward
    forward.argtypes = [pointer] * 7 + [size] * 4 + [ctypes.c_float] + [number] * 3
    backward.argtypes = [pointer] * 11 + [size] * 4 + [number] * 3
    return forward, backward


def _call(function: Any, tensors: list[Tensor | None], *numbers: float) -> None:
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if function(*addresses, *numbers, torch.get_num_threads()):
        raise MemoryError("not enough memory for GroupNorm")


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        extra: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        n, c, h, w = x.shape
        y, mean, rstd = (
            torch.empty_like(x),
            x.new_empty(n, groups, dtype=torch.float32),
            x.new_empty(n, groups, dtype=torch.float32),
        )
        half = x.dtype == torch.bfloat16
        _call(_functions()[0], [x, extra, weight, bias, y, mean, rstd], n, h * w, c, groups, eps, half, silu)
        ctx.save_for_backward(x, extra, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, extra, weight, bias, mean, rstd = ctx.saved_tensors
        n, c, h, w = x.shape
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dextra, dweight, dbias = (weight.new_empty(n, c) for _ in range(3))
        _call(
            _functions()[1],
            [dy, x, extra, weight, bias, mean, rstd, dx, None if extra is None else dextra, dweight, dbias],
            n,
            h * w,
            c,
            mean.shape[1],
            x.dtype == torch.bfloat16,
            ctx.silu,
        )
        return dx, None if extra is None else dextra, dweight.sum(0), dbias.sum(0), None, None, None
