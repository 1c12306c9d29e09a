"""docs/results.md says what the stored results say."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm.evaluate import record
from ddpm.evaluate.record import Evaluation, Metric
from ddpm.report import sampler_study
from tests.report.test_study import of

ROOT = Path(__file__).parents[1]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "write_results.py"))


def made(folder: Path, excess: float, **more: Metric) -> Path:
    """What is stored of a run."""
    folder.mkdir(parents=True)
    ours = of("ddim", 20, excess, seconds=83.0)
    figures = {**ours.figures, **more, "real_cas": Metric(0.99, error=0.001, n=10000)}
    figures["fd_excess"] = Metric(excess, low=excess - 0.1, high=excess + 0.1, floor=0.25)
    record.write(folder / "evaluation.json", Evaluation("a run", figures, ours.protocol))
    result = {"step": 1500, "val_loss": 0.04, "val_eps_mse": 0.05, "seconds": 600.0 + 60 * excess}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "environment.json").write_text('{"device": "CPU x", "torch": "2.1", "precision": "float32"}')
    return folder


def rows(page: str) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"
    ]
    return {first: others for first, *others in cells}


def test_the_page_is_what_the_stored_results_say() -> None:
    page = SCRIPT["page"](SCRIPT["STORED"], SCRIPT["RECIPES"], SCRIPT["PAGE"].parent)
    assert SCRIPT["PAGE"].read_text() == page, "run python scripts/write_results.py"
    for file in SCRIPT["STORED"].glob("*/*/*.json"):
        assert '"/' not in file.read_text(), f"{file} holds a path of one machine"


def test_two_seeds_are_a_mean_and_a_range(tmp_path: Path) -> None:
    for seed, excess in ((0, 0.4), (1, 0.6)):
        made(tmp_path / "mnist_cpu" / str(seed), excess, cas=Metric(0.9 + excess / 10, error=0.003))
    page = SCRIPT["page"](tmp_path, SCRIPT["RECIPES"], tmp_path)
    found = rows(page)
    assert found["Fréchet excess"][0] == "0.500 (0.400 … 0.600); each [0.300, 0.500], [0.500, 0.700]"
    assert found["Fréchet excess"][1] == "floor: 0.250, real images: 0.010"
    assert found["training"] == ["10.5 min (10.4 min … 10.6 min)", "1,500 steps"]
    assert found["classification accuracy score"] == [
        "95.0% (94.0% … 96.0%); each ± 0.003",
        "real images: 99.0%",
    ]
    assert "bits per dimension" not in found and found["sampling, ddim with 20 steps"][0].startswith("83 s")
    assert "Seeds 0, 1, on CPU x, torch 2.1, float32." in page and "wanted" not in page
    without = len(list(SCRIPT["RECIPES"].glob("*.yaml"))) - 1
    assert page.count("Not run yet.") + page.count("is not stored here yet.") == without


def test_one_seed_has_its_own_interval_and_is_said_to_be_few(tmp_path: Path) -> None:
    folder = made(tmp_path / "digits_cpu" / "7", 0.4)
    sampler_study.write(
        folder / "study.json", sampler_study.gather([of("ddim", 5, 0.9), of("ddim", 20, 0.3)], [])
    )
    for name in ("study.png", "grid.png"):
        (folder / name).write_bytes(b"")
    page = SCRIPT["page"](tmp_path, SCRIPT["RECIPES"], tmp_path / "docs")
    assert rows(page)["Fréchet excess"][0] == "0.400 [0.300, 0.500]" and "Only 1 seed so far" in page
    assert "| ddim | 20 | 20 |" in page and "![digits_cpu, seed 7](../digits_cpu/7/grid.png)" in page


def test_guidance_is_said_and_what_it_gained(tmp_path: Path) -> None:
    folder = made(tmp_path / "mnist_cpu" / "0", 0.4, right_class=Metric(0.99, error=0.001))
    whole = record.read(str(folder))
    about = {
        **whole.protocol,
        "guidance_scale": 1.3,
        "guidance_rescale": 0.0,
        "guidance_interval": [0.3, 5.0],
    }
    unguided = {"fd_excess": Metric(0.7), "right_class": Metric(0.95)}
    record.write(folder / "evaluation.json", replace(whole, protocol=about, unguided=unguided))
    studied = [replace(whole, protocol={**about, "guidance_scale": scale}) for scale in (1.0, 1.3)]
    varied = ["sampler", "guidance_scale", "guidance_interval"]
    sampler_study.write(folder / "study.json", sampler_study.gather(studied, varied))
    page = SCRIPT["page"](tmp_path, SCRIPT["RECIPES"], tmp_path)
    assert rows(page)["Fréchet excess"][1].endswith("real images: 0.010, without guidance: 0.700")
    assert rows(page)["agreement with the label"] == ["99.0% ± 0.001", "without guidance: 95.0%"]
    assert "sampling, ddim with 20 steps, guidance 1.3 within [0.3,5]" in page
    assert "n=500 sampler=ddim sampler.num_steps=20 guidance_scale=1.3 guidance_interval=[0.3,5]\n" in page
    assert "guidance_scale=1,1.3 guidance_interval=[0.3,5]\npython" in page
    assert "guidance" not in next(part for part in page.split("## ") if part.startswith("seed_notebook"))


def test_training_error_stands_beside_test_error_by_noise_level(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = made(tmp_path / "mnist_cpu" / str(seed), 0.4)
        whole, size = record.read(str(folder)), 20
        curve = {"t": [10.0 * i for i in range(size)], "lambda_": [0.0] * (size - 1) + [None]}
        curve |= {"error": [0.02] * size}
        curves = {
            name: {**curve, "eps_mse": [part * (1 + seed)] * size}
            for name, part in (("test", 0.2), ("train", 0.1))
        }
        record.write(folder / "evaluation.json", replace(whole, curves=curves))
    found = rows(SCRIPT["page"](tmp_path, SCRIPT["RECIPES"], tmp_path))
    assert found["0 … 30"] == ["1 … 1", "0.3 ± 0.007", "0.15 ± 0.007", "0.500"]
    assert found["160 … 190"][0] == "1 … ∞"


def test_a_run_is_stored_without_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "home" / "run"
    for name in ("result.json", "environment.json"):
        made(tmp_path / name, 0.4)
        run.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / name).rename(run / name)
    (run / "config.yaml").write_text("seed: 5\n")
    store = SCRIPT["store"]
    monkeypatch.setitem(store.__globals__, "STORED", tmp_path / "stored")
    with pytest.raises(SystemExit, match="was not judged yet"):
        store(run, "mnist_cpu")
    evaluation = of("ddim", 5, 0.4)
    path = {**evaluation.protocol, "checkpoint": str(run / "checkpoints" / "best.safetensors")}
    file = run / "evaluations" / "eval-1" / "evaluation.json"
    file.parent.mkdir(parents=True)
    for wrong in ({"step": 1499, "measure": ["distance", "cas"]}, {"step": 1500, "measure": ["distance"]}):
        record.write(file, Evaluation(str(run), evaluation.figures, {**path, **wrong}))
        with pytest.raises(SystemExit, match="is not of step 1500, or leaves parts out"):
            store(run, "mnist_cpu")
    whole = {**path, "step": 1500, "measure": ["distance", "cas"]}
    record.write(file, Evaluation(str(run), evaluation.figures, whole))
    assert store(run, "mnist_cpu") == tmp_path / "stored" / "mnist_cpu" / "5"
    text = (tmp_path / "stored" / "mnist_cpu" / "5" / "evaluation.json").read_text()
    assert '"/' not in text and "best.safetensors" in text
    with pytest.raises(SystemExit, match="no recipe"):
        store(run, "mnist_tpu")
