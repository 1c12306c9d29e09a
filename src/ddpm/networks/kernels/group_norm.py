"""GroupNorm (Wu & He 2018) with what surrounds it in a U-Net: a bias of each image before it, SiLU after it.

In channels_last all of it is one kernel: in C on a CPU (group_norm_c.py), in Triton on a GPU (group_norm_triton.py).
PyTorch takes five passes over memory on a CPU, seven in bf16; on a GPU its GroupNorm also leaves channels_last.
Where no kernel fits, `plain` computes the same with PyTorch's operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm.networks.kernels import group_norm_c
from ddpm.networks.kernels.native import no_triton


def normed(norm: nn.GroupNorm, x: Tensor, extra: Tensor | None = None, *, silu: bool = True) -> Tensor:
    """Return `norm` of x (N, C, H, W) + extra (N, C), with SiLU unless `silu` is false, in the dtype of x.

    Computed in float32 whatever x is: under autocast, x comes in bf16 and the weights of `norm` are float32.
    """
    if not _fits(norm, x, extra):
        return plain(norm, x, extra, silu=silu)
    extra = None if extra is None else extra.float().contiguous()
    result: Tensor = _GroupNorm.apply(x, extra, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    return result


def plain(norm: nn.GroupNorm, x: Tensor, extra: Tensor | None = None, *, silu: bool = True) -> Tensor:
    """Compute `normed` with PyTorch's own operations, on any device and in any memory layout."""
    if extra is not None:
        x = x + extra[:, :, None, None]
    h: Tensor = norm(x.to(norm.weight.dtype)).to(x.dtype)
    return F.silu(h) if silu else h


def missing(device_type: str = "cpu") -> str:
    """Return why `normed` takes PyTorch's operations on "cpu" or "cuda"; empty where a kernel runs."""
    return no_triton() if device_type == "cuda" else group_norm_c.missing()


def code(device_type: str) -> str:
    """Return what decides the bits of the kernel on "cpu" or "cuda", which must not be missing: compiler, code."""
    return str(_kernels(device_type).code())


def _fits(norm: nn.GroupNorm, x: Tensor, extra: Tensor | None) -> bool:
    """Return whether a kernel can run on these tensors. The kernels check no address and no size."""
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
        y, mean, rstd = _kernels(x.device.type).forward(x, extra, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, extra, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, extra, weight, bias, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dextra, dweight, dbias = _kernels(x.device.type).backward(
            dy, x, extra, weight, bias, mean, rstd, ctx.silu
        )
        return dx, None if extra is None else dextra, dweight.sum(0), dbias.sum(0), None, None, None


def _kernels(device_type: str) -> Any:
    """Return the module whose `forward` and `backward` run on "cpu" or "cuda"."""
    if device_type == "cuda":
        from ddpm.networks.kernels import group_norm_triton  # takes half a second, for GPUs only

        return group_norm_triton
    return group_norm_c
