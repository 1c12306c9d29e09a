"""Devices: which one, and in which precision."""

import torch

from ddpm.errors import UserError
from ddpm.runtime.world import ALONE, World


def precision(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def slow_in_bf16(key: str, name: str, device: torch.device) -> str:
    """What to tell a user whose `key` asks for bf16 on a CPU that has no instructions for it; else nothing."""
    if device.type != "cpu" or precision(name, device) != torch.bfloat16:
        return ""
    asked = getattr(torch.cpu, "get_capabilities", None)  # younger than the oldest torch that will do
    if asked is None or any(asked().get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16")):
        return ""
    return f"{key}={name}: this CPU has no instructions for it; fp32 is likely to be faster"


def device(name: str, world: World = ALONE) -> torch.device:
    """The device a user means by auto, cpu, cuda or cuda:1. Raises UserError where there is none.

    Of several processes on a machine each takes a GPU of its own.
    """
    if world.size > 1 and name in ("auto", "cuda") and (name == "cuda" or torch.cuda.is_available()):
        if (count := torch.cuda.device_count()) < world.local_size:
            raise UserError(
                f"device={name}: {world.local_size} processes on a machine with {count} CUDA devices: one process "
                "for each device (torchrun --nproc-per-node), or device=cpu"
            )
        return torch.device("cuda", world.local_rank)
    if world.size > 1 and name not in ("auto", "cpu"):
        raise UserError(
            f"device={name}: {world.size} processes: must be auto, cpu or cuda, one device for each"
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or (":" in name and not number):
        raise UserError(f"device={name}: must be auto, cpu, cuda or cuda:<number>")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise UserError(f"device={name}: this machine has {count} CUDA devices; device=cpu works everywhere")
    return torch.device("cuda", int(number or 0))
