"""GroupNorm with a bias before it and SiLU after it, forward and backward, each one Triton kernel on a GPU.

PyTorch's GroupNorm leaves channels_last on CUDA and takes about ten kernels. Here one program computes one image:
x (N, H, W, C) in memory is read twice (moments, then result) and written once. All sums are float32.
Triton's interpreter (TRITON_INTERPRET=1) runs the same code on a CPU, for the tests.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a block: pixels times channels, padded to powers of two


@triton.jit
def _pixels(start, hw, c, g, j, groups: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """Return a block's offsets (pixels, groups, channels of a group) in its image, and a mask of those that exist."""
    p = start + tl.arange(0, block)
    channel = g[:, None] * width + j[None, :]
    real = (g[:, None] < groups) & (j[None, :] < width)
    return p[:, None, None] * c + channel[None, :, :], (p < hw)[:, None, None] & real[None, :, :]


@triton.jit
def _per_channel(pointer, image, c, g, j, groups: tl.constexpr, width: tl.constexpr):
    """Load an image's row of a table (N, C) as float32 (groups, channels of a group); image = 0 for a vector."""
    real = (g[:, None] < groups) & (j[None, :] < width)
    return tl.load(pointer + image * c + g[:, None] * width + j[None, :], mask=real, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x_pointer, extra_pointer, weight_pointer, bias_pointer, y_pointer, mean_pointer, rstd_pointer,
    hw, c, eps,
    groups: tl.constexpr, width: tl.constexpr, padded_groups: tl.constexpr, padded_width: tl.constexpr,
    block: tl.constexpr, has_extra: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    g, j = tl.arange(0, padded_groups), tl.arange(0, padded_width)
    x_pointer += image * hw * c
    y_pointer += image * hw * c
    extra = tl.zeros((padded_groups, padded_width), tl.float32)
    if has_extra:
        extra = _per_channel(extra_pointer, image, c, g, j, groups, width)
    # mean and squared deviations of the pixels so far, merged block by block (Chan, Golub & LeVeque 1983, eq. 2.1)
    mean = tl.zeros((padded_groups,), tl.float32)
    squares = tl.zeros((padded_groups,), tl.float32)
    count = 0.0
    for start in range(0, hw, block):
        at, real = _pixels(start, hw, c, g, j, groups, width, block)
        x = tl.load(x_pointer + at, mask=real, other=0.0).to(tl.float32) + extra[None, :, :]
        new = tl.minimum(hw - start, block).to(tl.float32) * width
        x = tl.where(real, x, 0.0)
        new_mean = tl.sum(tl.sum(x, axis=2), axis=0) / new
        deviation = tl.where(real, x - new_mean[None, :, None], 0.0)
        apart, total = new_mean - mean, count + new
        squares += tl.sum(tl.sum(deviation * deviation, axis=2), axis=0) + apart * apart * (
            count * new / total
        )
        mean += apart * (new / total)
        count = total
    rstd = 1.0 / tl.sqrt(squares / count + eps)
    tl.store(mean_pointer + image * groups + g, mean, mask=g < groups)
    tl.store(rstd_pointer + image * groups + g, rstd, mask=g < groups)
    factor = rstd[:, None] * _per_channel(weight_pointer, 0, c, g, j, groups, width)
    shift = _per_channel(bias_pointer, 0, c, g, j, groups, width) + (extra - mean[:, None]) * factor
    for start in range(0, hw, block):
        at, real = _pixels(start, hw, c, g, j, groups, width, block)
        x = tl.load(x_pointer + at, mask=real, other=0.0).to(tl.float32)
        z = x * factor[None, :, :] + shift[None, :, :]
        if silu:
            z = z * tl.sigmoid(z)
        tl.store(y_pointer + at, z.to(y_pointer.dtype.element_ty), mask=real)


@triton.jit
def _backward(
    dy_pointer, x_pointer, extra_pointer, weight_pointer, bias_pointer, mean_pointer, rstd_pointer,
    dx_pointer, dextra_pointer, dweight_pointer, dbias_pointer,
    hw, c,
    groups: tl.constexpr, width: tl.constexpr, padded_groups: tl.constexpr, padded_width: tl.constexpr,
    block: tl.constexpr, has_extra: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    g, j = tl.arange(0, padded_groups), tl.arange(0, padded_width)
    dy_pointer += image * hw * c
    x_pointer += image * hw * c
    dx_pointer += image * hw * c
    weight = _per_channel(weight_pointer, 0, c, g, j, groups, width)
    bias = _per_channel(bias_pointer, 0, c, g, j, groups, width)
    mean = tl.load(mean_pointer + image * groups + g, mask=g < groups, other=0.0)
    rstd = tl.load(rstd_pointer + image * groups + g, mask=g < groups, other=0.0)
    shift = tl.zeros((padded_groups, padded_width), tl.float32) - mean[:, None]
    if has_extra:
        shift += _per_channel(extra_pointer, image, c, g, j, groups, width)
    # with xhat = (x + extra - mean) rstd and z = weight xhat + bias, sums over pixels of dz, dz xhat and xhat
    sum_dz = tl.zeros((padded_groups, padded_width), tl.float32)
    sum_dz_xhat = tl.zeros((padded_groups, padded_width), tl.float32)
    sum_xhat = tl.zeros((padded_groups, padded_width), tl.float32)
    for start in range(0, hw, block):
        at, real = _pixels(start, hw, c, g, j, groups, width, block)
        x = tl.load(x_pointer + at, mask=real, other=0.0).to(tl.float32)
        dz = tl.load(dy_pointer + at, mask=real, other=0.0).to(tl.float32)
        xhat = tl.where(real, (x + shift[None, :, :]) * rstd[None, :, None], 0.0)
        if silu:
            z = xhat * weight[None, :, :] + bias[None, :, :]
            gate = tl.sigmoid(z)
            dz = dz * gate * (1.0 + z * (1.0 - gate))
        sum_dz += tl.sum(dz, axis=0)
        sum_dz_xhat += tl.sum(dz * xhat, axis=0)
        sum_xhat += tl.sum(xhat, axis=0)
    place = image * c + g[:, None] * width + j[None, :]
    exists = (g[:, None] < groups) & (j[None, :] < width)
    tl.store(dbias_pointer + place, sum_dz, mask=exists)
    tl.store(dweight_pointer + place, sum_dz_xhat, mask=exists)
    per_number = 1.0 / (hw * width)
    from_mean = tl.sum(sum_dz * weight, axis=1) * per_number
    from_rstd = tl.sum(sum_dz_xhat * weight, axis=1) * per_number
    if has_extra:
        gradient = sum_dz * weight - hw * from_mean[:, None] - sum_xhat * from_rstd[:, None]
        tl.store(dextra_pointer + place, rstd[:, None] * gradient, mask=exists)
    for start in range(0, hw, block):
        at, real = _pixels(start, hw, c, g, j, groups, width, block)
        x = tl.load(x_pointer + at, mask=real, other=0.0).to(tl.float32)
        dz = tl.load(dy_pointer + at, mask=real, other=0.0).to(tl.float32)
        xhat = (x + shift[None, :, :]) * rstd[None, :, None]
        if silu:
            z = xhat * weight[None, :, :] + bias[None, :, :]
            gate = tl.sigmoid(z)
            dz = dz * gate * (1.0 + z * (1.0 - gate))
        dx = rstd[None, :, None] * (
            dz * weight[None, :, :] - from_mean[None, :, None] - xhat * from_rstd[None, :, None]
        )
        tl.store(dx_pointer + at, dx.to(dx_pointer.dtype.element_ty), mask=real)


def code() -> str:
    """Return what decides the bits of the kernels beside the GPU: Triton's version, and a hash of this file."""
    return f"triton {triton.__version__}, code {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"


def forward(
    x: Tensor, extra: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y like x (N, C, H, W) in channels_last, mean and 1 / std (N, groups); extra is (N, C) or None."""
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(n, groups, dtype=torch.float32) for _ in range(2))
    shapes = _shapes(c, groups)
    _forward[(n,)](
        x, x if extra is None else extra, weight, bias, y, mean, rstd, h * w, c, eps,
        has_extra=extra is not None, silu=silu, **shapes,
    )  # fmt: skip
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
    dextra, dweight, dbias = (x.new_empty(n, c, dtype=torch.float32) for _ in range(3))
    _backward[(n,)](
        dy, x, x if extra is None else extra, weight, bias, mean, rstd, dx, dextra, dweight, dbias, h * w, c,
        has_extra=extra is not None, silu=silu, **_shapes(c, mean.shape[1]),
    )  # fmt: skip
    return dx, dextra, dweight, dbias


def _shapes(c: int, groups: int) -> dict[str, Any]:
    width = c // groups
    padded_groups, padded_width = triton.next_power_of_2(groups), triton.next_power_of_2(width)
    block = max(1, ELEMENTS // (padded_groups * padded_width))
    return {
        "groups": groups,
        "width": width,
        "padded_groups": padded_groups,
        "padded_width": padded_width,
        "block": block,
        "num_warps": 8,
    }
