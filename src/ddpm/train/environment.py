"""What a run is made with: versions, device, data, the git commit."""

import hashlib
import platform
import re
from pathlib import Path

import torch

import ddpm
from ddpm import __version__
from ddpm.config.schema import TrainConfig
from ddpm.data.dataset import Dataset, Split
from ddpm.diffusion.objective import WEIGHT_VERSIONS
from ddpm.io.files import read_regular
from ddpm.networks import NETWORKS
from ddpm.networks.kernels import group_norm
from ddpm.runtime.device import precision_name

# of the environment
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
    """What a run is made with. Where two runs agree in `DECIDES_BITS`, they agree in every bit."""
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
    """What decides in which order a CPU adds."""
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _fingerprint(*splits: Split) -> str:
    """Of images and labels."""
    sha = hashlib.sha256()
    for split in splits:
        for tensor in (split.images, split.labels):
            sha.update(b"" if tensor is None else tensor.contiguous().numpy().data)
    return sha.hexdigest()[:16]


_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


_REF = re.compile(r"ref: (refs/[^\s\0]+)")


MAX_BYTES = 1 << 24  # of packed-refs; a repository with 200,000 branches


def commits() -> dict[str, str]:
    """Of the current folder and, where that is another repository, of ddpm itself; changes since then are not seen."""
    here, own = commit(Path.cwd()), commit(Path(ddpm.__file__).parent)
    return ({"git": here} if here else {}) | ({"git of ddpm": own} if own and own != here else {})


def commit(folder: Path) -> str | None:
    """The commit that is checked out in the repository around a folder, if there is one."""
    for parent in (folder, *folder.parents):
        if (
            parent / ".git"
        ).exists():  # a file in a worktree or submodule, which leads elsewhere: not followed
            try:
                return _head(parent / ".git")
            except (OSError, ValueError):
                return None
    return None


def _head(git: Path) -> str | None:
    head = _line(git / "HEAD")
    ref = _REF.fullmatch(head)
    if ref is None or ".." in ref[1]:
        return head if _HASH.fullmatch(head) else None
    if (git / ref[1]).is_file():
        loose = _line(git / ref[1])
        return loose if _HASH.fullmatch(loose) else None
    packed = _text(git / "packed-refs").splitlines()
    found = [line.split()[0] for line in packed if line.endswith(" " + ref[1])]
    return found[0] if found and _HASH.fullmatch(found[0]) else None


def _line(path: Path) -> str:
    return _text(path).partition("\n")[0].strip()


def _text(path: Path) -> str:
    return read_regular(path, MAX_BYTES).decode()
