"""The numbers of randomness.py on a GPU, each draw one Triton kernel; PyTorch's operations take 32 to 44.

The words are the same integers, and so are uniform numbers bit for bit. Normal ones are apart by the rounding of log,
sin and cos in float32, which differ between a CPU and a GPU already.
Triton's interpreter (TRITON_INTERPRET=1) runs the same code on a CPU, for the tests.
"""

import hashlib
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # words of a program

_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MIX_1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MIX_2: tl.constexpr = tl.constexpr(0x94D049BB133111EB - 2**64)
_ANGLE: tl.constexpr = tl.constexpr(6.283185307179586 * 2.0**-32)


@triton.jit
def _mix(z):
    z = (((z >> 30) & 0x3FFFFFFFF) ^ z) * _MIX_1
    z = (((z >> 27) & 0x1FFFFFFFFF) ^ z) * _MIX_2
    return ((z >> 31) & 0x1FFFFFFFF) ^ z


@triton.jit
def _words(key, index_pointer, image, at, from_table: tl.constexpr):
    """Return the random words `at` (counted from 0) of the images at `image` of the indices."""
    if from_table:
        key = tl.load(key)
    return _mix(_mix((tl.load(index_pointer + image) + 1) * _GOLDEN + key) + (at + 1).to(tl.int64) * _GOLDEN)


@triton.jit(do_not_specialize=["key"])
def _normal(out_pointer, key, index_pointer, count, half, from_table: tl.constexpr, block: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    words = _words(key, index_pointer, image, at, from_table)
    radius = tl.sqrt_rn(tl.log((((words >> 32) & 0xFFFFFFFF) + 1).to(tl.float32) * (2.0**-32)) * -2.0)
    angle = (words & 0xFFFFFFFF).to(tl.float32) * _ANGLE
    out_pointer += image * count
    tl.store(out_pointer + at, tl.cos(angle) * radius, mask=at < half)
    tl.store(out_pointer + half + at, tl.sin(angle) * radius, mask=at < count - half)


@triton.jit(do_not_specialize=["key"])
def _uniform(out_pointer, key, index_pointer, n, from_table: tl.constexpr, block: tl.constexpr):
    image = tl.program_id(0) * block + tl.arange(0, block)
    real = image < n
    words = _words(key, index_pointer, tl.where(real, image, 0), tl.zeros((block,), tl.int32), from_table)
    tl.store(out_pointer + image, ((words >> 40) & 0xFFFFFF).to(tl.float32) * (2.0**-24), mask=real)


def code() -> str:
    """Return what decides the bits beside the GPU: Triton's version, and a hash of this file."""
    return f"triton {triton.__version__}, code {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"


def normal(key: int | Tensor, index: Tensor, count: int) -> Tensor:
    """Draw (N, count) float32 for the key of a stream, a number or a 0-dim int64 tensor, and indices (N,) int64."""
    out = torch.empty(len(index), count, device=index.device, dtype=torch.float32)
    half = (count + 1) // 2
    grid, table = (len(index), triton.cdiv(half, BLOCK)), isinstance(key, Tensor)
    _normal[grid](out, key, index.contiguous(), count, half, from_table=table, block=BLOCK)
    return out


def uniform(key: int | Tensor, index: Tensor) -> Tensor:
    """Draw (N,) float32 in [0, 1), as `normal`."""
    out = torch.empty(len(index), device=index.device, dtype=torch.float32)
    grid, table = (triton.cdiv(len(index), BLOCK),), isinstance(key, Tensor)
    _uniform[grid](out, key, index.contiguous(), len(index), from_table=table, block=BLOCK)
    return out
