"""What the benchmarks share."""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, with all that it leaves a GPU to do, and nothing that was left before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on; not whose it is."""
    about = {"cpu": _cpu_name(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return {
        **about,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(path: Path, options: dict[str, Any], figures: dict[str, Any], device: torch.device) -> None:
    """The figures as JSON, with the machine and the options that they belong to."""
    text = json.dumps({"machine": machine(device), "options": options, "figures": figures}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
