"""examples/: each is short, and runs as its docstring says."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("examples")  # one worker, which makes its fixtures once
EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = [
    "trainer.max_steps=3",
    "trainer.batch_size=8",
    "schedule.num_timesteps=100",
    "trainer.sample_every=0",
]
TINY = [*SHORT, "model.channels=[8,16]", "model.num_blocks=1", "model.attention=[]", "model.head_dim=8"]
RUNS = {
    "train_from_python.py": ["run", *TINY],
    "own_sampler.py": ["run", "sampler.png"],
    "own_dataset.py": [*TINY, "dataset.count=100", "run_dir=discs"],
    "own_network.py": ["network", *SHORT, "model.width=8"],
}
# All in one process, as importing torch takes longer than an example.
CODE = f"""
import runpy, sys
for name, arguments in {RUNS}.items():
    print("example", name)
    sys.argv = [name, *arguments]
    runpy.run_path(f"{EXAMPLES}/{{name}}", run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all examples ran; output.txt is what they printed."""
    folder = tmp_path_factory.mktemp("examples")
    result = subprocess.run([sys.executable, "-c", CODE], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout)
    return folder


def printed(folder: Path, name: str) -> str:
    return (folder / "output.txt").read_text().partition(f"example {name}\n")[2].partition("example ")[0]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_training_from_python(folder: Path) -> None:
    said = printed(folder, "train_from_python.py")
    assert said.startswith("step 3: loss ") and said.count("\n") == 1
    assert (folder / "run" / "checkpoints" / "step_0000003.safetensors").exists()
    assert is_png(folder / "run" / "grid.png")


def test_own_sampler_draws_from_a_run(folder: Path) -> None:
    assert is_png(folder / "sampler.png")
    assert (folder / "sampler.png").read_bytes() != (folder / "run" / "grid.png").read_bytes()


def test_own_dataset_is_trained_on(folder: Path) -> None:
    assert "discs: 80 training and 10 validation images, 16×16×1" in printed(folder, "own_dataset.py")
    assert (folder / "discs" / "result.json").exists()


def test_own_network_is_trained_and_sampled(folder: Path) -> None:
    assert "convnet with 2,649 parameters" in printed(folder, "own_network.py")
    assert (folder / "network" / "result.json").exists() and is_png(folder / "network" / "grid.png")


def test_every_example_runs_and_is_short() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == RUNS.keys()
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 40, file.name
