"""Measure on a GPU all that only a GPU can show, in one process with a deadline.

    python benchmarks/bench_gpu.py --plan                              print the parts and the seconds they need
    python benchmarks/bench_gpu.py --out FOLDER --seconds 540          run them in the order of their worth
    python benchmarks/bench_gpu.py --out FOLDER --parts steps          run one
    python benchmarks/bench_gpu.py --out FOLDER --quick --device cpu   run each in tiny sizes: does this script work?

    works      a step in each precision beside the CPU's, noise, gradients of attention; ddpm-train, ddpm-sample, a
               bitwise resume, a batch that does not fit
    steps      a training step, ours captured and diffusers' eager, in turn with the same switches; what waits
    minute     ddpm-train experiment=mnist_gpu from start to end
    quality    ddpm-eval of that run on 10,000 images
    sampling   10,000 images of it by ddpm.load(…).sample, after a warm-up
    compiled   a training step, ours captured and diffusers' compiled, in turn
    second     the same recipe with another seed, and its quality

FOLDER/gpu-<device>.json is written anew after every number, so a kill loses none that was measured. A part starts only
if the time left covers what it needs, and every process it started ends with it. Exit status 1: a part failed.
Data: $DDPM_DATA.
"""

import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gpu_steps
import torch
from timing import machine, seconds

import ddpm
from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.io.files import write_atomically
from ddpm.runtime import memory
from ddpm.runtime.device import set_up_cuda

TINY = ["dataset=digits", "model.channels=[8,32]", "model.attention=[1]", "model.head_dim=8"]
TINY += ["trainer.batch_size=8", "trainer.precision=fp32", "trainer.max_steps=8", "trainer.validate_every=0"]
PR_SET_PDEATHSIG = 1  # of prctl(2)
ENTRIES = {"train": "train", "sample": "sample", "eval": "evaluate"}


class OutOfTime(Exception):
    """The time left does not cover what comes next, or is over."""


@dataclass(eq=False)
class Session:
    """Options, the deadline, the figures so far and the processes that still run."""

    options: argparse.Namespace
    device: torch.device
    end: float  # on time.monotonic
    figures: dict[str, Any] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    warm: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def quick(self) -> bool:
        return bool(self.options.quick)

    def left(self) -> float:
        return self.end - time.monotonic()

    def need(self, wanted: float) -> None:
        """Raises OutOfTime unless so many seconds are left."""
        if not self.quick and self.left() < wanted:
            raise OutOfTime(f"{self.left():.0f} s left, {wanted:.0f} s needed")

    def put(self, name: str, value: Any) -> None:
        """Keep a figure under a name a/b/c, print it, and write all figures so far."""
        *path, last = name.split("/")
        place = self.figures
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
        print(f"{self.left():6.0f} s left  {name}: {json.dumps(value)[:500]}", flush=True)
        write_atomically(self.file, json.dumps(self.figures, indent=1).encode(), durable=False)

    @property
    def file(self) -> Path:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return Path(self.options.out) / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """ddpm-train and the like, whether they are installed or only on PYTHONPATH; in a group of its own."""
        code = f"from ddpm.cli.entry import {ENTRIES[program]} as main; main()"
        line = [sys.executable, "-c", code, *arguments, f"device={self.options.device}"]
        return self.popen(line)

    def popen(self, line: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            line, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=end_with_parent
        )
        self.processes.append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for a process. Returns its exit code and output. Kills it at the deadline."""
        try:
            text, _ = process.communicate(timeout=None if self.quick else max(1.0, self.left() - 2))
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
        return process.returncode, text

    def end_processes(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def works(session: Session) -> None:
    """First what could stop the rest; the commands run side by side, as nothing here is timed."""
    if "compiled" in session.options.parts:
        session.warm = {
            name: session.popen([sys.executable, __file__, *sys.argv[1:], "--warm", name])
            for name in names(session)
        }
    session.put("works/noise", gpu_steps.noise_beside_cpu(session.device))
    session.put("works/attention_gradients", gpu_steps.attention_beside_cpu(session.device))
    session.put("works/group_norm", gpu_steps.group_norm_beside_cpu(session.device))
    recipes = {"mnist_gpu": ["experiment=mnist_gpu", "trainer.batch_size=64"]}
    recipes |= {"dropout": ["dataset=mnist", "model.dropout=0.1"]}
    for name, recipe in {"tiny": ["dataset=mnist", *TINY[1:]]}.items() if session.quick else recipes.items():
        same = gpu_steps.captured_beside_eager(session.device, recipe)
        session.put(f"works/captured beside eager/{name}", same)
    for precision in ("fp32", "bf16") if session.quick else ("fp32", "tf32", "bf16", "fp16"):
        session.put(f"works/step/{precision}", gpu_steps.step_beside_cpu(session.device, precision))
    folder, own = Path(session.options.runs), TINY if session.quick else ["dataset=mnist", "schedule=cosine"]
    steps = 8 if session.quick else 200
    exact = [*own, "trainer.deterministic=true", "overwrite=true", f"trainer.checkpoint_every={steps // 2}"]
    exact += [f"trainer.max_steps={steps}", "trainer.precision=fp32"]
    train = session.start(
        "train", *own, f"run_dir={folder / 'plain'}", "overwrite=true", f"trainer.max_steps={steps}"
    )
    whole = session.start("train", *exact, f"run_dir={folder / 'whole'}")
    large = ["dataset=mnist", "model=unet_base", "trainer.batch_size=50000", "trainer.max_steps=5"]
    large += ["trainer.compile=false", f"run_dir={folder / 'large'}", "overwrite=true"]
    too_large = None if session.quick else session.start("train", *large)
    status, text = session.finish(train)
    session.put("works/train", {"status": status, "output": text.splitlines()[-12:]})
    sample = session.start("sample", f"ckpt={folder / 'plain'}", "n=16", f"out={folder / 'plain' / 'drawn'}")
    status, text = session.finish(whole)
    session.put("works/deterministic", {"status": status, "output": text.splitlines()[-6:]})
    middle = locate.saved_steps(folder / "whole")[0]
    resumed = session.start("train", *exact, f"run_dir={folder / 'resumed'}", f"trainer.resume={middle}")
    status, text = session.finish(sample)
    session.put("works/sample", {"status": status, "output": text.splitlines()[-6:]})
    status, text = session.finish(resumed)
    hashes = [
        checkpoint.read_meta(locate.saved_steps(folder / run)[-1])[0].sha256
        for run in ("whole", "resumed")
        if locate.saved_steps(folder / run)
    ]
    equal = len(hashes) == 2 and hashes[0] == hashes[1]
    session.put("works/resume", {"status": status, "bitwise": equal, "output": text.splitlines()[-6:]})
    if too_large is not None:
        status, text = session.finish(too_large)
        session.put("works/too_large", {"status": status, "output": text.splitlines()[-4:]})


def steps(session: Session) -> None:
    """Ours captured, diffusers' eager, in turn; then what our step spends its time on."""
    session.put("steps/peaks", gpu_steps.peaks(session.device, session.quick))
    for batch in batches(session):
        for name in names(session):
            compare(session, name, batch, compiled=False)
            if batch == batches(session)[0]:
                spent = gpu_steps.anatomy(name, batch, session.device, session.quick)
                session.put(f"steps/{name}/batch {batch}/ours, a step", spent)


