"""Lock a free GPU, so that the runs of one user on one machine do not share one by accident.

The kernel frees a file lock when its process ends, however it ends. A GPU is held alone (an exclusive lock on its
file), or with others that agreed to share it (a shared lock on its file and an exclusive one on a place of it).
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddpm.errors import UserError
from ddpm.io.files import reason

if sys.platform != "win32":
    import fcntl

POLL = 0.5  # seconds between two looks at GPUs that are all taken
MOST = 1024  # GPUs of a machine that is not known yet


@dataclass
class GpuLock:
    """A GPU, held until `release` or the end of the process."""

    device: str  # as in device=
    held: list[int]  # file descriptors, with a lock on each

    def release(self) -> None:
        for descriptor in self.held:
            os.close(descriptor)
        self.held.clear()


def take(gpus: str | None, device: str, sharing: int, say: Callable[[str], None]) -> GpuLock | None:
    """Lock a free one of the GPUs that `gpus` allows; wait while all are taken. None where none is asked for.

    `gpus` and `device` are the values of these keys; at most `sharing` processes hold one GPU. Raises UserError for
    GPUs that are not there.
    """
    if gpus is None or device == "cpu":
        return None
    names = visible()
    numbers = allowed(gpus, device, len(names))
    if not numbers:
        return None
    folder, waited = _folder(), False
    while True:
        # the first places of all GPUs before the second ones
        for place, number in itertools.product(range(sharing), numbers):
            lock, name = GpuLock(f"cuda:{number}", []), f"gpu-{names[number]}".replace("/", "_")
            files = {name: fcntl.LOCK_EX}
            if sharing > 1:
                files = {name: fcntl.LOCK_SH, f"{name}.{place}": fcntl.LOCK_EX}
            if all(_lock(lock, folder / file, kind) for file, kind in files.items()):
                return lock
            lock.release()
        if not waited:
            say(f"waiting for a free GPU: {', '.join(f'cuda:{n}' for n in numbers)} are all taken")
            waited = True
        time.sleep(POLL)


def _lock(lock: GpuLock, file: Path, kind: int) -> bool:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    lock.held.append(descriptor)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def allowed(gpus: str, device: str, count: int = MOST) -> list[int]:
    """Return the numbers of the GPUs that may be taken, of `count`. Raises UserError."""
    only = cuda_number(device)
    parts = [part.strip() for part in gpus.split(",")]
    if gpus == "auto":
        parts = [str(number) for number in (range(count) if only is None else [only])]
    if not all(map(_is_number, parts)):
        raise UserError(f"gpus={gpus}: must be auto, or numbers such as 0,2,3")
    numbers = sorted({int(part) for part in parts})
    if only is not None and numbers != [only]:
        raise UserError(f"gpus={gpus} and device={device}: say which GPU with one of them")
    if numbers and numbers[-1] >= count:
        raise no_such_gpu(f"device={device}" if gpus == "auto" else f"gpus={gpus}", count)
    return numbers


def cuda_number(device: str) -> int | None:
    """Return N of cuda:N, None for auto, cpu and cuda. Raises UserError for anything else."""
    if device in ("auto", "cpu", "cuda"):
        return None
    kind, _, number = device.partition(":")
    if kind != "cuda" or not _is_number(number):
        which = device if _is_number(device) else "<number>"
        raise UserError(f"device={device}: must be auto, cpu, cuda or cuda:{which}")
    return int(number)


def no_such_gpu(typed: str, count: int) -> UserError:
    return UserError(f"{typed}: this machine has {count} CUDA devices; device=cpu works everywhere")


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 5


def visible() -> list[str]:
    """Return what each CUDA device that this process can see is called outside it."""
    import torch

    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return names[:count] if len(names) >= count and all(names[:count]) else [str(i) for i in range(count)]


def _folder() -> Path:
    """Return the user's own on this machine; within a Slurm job its own, where GPU 0 may be another one."""
    job = "".join(c for c in os.environ.get("SLURM_JOB_ID", "") if c.isalnum())
    folder = Path(tempfile.gettempdir()) / f"ddpm-gpus-{os.getuid()}{'-' * bool(job)}{job}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder}, for the locks on GPUs, belongs to somebody else; gpus=null uses none")
    except OSError as error:
        raise UserError(f"cannot make {folder} for GPU locks: {reason(error)}; gpus=null uses none") from None
    return folder
