"""trainer.compile=true: compile a network with torch.compile.

auto does not. Measured on an H200, batch 128: a step launched as one CUDA graph takes 7.7 ms (mnist_gpu) and 8.9 ms
(unet_small); compiled it takes 9.5 and 13.0 ms, after 63 to 93 s of compiling. On two CPU cores a step of unet_small
takes 1.77 s compiled and 1.52 s as it is.
"""

import atexit
import os
import shutil
import sys
import tempfile
import time

import torch
from torch import nn

from ddpm.errors import DataError, UserError
from ddpm.networks.kernels import native
from ddpm.runtime.memory import is_exhausted
from ddpm.train.loop import trial
from ddpm.train.state import TrainState

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's environment variable


def begin(run: TrainState) -> str:
    """Compile the network of a run with steps left, if its config says so. Returns a line for the user, or "".

    Two passes without an update compile it here, and show whether that works. Raises UserError where it does not.
    """
    if run.config.trainer.compile != "true" or run.step >= run.max_steps:
        return ""
    if CACHE not in os.environ and sys.platform != "win32":  # where temporary files are the user's own
        os.environ[CACHE] = _cache()
    # on the network itself: the names of its parameters stay, and DDP around it calls the compiled one, too
    run.network.forward = torch.compile(run.network.forward, mode=_mode(run))
    started = time.perf_counter()
    try:
        for _ in range(2):  # the second records the CUDA graphs
            _pass(run)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
    except Exception as error:  # whatever a compiler, or torch around it, raises
        undo(run.network)
        if is_exhausted(error):
            raise
        said = f"torch.compile does not work here: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(f"trainer.compile=true: {said}; trainer.compile=false goes without") from None
    return f"trainer.compile=true: compiled in {time.perf_counter() - started:.0f} s"


def _cache() -> str:
    """Return a folder for torch's compiled code that no other user can write: in the cache, or one until the end.

    Torch's default is `/tmp/torchinductor_<user>`, which anybody may make before the user does.
    """
    try:
        return str(native.own_folder("inductor"))
    except (native.Unavailable, DataError, OSError):
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def undo(network: nn.Module) -> None:
    """Let a network run as its class says again."""
    vars(network).pop("forward", None)


def _mode(run: TrainState) -> str | None:
    """Return "reduce-overhead" (CUDA graphs) where one pass makes all gradients of a step, else None.

    With several parts, gradients of earlier parts lie where the next pass writes (pytorch issue 169545). With several
    processes, DDP's hooks wait for each gradient.
    """
    alone = run.world.size == 1 and run.config.trainer.accumulate == 1
    return "reduce-overhead" if run.device.type == "cuda" and alone else None


def _pass(run: TrainState) -> None:
    """Run forward and backward for as many images as the first part of this process's share of a batch has."""
    share = run.world.lengths(run.config.trainer.batch_size)[run.world.rank]
    trial(run, -(-share // run.config.trainer.accumulate))
