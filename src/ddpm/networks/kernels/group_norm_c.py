"""GroupNorm on a CPU: call the functions of group_norm.c, which native.py compiles.

`forward` and `backward` have the arguments and results of those in group_norm_triton.py. They do not check addresses
and sizes: tensors must have passed `group_norm._fits`.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.networks.kernels import native


def missing() -> str:
    """Return why the compiled functions are not available, or an empty text."""
    found = _functions()
    return found if isinstance(found, str) else ""


def code() -> str:
    """Return what decides the bits of the compiled functions: compiler and hash of the code."""
    return str(_functions()[2])


def forward(
    x: Tensor, extra: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, shaped like x (N, C, H, W), and float32 mean and 1 / std, (N, groups) each.

    extra is (N, C) or None; weight and bias are (C,) float32.
    """
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(n, groups, dtype=torch.float32) for _ in range(2))
    half = x.dtype == torch.bfloat16
    _call(_functions()[0], [x, extra, weight, bias, y, mean, rstd], n, h * w, c, groups, eps, half, silu)
    return y, mean, rstd


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
    """Return the gradients of x (N, C, H, W) and, for each image (N, C), of extra, weight and bias."""
    n, c, h, w = x.shape
    dx = torch.empty_like(x)
    dextra, dweight, dbias = (weight.new_empty(n, c) for _ in range(3))
    results = [dx, None if extra is None else dextra, dweight, dbias]
    half = x.dtype == torch.bfloat16
    tensors = [dy, x, extra, weight, bias, mean, rstd, *results]
    _call(_functions()[1], tensors, n, h * w, c, mean.shape[1], half, silu)
    return dx, dextra, dweight, dbias


@cache
def _functions() -> tuple[Any, Any, str] | str:
    """Return the two C functions and what decides their bits, or why there are none."""
    try:
        library, code = native.library(Path(__file__).with_name("group_norm.c"))
    except native.Unavailable as reason:
        return str(reason)
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    forward, backward = library.group_norm_forward, library.group_norm_backward
    forward.argtypes = [pointer] * 7 + [size] * 4 + [ctypes.c_float] + [number] * 3
    backward.argtypes = [pointer] * 11 + [size] * 4 + [number] * 3
    return forward, backward, code


def _call(function: Any, tensors: list[Tensor | None], *numbers: float) -> None:
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if function(*addresses, *numbers, torch.get_num_threads()):
        raise MemoryError("not enough memory for GroupNorm")
