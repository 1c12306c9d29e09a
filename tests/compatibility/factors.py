"""What decides the bits of a result on a CPU. Two environments that agree in all of it agree in every bit."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

# Variables that choose other kernels, in torch or in the libraries below it.
CHOOSING = ("ATEN_", "DNNL_", "ONEDNN_", "MKL_", "GLIBC_TUNABLES")
# Of the processor's flags those that bring other arithmetic instructions.
ARITHMETIC = re.compile(r"(ss?se|avx|fma|f16c|amx|bmi|asimd|sve|fphp)")


def bitwise_factors(run: Mapping[str, str]) -> dict[str, object]:
    """All factors by name. `run` is the environment.json of a run of the U-Net made in this environment."""
    return {
        "torch": torch.__version__,
        "math libraries": re.findall(r"- (.*(?:Kernel Library|MKL-DNN).*)", torch.__config__.show()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "libc": " ".join(platform.libc_ver()),
        "variables": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(CHOOSING)},
        "device, threads": run["device"],
        "precision": run["precision"],
        "data": run["data"],
        "GroupNorm": run["group_norm"],
        "compiler": _compiler() if run["group_norm"] == "own" else "",
    }


def _processor() -> dict[str, str]:
    """Make and kind, cache (which decides how matrices are cut) and arithmetic instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {"machine": platform.machine(), "processor": platform.processor()}
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kept = ("model name", "cpu family", "model", "stepping", "cache size", "CPU implementer", "CPU part")
    flags = (found.get("flags") or found.get("Features") or "").split()
    told = {key: found[key] for key in kept if key in found}
    return {**told, "flags": " ".join(sorted(filter(ARITHMETIC.match, flags)))}


def _compiler() -> str:
    gcc = shutil.which("gcc")
    if gcc is None:
        return ""
    done = subprocess.run([gcc, "-dumpfullversion"], capture_output=True, text=True, check=True)
    return f"gcc {done.stdout.strip()}"
