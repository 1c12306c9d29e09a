"""A GPU of one's own: file locks by which runs of one user on one machine keep out of each other's way.

The kernel frees a lock when its process ends, however it ends. A GPU is held alone (an exclusive lock), or together
with others that agreed to share it (a shared lock, and one of `jobs_per_gpu` places).
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddpm.errors import UserError
from ddpm.io.files import reason

POLL = 0.5  # seconds between two looks at GPUs that are all taken
MOST = 1024  # GPUs of a machine that is not known yet


@dataclass
class Lease:
    """A GPU, held until `release` or the end of the process."""

    device: str  # as in device=
    held: list[int]  # open files, with a lock on each

    def release(self) -> None:
        for descriptor in self.held:
            os.close(descriptor)
        self.held.clear()


def take(gpus: str | None, device: str, jobs_per_gpu: int, say: Callable[[str], None]) -> Lease | None:
    """Lock a free one of the GPUs that `gpus` allows; wait while all are taken. None where none is asked for.

    The arguments are the values of the keys of those names. Raises UserError for GPUs that are not there.
    """
    if gpus is None or device == "cpu":
        return None
    names = visible()
    numbers = allowed(gpus, device, len(names))
    if not numbers:
        return None
    folder, waited = _folder(), False
    while True:
        for number, files in _places(numbers, names, jobs_per_gpu):
            if (held := _lock(folder, files)) is not None:
                return Lease(f"cuda:{number}", held)
        if not waited:
            say(f"waiting for a free GPU: {', '.join(f'cuda:{n}' for n in numbers)} are all taken")
            waited = True
        time.sleep(POLL)


def allowed(gpus: str, device: str, count: int = MOST) -> list[int]:
    """The numbers of the GPUs that may be taken, of `count`. Raises UserError."""
    kind, _, only = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and _is_number(only)):
        raise UserError(f"device={device}: must be auto, cpu, cuda or cuda:<number>")
    parts = [part.strip() for part in gpus.split(",")]
    if gpus == "auto":
        parts = [only] if only else [str(number) for number in range(count)]
    if not all(map(_is_number, parts)):
        raise UserError(f"gpus={gpus}: must be auto, or numbers such as 0,2,3")
    numbers = sorted({int(part) for part in parts})
    if only and numbers != [int(only)]:
        raise UserError(f"gpus={gpus} and device={device}: say which GPU with one of them")
    if numbers and numbers[-1] >= count:
        named = f"device={device}" if gpus == "auto" else f"gpus={gpus}"
        raise UserError(f"{named}: this machine has {count} CUDA devices; device=cpu works everywhere")
    return numbers


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 5


def visible() -> list[str]:
    """What each CUDA device that this process can see is called outside it."""
    import torch

    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return names[:count] if len(names) >= count and all(names[:count]) else [str(i) for i in range(count)]


def _places(
    numbers: list[int], names: list[str], jobs_per_gpu: int
) -> Iterator[tuple[int, list[tuple[str, bool]]]]:
    """Each place on a GPU with its locks, (file, exclusive); the first places of all GPUs before the second ones."""
    for place in range(jobs_per_gpu):
        for number in numbers:
            name = f"gpu-{names[number]}".replace("/", "_")
            alone = jobs_per_gpu == 1
            yield number, [(name, True)] if alone else [(name, False), (f"{name}.{place}", True)]


def _lock(folder: Path, files: list[tuple[str, bool]]) -> list[int] | None:
    """All of the locks, or none."""
    import fcntl

    held: list[int] = []
    for name, exclusive in files:
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        held.append(descriptor)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            Lease("", held).release()
            return None
    return held


def _folder() -> Path:
    """The user's own, on this machine; within a Slurm job its own, where GPU 0 need not be that of another job."""
    job = "".join(c for c in os.environ.get("SLURM_JOB_ID", "") if c.isalnum())
    folder = Path(tempfile.gettempdir()) / f"ddpm-gpus-{os.getuid()}{'-' * bool(job)}{job}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder}, for the locks on GPUs, belongs to somebody else; gpus=null uses none")
    except OSError as error:
        raise UserError(
            f"cannot make {folder}, for the locks on GPUs: {reason(error)}; gpus=null uses none"
        ) from None
    return folder