def compiled(session: Session) -> None:
    """Ours captured and diffusers' compiled, in turn; compiled beside the first part where that ran."""
    for name, process in session.warm.items():
        status, text = session.finish(process)
        key = f"compiled/{name}/batch {batches(session)[0]}/diffusers, seconds to compile with an empty cache"
        session.put(key, float(text.split()[-1]) if status == 0 else text[-1000:])
    for name in reversed(names(session)):
        compare(session, name, batches(session)[0], compiled=True)


def names(session: Session) -> tuple[str, ...]:
    return ("tiny",) if session.quick else ("unet_small", "mnist_gpu")


def batches(session: Session) -> tuple[int, ...]:
    return (8,) if session.quick else (128, 512)


def compare(session: Session, name: str, batch: int, *, compiled: bool) -> None:
    """Seconds of a step in turns, one figure for each side as soon as it is there, then the ratio."""
    session.need(40 if compiled else 12)
    part = "compiled" if compiled else "steps"
    found = gpu_steps.in_turns(name, batch, session.device, compiled, session.quick)
    for side, figures in found.items():
        session.put(f"{part}/{name}/batch {batch}/{side}", figures)
    ratios = gpu_steps.ratios(found)
    session.put(f"{part}/{name}/batch {batch}/{' and '.join(found)}: theirs over ours", ratios)


def minute(session: Session, seed: int = 0) -> None:
    """When each line of ddpm-train came, in seconds since its start."""
    folder = Path(session.options.runs) / f"mnist_gpu-{seed}"
    started, lines = time.perf_counter(), []
    arguments = ["experiment=mnist_gpu", f"run_dir={folder}", "overwrite=true", f"seed={seed}"]
    process = session.start("train", *arguments, *(TINY if session.quick else []))
    for text in process.stdout or []:
        lines.append([round(time.perf_counter() - started, 2), text.rstrip()])
        if not session.quick and session.left() < 5:
            process.kill()
    status = process.wait()
    total = time.perf_counter() - started
    session.put(f"minute/seed {seed}", {"status": status, "seconds": round(total, 2), "lines": lines})
    if status:
        raise RuntimeError(f"ddpm-train ended with status {status}")


