"""What the machine can do: the most GFLOP/s that plain PyTorch gets out of it. A multiply-add counts as 2 FLOP.

    python benchmarks/peaks.py --batch-size 128

Convolutions are 3×3 as in unet_small, channels-last, forward and backward, in float32 and bf16; on a GPU also a
product of two bf16 matrices of 8192×8192. The best of a few tries each, so that a share of it is rather too small.
"""

import argparse
import json
from collections.abc import Callable

import torch
from timing import seconds
from torch import nn

from ddpm.runtime import memory

CONVOLUTIONS = [  # channels in, out, image size
    (32, 32, 28),
    (64, 32, 28),
    (96, 32, 28),
    (32, 64, 14),
    (64, 64, 14),
    (128, 64, 14),
    (64, 64, 7),
    (128, 64, 7),
]
MATRIX = 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRIES, CALLS = 3, 5  # calls a try, so that a GPU is kept busy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    memory.keep_freed()
    device = torch.device(options.device)
    found = {
        name: max(convolution(*sizes, options.batch_size, dtype, device) for sizes in CONVOLUTIONS)
        for name, dtype in DTYPES.items()
    }
    print(json.dumps(found | ({"matrices": matrices(device)} if device.type == "cuda" else {})))


def convolution(
    channels_in: int, channels_out: int, size: int, batch_size: int, dtype: torch.dtype, device: torch.device
) -> float:
    """GFLOP/s, forward and backward: the gradients of inputs and weights each take as many FLOP as the output."""
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    layer.to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch_size, channels_in, size, size, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(layer(x))

    def work() -> None:
        for _ in range(CALLS):
            torch.autograd.grad(layer(x), [x, layer.weight], gradient)

    flop = 3 * 2 * 9 * channels_in * channels_out * size**2 * batch_size
    return _best(work, device, CALLS * flop)


def matrices(device: torch.device) -> float:
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(CALLS):
            a @ b

    return _best(work, device, CALLS * 2 * MATRIX**3)


def _best(work: Callable[[], None], device: torch.device, flop: int) -> float:
    seconds(work, device)  # warm-up
    return flop / min(seconds(work, device) for _ in range(TRIES)) / 1e9


if __name__ == "__main__":
    main()
