"""Whether a training is compiled (torch.compile), how, and what to say of it."""

import time
from importlib.util import find_spec

import torch

from ddpm.errors import UserError
from ddpm.runtime.distributed import broadcast_object
from ddpm.runtime.memory import is_exhausted
from ddpm.train.loop import trial
from ddpm.train.state import TrainState

# Both guesses, for a GPU that nobody here had; `benchmarks/bench_gpu.py` measures them.
COMPILE_SECONDS = 60.0  # two CPU cores took 70 to 80 s for unet_small, measured
SAVED = 0.3  # part of the time of forward and backward pass


def decide(
    setting: str, device_type: str, steps: int, pass_seconds: float = 0.0, obstacle: str = ""
) -> tuple[bool, str]:
    """Whether to compile, and why: "" where the user has said so.

    `steps` are left to do, `pass_seconds` the time of one's forward and backward pass uncompiled; `obstacle` is what
    speaks against it on this machine.
    """
    if setting != "auto":
        return setting == "true" and steps > 0, ""
    # measured on two cores, unet_small, batch 128: a step takes 1.77 s and not 1.52, in bf16 1.13 and not 1.11
    if device_type != "cuda":
        return False, "not compiled, which does not pay on a CPU"
    if obstacle:
        return False, f"not compiled: {obstacle}"
    saved = SAVED * steps * pass_seconds
    return saved > COMPILE_SECONDS, (
        f"{steps:,} steps with passes of {1000 * pass_seconds:.1f} ms would be about {saved:.0f} s shorter, and "
        f"compiling takes about {COMPILE_SECONDS:.0f} s"
    )


def begin(run: TrainState) -> str:
    """Compile the network of a run that is about to go on, if its config says so, and return what to tell the user.

    The first compiled passes are trials, so that it shows here how long compiling takes and whether it works at all.
    Raises UserError where it was asked for and does not.
    """
    setting, device = run.config.trainer.compile, run.device
    obstacle = _obstacle(run.config.trainer.deterministic) if device.type == "cuda" else ""
    steps = run.max_steps - run.step
    timed = setting == "auto" and device.type == "cuda" and not obstacle and steps > 0
    # where each of several processes decided by its own clock, they might not all do the same
    wanted, why = broadcast_object(
        run.world, decide(setting, device.type, steps, _pass_seconds(run) if timed else 0.0, obstacle)
    )
    if not wanted:
        return f"trainer.compile=auto: {why}" if why else ""
    run.network.compile(mode=_mode(run))  # in place: names of parameters stay as they are
    started = time.perf_counter()
    try:
        for _ in range(2):  # the second records the CUDA graphs
            _pass(run)
        _wait(device)
    except Exception as error:  # whatever a compiler, or torch around it, raises
        run.network._compiled_call_impl = None  # which undoes `compile`
        if is_exhausted(error) and setting == "true":
            raise
        reason = f"torch.compile does not work here: {str(error).strip().partition(chr(10))[0]}"
        if setting == "true":
            raise UserError(f"trainer.compile=true: {reason}; trainer.compile=false goes without") from None
        return f"trainer.compile=auto: {why}; but {reason}"
    compiled = f"compiled in {time.perf_counter() - started:.0f} s"
    return f"trainer.compile={setting}: " + "; ".join(filter(None, [why, compiled]))


def _obstacle(deterministic: bool) -> str:
    if deterministic:
        return "with trainer.deterministic=true no bit may depend on how long a step takes"
    return "" if find_spec("triton") else "triton is not installed"


def _mode(run: TrainState) -> str | None:
    """CUDA graphs, which launch all kernels of a pass at once, where one pass makes the gradients of a step.

    Else the gradients of the parts before lie where the next pass writes (pytorch issue 169545), or DDP's hooks wait
    for each of them.
    """
    alone = run.world.size == 1 and run.config.trainer.accumulate == 1
    return "reduce-overhead" if run.device.type == "cuda" and alone else None


def _pass_seconds(run: TrainState, rounds: int = 3) -> float:
    """Of all forward and backward passes of a step, uncompiled."""
    _pass(run)  # in which algorithms are chosen
    _wait(run.device)
    started = time.perf_counter()
    for _ in range(rounds):
        _pass(run)
    _wait(run.device)
    return (time.perf_counter() - started) / rounds * run.config.trainer.accumulate


def _pass(run: TrainState) -> None:
    """Forward and backward pass for as many images as the first part of this process's share of a batch has."""
    share = run.world.lengths(run.config.trainer.batch_size)[run.world.rank]
    trial(run, -(-share // run.config.trainer.accumulate))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
