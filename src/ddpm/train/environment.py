"""What a run is made with: versions, device, data, the git commit."""

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from ddpm import __version__
from ddpm.checkpoint.header import MAX_TEXT
from ddpm.config.schema import TrainConfig
from ddpm.data.dataset import Dataset, Split
from ddpm.diffusion.objective import WEIGHT_VERSIONS
from ddpm.errors import printable
from ddpm.networks import NETWORKS
from ddpm.networks.kernels import group_norm
from ddpm.runtime import randomness
from ddpm.runtime.device import precision_name

# of `environment`: where two runs agree in these, they agree in every bit
BITWISE_FACTORS = (
    "torch",
    "device",
    "precision",
    "deterministic",
    "data",
    "processes",
    "group_norm",
    "group_norm_code",
    "processor",
    "libraries",
    "variables",
    "weight",
)
# Variables that choose other kernels, in torch or in the libraries below it.
CHOOSING = ("ATEN_", "DNNL_", "ONEDNN_", "MKL_", "GLIBC_TUNABLES", "NVIDIA_TF32_", "TORCH_ALLOW_TF32_")
# Of /proc/cpuinfo: by kind and cache MKL and oneDNN choose how to cut matrices, by these flags their instructions.
KIND = ("model name", "cpu family", "model", "stepping", "cache size", "CPU implementer", "CPU part")
ARITHMETIC = re.compile(r"(ss?se|avx|fma|f16c|amx|bmi|asimd|sve|fphp)")


def environment(config: TrainConfig, data: Dataset, device: torch.device) -> dict[str, str]:
    """Return versions, device, precision and a digest of the data, as environment.json and checkpoints hold them."""
    cuda = device.type == "cuda"
    norm, code = _group_norm(config, device)
    variables = [f"{key}={os.environ[key]}" for key in sorted(os.environ) if key.startswith(CHOOSING)]
    found = {
        "ddpm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu(),
        "precision": precision_name(config.trainer.precision, device),
        "deterministic": "yes" if config.trainer.deterministic or not cuda else "no",
        "data": _fingerprint(data.train, data.val),
        "group_norm": norm,
        "group_norm_code": code,
        "processor": "GPU" if cuda else _processor(),
        "libraries": _libraries(cuda),
        "variables": " ".join(variables) or "none",
        "weight": WEIGHT_VERSIONS.get(config.objective.weight, "1"),
    }
    return {key: _short(printable(text)) for key, text in found.items()}


def _short(text: str) -> str:
    """Cut a text that is longer than a checkpoint may hold; a hash stands for the rest."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 20]}… {_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _group_norm(config: TrainConfig, device: torch.device) -> tuple[str, str]:
    """Return whose GroupNorm runs, and what decides its bits beside torch."""
    own = getattr(NETWORKS[config.model.name], "own_group_norm", False)
    plain = own and config.trainer.channels_last and config.trainer.compile != "true"
    if not plain or group_norm.missing(device.type):
        return "torch", "none"
    return "own" if device.type == "cpu" else "triton", group_norm.code(device.type)


def _cpu() -> str:
    """Name what decides in which order a CPU adds."""
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """Name the CPU's make and kind, and hash its arithmetic instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = sorted(filter(ARITHMETIC.match, about.get("flags", about.get("Features", "")).split()))
    return ", ".join([*(about[key] for key in KIND if key in about), f"flags {_hash(' '.join(flags))}"])


def _libraries(cuda: bool) -> str:
    if cuda:
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        return f"CUDA {torch.version.cuda}, cuDNN {cudnn}, random numbers: {randomness.code()}"
    math = re.findall(r"- .*?(Math Kernel Library Version \S+|MKL-DNN v\S+)", torch.__config__.show())
    return ", ".join([*math, " ".join(platform.libc_ver())])


def _fingerprint(*splits: Split) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of images and labels."""
    sha = hashlib.sha256()
    for split in splits:
        for tensor in (split.images, split.labels):
            sha.update(b"" if tensor is None else tensor.contiguous().numpy().data)
    return sha.hexdigest()[:16]


def commits() -> dict[str, str]:
    """Of the current folder and, where that is another repository, of ddpm itself; changes since then are not seen."""
    here, own = commit(Path.cwd()), commit(Path(__file__).parent)
    return ({"git": here} if here else {}) | ({"git of ddpm": own} if own and own != here else {})


def commit(folder: Path) -> str | None:
    """Return the commit that is checked out in the repository around a folder; None without one, or without git."""
    command = ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.decode("ascii", "replace").strip()
