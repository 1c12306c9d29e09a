"""The Triton kernels of GroupNorm, by Triton's interpreter on the CPU, beside float64: status 0 where they agree."""

import itertools

import torch
from torch import Tensor

from ddpm.networks.kernels import group_norm_triton as kernels
from tests.networks.test_group_norm import far, gradients, inputs, reference

SHAPES = [(2, 8, 9, 7, 2), (2, 24, 5, 5, 8), (3, 12, 3, 1, 4), (1, 6, 1, 1, 3)]


def main() -> None:
    for case in itertools.product((torch.float32, torch.bfloat16), (True, False), SHAPES):
        print(*case)
        compare(*case)


def compare(dtype: torch.dtype, silu: bool, shape: tuple[int, ...]) -> None:
    close = 4e-6 if dtype == torch.float32 else 2**-7
    for offset in (0.0, 50.0 if dtype == torch.float32 else 0.0):
        x, extra, dy, norm = inputs(shape, dtype, offset)
        for given in (extra, None):
            check(x, given, dy, norm, silu, close * (1 + offset))


def check(
    x: Tensor, extra: Tensor | None, dy: Tensor, norm: torch.nn.GroupNorm, silu: bool, close: float
) -> None:
    """Compare, relative to the largest value; the gradients of x and extra relative to what they are a difference of.

    Of two numbers in a group, 1 - xhat^2 = eps / (variance + eps) of the gradient is left: some 1e-6 of terms near 1,
    of which no float32 keeps more than a digit, PyTorch's own GroupNorm neither.
    """
    leaves = [x, norm.weight, norm.bias, *([] if extra is None else [extra])]
    wanted = reference(x, extra, norm, silu)
    exact = gradients(wanted, dy, *leaves)
    own = None if extra is None else extra.detach().float()
    weight, bias = norm.weight.detach(), norm.bias.detach()
    with torch.no_grad():
        y, mean, rstd = kernels.forward(x, own, weight, bias, norm.num_groups, norm.eps, silu)
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dextra, dweight, dbias = kernels.backward(dy, x, own, weight, bias, mean, rstd, silu)
    assert y.dtype == dx.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    found = [y, dx, dweight.sum(0), dbias.sum(0), *([] if extra is None else [dextra])]
    terms = float((rstd.max() * dy.abs().max() * weight.abs().max()).detach())
    for name, a, b in zip(("y", "x", "weight", "bias", "extra"), found, [wanted, *exact], strict=False):
        cancels = name in ("x", "extra") and x.numel() == 2 * rstd.numel()
        error = float((a.double() - b).abs().max()) / terms if cancels else far(a.double(), b)
        assert error < close, f"{name}: {error}"


main()
