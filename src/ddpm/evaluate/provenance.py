"""Provenance of an evaluation: seconds of each part, machine, versions, hash of the images."""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ddpm import __version__


class Clock:
    """Measure seconds by part. `begin` is called with each part's name as it starts."""

    def __init__(self, begin: Callable[[str], object] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self.begin = begin

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.begin(part)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def seconds(of_parts: Mapping[str, float]) -> dict[str, float]:
    """Round seconds by part, and add `measuring`: all but sampling, likelihood, cas and unguided."""
    apart = ("sampling", "likelihood", "cas", "unguided")
    measuring = sum(value for part, value in of_parts.items() if part not in apart)
    return {part: round(value, 3) for part, value in {**of_parts, "measuring": measuring}.items()}


def machine(device: torch.device) -> str:
    """Describe the machine for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def sha256(images: Tensor) -> str:
    """Hash uint8 images, to know them whatever their dataset is called."""
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of ddpm, torch and Python."""
    return {"ddpm": __version__, "torch": torch.__version__, "python": platform.python_version()}
