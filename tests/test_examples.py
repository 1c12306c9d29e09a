"""examples/: each is short, and runs as its docstring says."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [
    "model.channels=[8,16]",
    "model.num_blocks=1",
    "model.attention=[]",
    "model.head_dim=8",
    "trainer.max_steps=3",
    "trainer.batch_size=8",
    "schedule.num_timesteps=100",
]


def run(name: str, *arguments: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, made by the first example."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    said = run("train_from_python.py", str(folder), *TINY, cwd=folder.parent)
    assert said.startswith("step 3: loss ") and said.count("\n") == 1
    assert (folder / "checkpoints" / "step_0000003.safetensors").exists()
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    return folder


def test_own_sampler_draws_from_a_run(trained: Path, tmp_path: Path) -> None:
    run("own_sampler.py", str(trained), "grid.png", cwd=tmp_path)
    assert (tmp_path / "grid.png").read_bytes() != (trained / "grid.png").read_bytes()


def test_own_dataset_is_trained_on(tmp_path: Path) -> None:
    said = run("own_dataset.py", *TINY, "dataset.count=100", "run_dir=run", cwd=tmp_path)
    assert "discs: 80 training and 10 validation images, 16×16×1" in said
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_examples_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 40
