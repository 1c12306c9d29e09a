"""benchmarks/bench_gpu.py from end to end in tiny sizes on a CPU, so that time on a GPU is not lost to its mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_gpu.py"


def bench(folder: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", "--out", str(folder)]
    line += ["--runs", str(folder / "run"), "--parts", *parts]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_a_part_that_fails_is_said_and_the_next_one_runs(tmp_path: Path) -> None:
    """There is no run yet whose quality could be measured."""
    result = bench(tmp_path, "quality", "waits")
    assert result.returncode == 1 and result.stderr.endswith("not as it should be: quality\n")
    assert "quality: FAILED, status 1" in result.stdout and "waits: ran" in result.stdout
    assert [file.name for file in tmp_path.glob("*.json")] == ["waits-cpu.json"]


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    parts = ("recipe", "quality", "sampling", "modes")
    result = bench(tmp_path, *parts)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {part: json.loads((tmp_path / f"{part}-cpu.json").read_text())["figures"] for part in parts}
    assert 0 < found["recipe"]["ready"] < found["recipe"]["stepping"] < found["recipe"]["total"]
    assert len(found["quality"]["goals"]) == 2
    assert all(side["step_seconds"] and side["pass_seconds"] for side in found["modes"]["tiny"].values())
