"""Devices: which one, and in which precision."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ddpm.errors import UserError
from ddpm.runtime.gpu_locks import cuda_number, no_such_gpu
from ddpm.runtime.world import ALONE, World


def precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that the network computes in. auto: bf16 on a GPU that has the instructions, else float32."""
    if name == "auto":
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if cuda else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


def precision_name(name: str, device: torch.device) -> str:
    """Return the precision as environment.json and the log name it. TF32 is named only where the device has it."""
    if name == "tf32" and device.type == "cuda":
        return "tf32"
    return str(precision(name, device)).removeprefix("torch.")


def slow_in_bf16(key: str, name: str, device: torch.device) -> str:
    """Return a line for a user whose `key` asks for bf16 on a CPU without instructions for it; else ""."""
    if device.type != "cpu" or precision(name, device) != torch.bfloat16:
        return ""
    asked = getattr(torch.cpu, "get_capabilities", None)  # younger than the oldest torch that will do
    if asked is None or any(asked().get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16")):
        return ""
    return f"{key}={name}: this CPU has no instructions for it; fp32 is likely to be faster"


def device(name: str, world: World = ALONE) -> torch.device:
    """Return the device a user means by auto, cpu, cuda or cuda:1. Raises UserError where there is none.

    Of several processes on a machine each takes a GPU of its own.
    """
    if world.size > 1 and name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name}: {world.size} processes: must be auto, cpu or cuda")
    number = cuda_number(name) or 0
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.size > 1:
        if count < world.local_size:
            of = f"{world.local_size} processes on a machine with {count} CUDA devices"
            raise UserError(f"device={name}: {of}: at most one process for each, or device=cpu")
        return torch.device("cuda", world.local_rank)
    if number >= count:
        raise no_such_gpu(f"device={name}", count)
    return torch.device("cuda", number)


def set_up_cuda(*, tf32: bool = False) -> None:
    """Choose one precision for all float32 arithmetic of this process, and leave out cuDNN's attention kernels.

    By default PyTorch computes float32 convolutions in TF32 and matrix products in IEEE float32. Here both are IEEE
    float32, or both are TF32. cuDNN's fused attention has had gradients that are NaN; PyTorch's own kernels suffice.
    """
    # Not the newer fp32_precision: set for convolutions alone, it makes torch.backends.cudnn.flags raise.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.enable_cudnn_sdp(False)


_lock, _inside = threading.Lock(), list[list[str]]()  # the caller's choices, for each thread that is inside


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 in IEEE arithmetic inside of the block, and restore the caller's choice after it.

    The choice is the process's: of threads that overlap, the last one out restores what the first one found.
    """
    gpu, cudnn, cpu = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    kinds: list[Any] = [gpu, cudnn.conv, cpu.matmul, cpu.conv]  # type: ignore[attr-defined]
    with _lock:
        _inside.append(_inside[0] if _inside else [kind.fp32_precision for kind in kinds])
        for kind in kinds:
            kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _lock:
            before = _inside.pop()
            for kind, choice in zip(kinds, before, strict=True) if not _inside else ():
                kind.fp32_precision = choice


@contextmanager
def own_defaults() -> Iterator[None]:
    """Leave a caller's default device and inference mode inside of the block, in this thread alone.

    A default dtype is the process's, so it is left alone: what must be float32 has to say so.
    """
    caller, cpu = torch.get_default_device(), torch.device("cpu")
    with torch.inference_mode(False), nullcontext() if caller == cpu else cpu:
        yield


@contextmanager
def without_cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose by its heuristics, for batch sizes that come too seldom to be worth a search."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
