"""benchmarks/bench_gpu.py from end to end in tiny sizes on a CPU, so that time on a GPU is not lost to its mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_gpu.py"


def line(folder: Path, *arguments: str) -> list[str]:
    where = ["--quick", "--device", "cpu", "--out", str(folder), "--runs", str(folder / "run")]
    return [sys.executable, str(SCRIPT), *where, *arguments]


def test_the_plan_fits_one_call() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "--plan"], capture_output=True, text=True)
    found = re.search(r"together +(\d+) s, of (\d+)", result.stdout)
    assert found and int(found[1]) <= int(found[2]) == 560, result.stdout + result.stderr


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    result = subprocess.run(line(tmp_path), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {name: part["how"] for name, part in found["parts"].items()} == dict.fromkeys(
        ("works", "steps", "minute", "quality", "sampling", "compiled", "second"), "ran"
    )
    assert found["works"]["noise"]["uniform_equal"] and found["works"]["resume"]["bitwise"]
    assert found["works"]["step"]["fp32"]["weights_apart"] == 0
    assert (
        found["steps"]["tiny"]["batch 8"]["ours, captured and diffusers, eager: theirs over ours"]["median"]
        > 0
    )
    ratios = found["compiled"]["tiny"]["batch 8"]["ours, captured and diffusers, compiled: theirs over ours"]
    assert ratios["median"] > 0
    assert found["quality"]["seed 1"]["bf16"]["figures"]["fd"] > 0


@pytest.mark.slow
def test_a_part_that_fails_is_said_and_the_next_one_runs(tmp_path: Path) -> None:
    """There is no run yet whose quality could be measured."""
    result = subprocess.run(
        line(tmp_path, "--parts", "quality", "steps"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 1 and result.stderr.endswith("failed: quality\n")
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert found["parts"]["quality"]["how"].startswith("failed") and found["parts"]["steps"]["how"] == "ran"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_the_numbers_so_far_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(line(tmp_path, "--parts", "works"), cwd=tmp_path)
    file, run = tmp_path / "gpu-cpu.json", str(tmp_path / "run")
    while not of_commands(run):  # those of ddpm-train, which come after the first numbers
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.wait()
    assert json.loads(file.read_text())["works"]["noise"]["uniform_equal"]
    time.sleep(0.5)
    assert not of_commands(run)


def of_commands(folder: str) -> list[str]:
    """The processes that were told this folder, but for the benchmark itself."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(folder.encode() in word for word in words) and not any(b"bench_gpu" in word for word in words):
            found.append(str(file))
    return found
