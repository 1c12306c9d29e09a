"""GroupNorm (Wu & He 2018) with what comes before and after it in a U-Net: a bias of each image, and SiLU.

In channels_last all of it is one kernel: in C on a CPU (group_norm.c, by native.py), in Triton on a GPU
(group_norm_triton.py). PyTorch takes five passes over memory on a CPU, two more in bf16, and on a GPU it leaves
channels_last besides. Elsewhere, and where a kernel cannot be had, PyTorch's own operations.
"""

import ctypes
import os
from functools import cache
from importlib.util import find_spec
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


def missing(device_type: str = "cpu") -> str:
    """Why `normed` takes PyTorch's operations on such a device; empty where a kernel of our own runs."""
    if device_type == "cuda":
        return _no_triton()
    found = _functions()
    return found if isinstance(found, str) else ""


@cache
def _no_triton() -> str:
    if os.environ.get("DDPM_NATIVE") == "0":
        return "DDPM_NATIVE=0"
    return "" if find_spec("triton") else "triton is not installed"


def _fits(norm: nn.GroupNorm, x: Tensor, extra: Tensor | None) -> bool:
    """Whether a kernel may see all of this: it takes every address and size at its word."""
    return (
        x.device.type in ("cpu", "cuda")
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
        and not missing(x.device.type)
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
        y: Tensor
        y, mean, rstd = _kernels(x).forward(x, extra, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, extra, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, extra, weight, bias, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dextra, dweight, dbias = _kernels(x).backward(dy, x, extra, weight, bias, mean, rstd, ctx.silu)
        return dx, None if extra is None else dextra, dweight.sum(0), dbias.sum(0), None, None, None


def _kernels(x: Tensor) -> Any:
    """What has `forward` and `backward` for the device of x."""
    if x.device.type == "cuda":
        from ddpm.networks.kernels import group_norm_triton  # takes half a second, and is nowhere else needed

        return group_norm_triton
    return _C


class _C:
    """The functions in group_norm.c, with the arguments and results of group_norm_triton.py."""

    @staticmethod
    def forward(
        x: Tensor, extra: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, c, h, w = x.shape
        y = torch.empty_like(x)
        mean, rstd = (x.new_empty(n, groups, dtype=torch.float32) for _ in range(2))
        half = x.dtype == torch.bfloat16
        _call(_functions()[0], [x, extra, weight, bias, y, mean, rstd], n, h * w, c, groups, eps, half, silu)
        return y, mean, rstd

    @staticmethod
    def backward(
        dy: Tensor,
        x: Tensor,
        extra: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        rstd: Tensor,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, c, h, w = x.shape
        dx = torch.empty_like(x)
        dextra, dweight, dbias = (weight.new_empty(n, c) for _ in range(3))
        tensors = [
            dy,
            x,
            extra,
            weight,
            bias,
            mean,
            rstd,
            dx,
            None if extra is None else dextra,
            dweight,
            dbias,
        ]
        half = x.dtype == torch.bfloat16
        _call(_functions()[1], tensors, n, h * w, c, mean.shape[1], half, silu)
        return dx, dextra, dweight, dbias