def quality(session: Session, seed: int = 0) -> None:
    folder = Path(session.options.runs) / f"mnist_gpu-{seed}"
    sized = ["n=128"] if session.quick else ["n=10000", "batch_size=2048"]
    for precision in ("bf16",) if session.quick or seed else ("bf16", "fp32"):
        out = folder / f"eval-{precision}"
        arguments = [
            f"ckpt={folder}",
            f"out={out}",
            f"precision={precision}",
            "measure=[distance,neighbours,cas]",
        ]
        started = time.perf_counter()
        status, text = session.finish(session.start("eval", *sized, *arguments))
        key = f"quality/seed {seed}/{precision}"
        session.put(f"{key}/command", {"status": status, "seconds": round(time.perf_counter() - started, 1)})
        if status:
            raise RuntimeError(f"ddpm-eval ended with status {status}: {text[-1500:]}")
        evaluation = json.loads((out / "evaluation.json").read_text())
        session.put(key + "/figures", {k: v["value"] for k, v in evaluation["figures"].items()})


def sampling(session: Session) -> None:
    """The library's call, after one to warm up: fp32 (IEEE), and bf16."""
    model = ddpm.load(Path(session.options.runs) / "mnist_gpu-0", session.device)
    n, sizes = (20, (8,)) if session.quick else (10_000, (2500, 512))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for size in sizes:
            own = replace(model, precision=dtype)

            def draw(own: ddpm.Model = own, size: int = size) -> object:
                return own.sample(n, batch_size=size)

            session.need(15)
            draw()
            times = [round(seconds(draw, session.device), 4) for _ in range(3)]
            session.put(
                f"sampling/{name}, batch {size}", {"images": n, "seconds": times, "median": median(times)}
            )


def second(session: Session) -> None:
    minute(session, seed=1)
    quality(session, seed=1)


def out_of_time(*_: object) -> None:
    raise OutOfTime("the time is over")


def end_with_parent() -> None:
    """Have Linux kill this process when its parent dies, however that came."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Part(NamedTuple):
    run: Callable[[Session], None]
    seconds: int  # that it needs on a GPU of the H100 class, with some air


PARTS = {
    "works": Part(works, 100),
    "steps": Part(steps, 90),
    "minute": Part(minute, 70),
    "quality": Part(quality, 80),
    "sampling": Part(sampling, 30),
    "compiled": Part(compiled, 100),
    "second": Part(second, 90),
}


def main() -> None:
    options = arguments()
    total = sum(PARTS[part].seconds for part in options.parts)
    if options.plan:
        for part in options.parts:
            print(
                f"{part:<10} {PARTS[part].seconds:4} s  {(PARTS[part].run.__doc__ or '').partition('.')[0]}"
            )
        print(f"{'together':<10} {total:4} s, of {options.seconds} s")
        return
    device = torch.device(options.device)
    session = Session(options, device, time.monotonic() + options.seconds)
    set_up_cuda()
    torch.backends.cudnn.benchmark = True  # as ddpm-train has it
    memory.keep_freed()
    if options.warm:
        print(gpu_steps.warm(options.warm, batches(session)[0], device))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.quick:
        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, options.seconds)  # a compiler knows no deadline
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    failed = []
    try:
        session.put("machine", machine(device) | {"quick": options.quick})
        for part in options.parts:
            started = time.monotonic()
            try:
                session.need(0.5 * PARTS[part].seconds)
                PARTS[part].run(session)
                how = "ran"
            except OutOfTime as reason:
                how = f"stopped: {reason}"
            except Exception as error:
                failed.append(part)
                how = f"failed: {type(error).__name__}: {error}"
                session.put(f"{part}/traceback", traceback.format_exc()[-3000:])
                if memory.is_exhausted(error) and device.type == "cuda":
                    torch.cuda.empty_cache()
            session.put(f"parts/{part}", {"how": how, "seconds": round(time.monotonic() - started, 1)})
    finally:
        session.end_processes()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=560, help="all of it ends by then")
    parser.add_argument("--plan", action="store_true", help="print the parts and their seconds, and end")
    parser.add_argument("--runs", default="outputs/bench_gpu", help="folder for the runs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm", metavar="NETWORK", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.plan and options.out is None:
        parser.error("--out FOLDER is needed")
    if options.device == "cpu" and not (options.quick or options.plan):
        parser.error("no GPU here: only --quick makes sense")
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    return options


if __name__ == "__main__":
    main()
