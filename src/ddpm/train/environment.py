"""What a run is made with: versions, device, data, the git commit."""

import hashlib
import platform
import subprocess
from pathlib import Path

import torch

from ddpm import __version__
from ddpm.config.schema import TrainConfig
from ddpm.data.dataset import Dataset, Split
from ddpm.diffusion.objective import WEIGHT_VERSIONS
from ddpm.networks import NETWORKS
from ddpm.networks.kernels import group_norm
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
    "weight",
)


def environment(config: TrainConfig, data: Dataset, device: torch.device) -> dict[str, str]:
    """Return versions, device, precision and a digest of the data, as environment.json and checkpoints hold them."""
    cuda = device.type == "cuda"
    return {
        "ddpm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu(),
        "precision": precision_name(config.trainer.precision, device),
        "deterministic": "yes" if config.trainer.deterministic or not cuda else "no",
        "data": _fingerprint(data.train, data.val),
        "group_norm": _group_norm(config, device),
        "weight": WEIGHT_VERSIONS.get(config.objective.weight, "1"),
    }


def _group_norm(config: TrainConfig, device: torch.device) -> str:
    own = getattr(NETWORKS[config.model.name], "own_group_norm", False)
    plain = own and config.trainer.channels_last and config.trainer.compile != "true"
    if not plain or group_norm.missing(device.type):
        return "torch"
    return "own" if device.type == "cpu" else "triton"


def _cpu() -> str:
    """Name what decides in which order a CPU adds."""
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


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
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
