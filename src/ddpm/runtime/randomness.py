"""Random numbers without state: every draw is a function of (seed, stream, step, index).

Nothing has to be remembered to repeat or resume a run, switching one consumer off changes no other, and image
i gets the same numbers whatever batch or process it is in. The generator is SplitMix64 (Steele, Lea & Flood
2014, *Fast Splittable Pseudorandom Number Generators*): its output function applied twice, once to split off a
key per image and once to count through that image's numbers. It is 64-bit integer arithmetic on the tensor's own
device, so a CPU and a GPU draw the same bits. On a GPU a draw is one kernel, in randomness_triton.py.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm.networks.kernels.native import no_triton

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit; sums and products wrap around, as intended
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

# A step by its number, or by the keys of its streams: int64 tensors on the device where its numbers are drawn.
Step = int | Mapping[str, Tensor]


def key(seed: int, stream: str, step: int = 0) -> int:
    """Hash all three into a signed 64-bit number, so that neighbouring seeds share nothing."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def normal(seed: int, stream: str, step: Step, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers, float32, of shape (N, *shape) for image indices `index` (N,) int64.

    Box & Muller 1958: one 64-bit word makes two numbers. 32 bits of radius reach 6.66 standard deviations.
    """
    count = math.prod(shape)
    if kernels := _kernels(index):
        drawn: Tensor = kernels.normal(_key(seed, stream, step), index, count)
        return drawn.reshape(len(index), *shape)
    words = _words(seed, stream, step, index, (count + 1) // 2)
    radius = _shift(words, 32).add_(1).float().mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = words.bitwise_and_(0xFFFFFFFF).float().mul_(2 * math.pi * 2**-32)
    pairs = torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=1)
    return pairs[:, :count].reshape(len(index), *shape)


def uniform(seed: int, stream: str, step: Step, index: Tensor) -> Tensor:
    """Draw a number in [0, 1) for each index (N,) int64: float32 with all its 24 bits random."""
    if kernels := _kernels(index):
        drawn: Tensor = kernels.uniform(_key(seed, stream, step), index)
        return drawn
    return _shift(_words(seed, stream, step, index, 1)[:, 0], 40).float() * 2**-24


def permutation(seed: int, stream: str, step: int, n: int) -> Tensor:
    """Draw a permutation of 0 … n-1 (int64) on the CPU, so that it is the same for every device."""
    generator = torch.Generator().manual_seed(key(seed, stream, step))
    return torch.randperm(n, generator=generator)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed PyTorch's own generators of the CPU and, where it is a GPU, of `device`.

    torch.manual_seed does the same but takes 50 times as long, because it looks for every other kind of device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def code() -> str:
    """Return what decides the bits of a GPU's draws, beside torch and the GPU."""
    return "torch" if no_triton() else str(_triton().code())


def _kernels(index: Tensor) -> Any:
    """Return the module whose `normal` and `uniform` draw where `index` lies; None: PyTorch's operations do."""
    return _triton() if index.is_cuda and not no_triton() else None


def _triton() -> Any:
    from ddpm.runtime import randomness_triton  # takes half a second, for GPUs only

    return randomness_triton


def _key(seed: int, stream: str, step: Step) -> int | Tensor:
    return key(seed, stream, step) if isinstance(step, int) else step[stream]


def _words(seed: int, stream: str, step: Step, index: Tensor, count: int) -> Tensor:
    """Return `count` random 64-bit words for each image, (N, count) int64."""
    image_key = _mix((index + 1) * _GOLDEN + _key(seed, stream, step))
    return _mix(image_key[:, None] + torch.arange(1, count + 1, device=index.device) * _GOLDEN)


def _mix(z: Tensor) -> Tensor:
    z = _shift(z, 30).bitwise_xor_(z).mul_(_MIX_1)
    z = _shift(z, 27).bitwise_xor_(z).mul_(_MIX_2)
    return _shift(z, 31).bitwise_xor_(z)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right without keeping the sign, as torch's own does."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
