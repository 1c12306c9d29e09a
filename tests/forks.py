"""Commands at a fraction of their price: a server that has imported all of them once and forks for each.

`run(…)` calls the command's own `main()` in a fork; `run(…, real=True)` starts the installed console script from a
second, small server instead, so that the peak of memory is the command's own and not that of its parent.
"""

import atexit
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ADDRESS_SPACE = 8 * 2**30  # a command that asks for more gets a MemoryError; importing torch maps 3 GiB
KILLED_AFTER = 240.0  # seconds by the clock, which other programs can stretch
PROGRAMS = ("train", "sample", "eval", "export", "info", "report")


@dataclass(frozen=True)
class Outcome:
    """What a command answered, its exit status as subprocess gives it, and what it took."""

    command: str
    status: int
    stdout: str
    stderr: str
    peak: int  # bytes resident
    seconds: float  # of the processor

    def __str__(self) -> str:
        text = f"{self.command}: status {self.status}, {self.peak / 2**20:.0f} MiB, {self.seconds:.1f} s"
        return f"{text}\nstdout: {self.stdout[-1000:]!r}\nstderr: {self.stderr[-3000:]!r}"


def run(
    program: str, *arguments: str, cwd: Path, real: bool = False, limited: bool = True, **environment: str
) -> Outcome:
    """`ddpm-<program> arguments…`, ended by force after four minutes; `limited`: on the CPU, in limited memory."""
    on_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if limited else {}
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "program": program,
            "arguments": arguments,
            "cwd": str(cwd),
            "folder": folder,
            "environment": {**os.environ, **on_cpu, **environment},
            "real": real,
            "limited": limited,
        }
        server = _server(real)
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the fork server has ended"
        texts = [
            (Path(folder) / name).read_bytes().decode(errors="backslashreplace") for name in ("out", "err")
        ]
    return Outcome(
        " ".join((f"ddpm-{program}", *arguments)), stdout=texts[0], stderr=texts[1], **json.loads(answer)
    )


def refused(outcome: Outcome) -> str:
    """The one line of a refusal. Raises AssertionError for anything else than status 2 and that line."""
    begin = outcome.command.split(" ")[0] + ": "
    lines = outcome.stderr.splitlines()
    assert outcome.status == 2 and len(lines) == 1 and lines[0].startswith(begin), f"not a refusal: {outcome}"
    assert "Traceback" not in outcome.stdout, f"a traceback: {outcome}"
    return lines[0]


@functools.cache
def _server(real: bool) -> "subprocess.Popen[str]":
    server = subprocess.Popen(
        # -P: the modules beside it are none of its
        [sys.executable, "-P", __file__, "small" if real else "warm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    atexit.register(server.kill)
    return server


def _serve(warm: bool) -> None:
    mains = _import() if warm else {}
    for line in sys.stdin:
        print(json.dumps(_child(json.loads(line), mains)), flush=True)


def _import() -> dict[str, Any]:
    """The commands as they are installed, with all that they import only when they need it."""
    lazily = (
        "torch._dynamo",
        "hydra",
        "matplotlib.pyplot",
        "sklearn.datasets",
        "safetensors.torch",
        "ddpm.train.loop",
        "ddpm.train.plots",
        "ddpm.sample.tasks",
        "ddpm.evaluate.run",
        "ddpm.export.folder",
        "ddpm.report.plot",
        "ddpm.cli.train",
        "ddpm.cli.sample_run",
        "ddpm.cli.evaluate",
        "ddpm.cli.export",
        "ddpm.cli.info",
        "ddpm.cli.report",
    )
    for name in lazily:
        importlib.import_module(name)
    gc.freeze()  # a fork's garbage collection need not copy what was imported here
    scripts = importlib.metadata.entry_points(group="console_scripts")
    return {program: scripts[f"ddpm-{program}"].load() for program in PROGRAMS}


def _child(request: dict[str, Any], mains: dict[str, Any]) -> dict[str, float]:
    begun = time.perf_counter()
    child = os.fork()
    if not child:
        _become(request, mains)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return {
                "status": os.waitstatus_to_exitcode(status),
                "peak": usage.ru_maxrss * 1024,
                "seconds": usage.ru_utime + usage.ru_stime,
            }
        if time.perf_counter() - begun > KILLED_AFTER:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _become(request: dict[str, Any], mains: dict[str, Any]) -> NoReturn:
    """The rest of the child's life: as the console script, with its output in files."""
    status = 1
    try:
        folder = Path(request["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
        if request["limited"]:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        script = str(Path(sys.executable).with_name(f"ddpm-{request['program']}"))
        sys.argv = [script, *request["arguments"]]
        if request["real"]:
            os.execv(script, sys.argv)
        status = _exit_status(mains[request["program"]])
    except BaseException:  # a child must not go on as a second server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _exit_status(main: Any) -> int:
    """What the interpreter makes of `sys.exit(main())`."""
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    _serve(sys.argv[1] == "warm")
