"""What commit 0d6bd37 made loads, draws, resumes and runs as it did then; `made/` was written by make.py.

Bit for bit where every factor of `made/environment.json` is as it was, else within the tolerances below. A line
after the tests' results says which of the two was compared, and what differs. The files are read by `import ddpm`,
the console scripts and safetensors alone: how the package is laid out inside does not matter.
"""

import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ddpm
from tests.compatibility.factors import bitwise_factors
from tests.conftest import run_script

HERE = Path(__file__).parent
MADE = HERE / "made"
EXPECTED = json.loads((MADE / "expected.json").read_text())
RESUMED = tuple(EXPECTED["resumed"])
PLUGIN = HERE / "old_plugin.py"
PLUGIN_SHA256 = "f167b1c90eeb78dad00786dc077a010c6484c8e3d2cc4e1a1a481a516fe66f7d"

# Elsewhere the largest difference allowed; in brackets the largest found, without our own GroupNorm, with SSE alone in
# torch, oneDNN and MKL, and with two threads.
WEIGHTS = 1e-5  # of a weight at the end of a resumed run (2e-7)
IMAGES = 1e-3  # of a pixel in [-1, 1] (2e-5)
PIXELS = 1  # of a pixel in 0 … 255 (0)
FIGURES = 1e-4  # of losses and of what ddpm-eval measures, relative (3e-7)

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.xdist_group("compatibility")  # one worker: all wait for the same resumed runs


@dataclass(frozen=True)
class Home:
    """A folder with outputs/finished, and both stopped runs resumed to their ends."""

    path: Path
    differing: list[str]  # factors that are not as they were

    @property
    def exact(self) -> bool:
        return not self.differing

    def run(self, name: str) -> Path:
        return self.path / "outputs" / (name if name == "finished" else f"stopped_{name}")


