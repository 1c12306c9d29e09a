"""trainer.compile=true: compile a network with torch.compile.

auto does not. Measured on an H200, batch 128: a step launched as one CUDA graph takes 7.7 ms (mnist_gpu) and 8.9 ms
(unet_small); compiled it takes 9.5 and 13.0 ms, after 63 to 93 s of compiling. On two CPU cores a step of unet_small
takes 1.77 s compiled and 1.52 s as it is.
"""

import time

import torch
from torch import nn

from ddpm.errors import UserError
from ddpm.runtime.memory import is_exhausted
from ddpm.train.loop import trial
from ddpm.train.state import TrainState


def begin(run: TrainState) -> str:
    """Compile the network of a run with steps left, if its config says so. Returns a line for the user, or "".

    Two passes without an update compile it here, and show whether that works. Raises UserError where it does not.
    """
    if run.config.trainer.compile != "true" or run.step >= run.max_steps:
        return ""
    run.network.compile(mode=_mode(run))  # in place: names of parameters stay as they are
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
        raise UserError(
            "trainer.compile=true: torch.compile does not work here: "
            f"{str(error).strip().partition(chr(10))[0]}; trainer.compile=false goes without"
        ) from None
    return f"trainer.compile=true: compiled in {time.perf_counter() - started:.0f} s"


def undo(network: nn.Module) -> None:
    """Let a network run as it is again. torch has `Module.compile` and no public way back."""
    network._compiled_call_impl = None


def _mode(run: TrainState) -> str | None:
    """Return "reduce-overhead" (CUDA graphs) where one pass makes all gradients of a step, else None.

    With several parts, gradients of earlier parts lie where the next pass writes (pytorch issue 169545). With several
    processes, DDP's hooks wait for each gradient.
    """
    alone = run.world.size == 1 and run.config.trainer.accumulate == 1
    return "reduce-overhead" if run.device.type == "cuda" and alone else None


def _pass(run: TrainState) -> None:
    """Forward and backward pass for as many images as the first part of this process's share of a batch has."""
    share = run.world.lengths(run.config.trainer.batch_size)[run.world.rank]
    trial(run, -(-share // run.config.trainer.accumulate))