def succeed(program: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """What a command prints to both streams; with an environment that torch reads once, as a process of its own."""
    done = run_script(program, *arguments, cwd=cwd, real=bool(environment), **{**ONE_THREAD, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def resume(name: str, home: Path, **environment: str) -> str:
    shutil.copytree(MADE / f"stopped_{name}", home / "outputs" / f"stopped_{name}")
    place = f"trainer.resume=outputs/stopped_{name}"
    return succeed("train", place, "data_root=data", "device=cpu", cwd=home, **environment)


def newest(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    return load_file(max((folder / "checkpoints").glob("step_*.safetensors")))


def hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode() + x.numpy().tobytes()).hexdigest()[:16]
        for name, x in tensors.items()
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("home")
    shutil.copytree(MADE / "finished", path / "outputs" / "finished")
    for name in RESUMED:
        said = resume(name, path)
        assert "going on from step 2" in said
    environment = json.loads((path / "outputs" / "stopped_unet" / "environment.json").read_text())
    then, now = json.loads((MADE / "environment.json").read_text()), bitwise_factors(environment)
    return Home(
        path, [f"{key} was {then.get(key)}, is {now[key]}" for key in now if now[key] != then.get(key)]
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def verdict(home: Home, record_property: Callable[[str, object], None]) -> None:
    """For the summary that tests/conftest.py prints."""
    differing = "; ".join(home.differing)
    how = "bit for bit" if home.exact else f"within the stated tolerances, as {differing}"
    record_property("summary", f"compatibility with 0d6bd37: {how}")


def check(now: Any, then: Any, exact: bool, atol: float = 0.0, rtol: float = 0.0) -> None:
    if exact:
        np.testing.assert_array_equal(now, then)
    else:
        np.testing.assert_allclose(np.asarray(now, float), np.asarray(then, float), rtol, atol)


@pytest.mark.parametrize("name", EXPECTED["draws"])
def test_load_and_draw(home: Home, name: str) -> None:
    model = ddpm.load(home.run(name), device="cpu")
    with np.load(MADE / "images.npz") as images:
        for i, draw in enumerate(EXPECTED["draws"][name]):
            check(model.sample(**draw), images[f"{name}_{i}"], home.exact, IMAGES)


def test_sample_command(home: Home) -> None:
    succeed("sample", *EXPECTED["commands"]["sample"], cwd=home.path)
    drawn = home.path / "outputs" / "drawn"
    with np.load(MADE / "images.npz") as then, np.load(drawn / "samples.npz") as now:
        check(now["images"], then["command"], home.exact, PIXELS)
        np.testing.assert_array_equal(now["labels"], then["command_labels"])
    told = json.loads((drawn / "sample.json").read_text())
    assert told["step"] == 400 and told["sampler"]["name"] == "ddim" and told["images"] == 6


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_weights(home: Home, name: str) -> None:
    expected, tensors = EXPECTED["resumed"][name], newest(home.run(name))
    now = hashes(tensors)
    assert now.keys() >= expected["tensors"].keys()
    if home.exact:
        assert {key: now[key] for key in expected["tensors"]} == expected["tensors"]
    check_weights(name, tensors, home.exact)


def check_weights(name: str, tensors: dict[str, torch.Tensor], exact: bool) -> None:
    then = load_file(MADE / f"weights_{name}.safetensors")
    assert then and all(key.startswith("ema.") for key in then)
    for key, value in then.items():
        check(tensors[key], value, exact, WEIGHTS)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_record(home: Home, name: str) -> None:
    """metrics.jsonl from the first line to the last, and result.json, but for what was measured by the clock."""
    expected, folder = EXPECTED["resumed"][name], home.run(name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    lines.append(json.loads((folder / "result.json").read_text()))
    for now, then in zip(lines, [*expected["metrics"], expected["result"]], strict=True):
        for key in then.keys() - {"images_per_second", "seconds"}:
            check(now[key], then[key], home.exact, rtol=FIGURES)


def test_other_arithmetic_stays_within_the_tolerance(home: Home, tmp_path: Path) -> None:
    """The tolerance, tried: without our own GroupNorm and without vector instructions."""
    resume("unet", tmp_path, DDPM_NATIVE="0", ATEN_CPU_CAPABILITY="default")
    tensors = newest(tmp_path / "outputs" / "stopped_unet")
    check_weights("unet", tensors, exact=False)
    if home.exact:
        assert hashes(tensors) != EXPECTED["resumed"]["unet"]["tensors"]


def test_info(home: Home) -> None:
    said = succeed("info", "ckpt=outputs/finished", cwd=home.path)
    for text in ("digits, 8×8×1, 10 classes", "unet, 5,053 parameters", "400 of 400 steps", "SHA-256 "):
        assert text in said


def test_eval(home: Home) -> None:
    succeed("eval", *EXPECTED["commands"]["eval"], cwd=home.path)
    told = json.loads((home.path / "outputs" / "judged" / "evaluation.json").read_text())
    for key, then in EXPECTED["figures"].items():
        check(told["figures"][key]["value"], then, home.exact, rtol=FIGURES)


def test_report(tmp_path: Path) -> None:
    """Of the runs as they were stored, one finished and two stopped."""
    for name in ("finished", *(f"stopped_{name}" for name in RESUMED)):
        shutil.copytree(MADE / name, tmp_path / "outputs" / name)
    succeed("report", "outputs", "contact=false", cwd=tmp_path)
    rows = (tmp_path / "outputs" / "report.csv").read_text().splitlines()[1:]
    for name, status in (("finished", "done"), ("stopped_unet", "stopped"), ("stopped_mlp", "stopped")):
        (row,) = [row for row in rows if name in row]
        assert status in row


def test_old_plugin(home: Home, tmp_path: Path) -> None:
    """It trains and draws by its old module paths: without a word as long as they are the paths, then one warning."""
    assert hashlib.sha256(PLUGIN.read_bytes()).hexdigest() == PLUGIN_SHA256, "users' files do not change"
    shutil.copy(PLUGIN, tmp_path)
    moved = importlib.util.find_spec("ddpm.data") is not None
    for program in ("train", "sample"):
        said = succeed(program, *EXPECTED["commands"][f"plugin {program}"], cwd=tmp_path)
        warned = [line for line in said.splitlines() if re.search("warning", line, re.I)]
        assert len(warned) == moved, said
        assert not moved or re.search(r"old_plugin|ddpm\.(datasets|samplers|schedules)", warned[0])
    with np.load(MADE / "images.npz") as then, np.load(tmp_path / "drawn" / "samples.npz") as now:
        check(now["images"], then["plugin"], home.exact, PIXELS)
