"""Pictures are drawn in matplotlib's default style, whatever a matplotlibrc in the current folder says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "ddpm"
DRAW = """
import sys
from pathlib import Path
from ddpm.diffusion.schedules import SCHEDULES
from ddpm.train.plots import plot_schedule
plot_schedule(SCHEDULES["linear"](num_timesteps=10), Path(sys.argv[1]))
import matplotlib
print(matplotlib.rcParams["text.usetex"], matplotlib.rcParams["axes.facecolor"])
"""


def draw(folder: Path, before: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", before + DRAW, "picture.png"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "content",
    [
        b"text.usetex: True\naxes.facecolor: red\nfigure.dpi: 7\nsavefig.format: pdf\n",
        pytest.param(b"\xff\xfe", marks=pytest.mark.slow),
        pytest.param(b"backend: nonsense\n", marks=pytest.mark.slow),
    ],
    ids=["style", "no text", "backend"],
)
def test_a_matplotlibrc_in_the_current_folder_is_not_obeyed(tmp_path, content):
    (tmp_path / "plain").mkdir()
    assert draw(tmp_path / "plain").returncode == 0
    (tmp_path / "matplotlibrc").write_bytes(content)
    result = draw(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "plain" / "picture.png").read_bytes()


def test_a_backend_that_is_not_there_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    result = draw(tmp_path, "import os; assert 'MPLBACKEND' in os.environ\n")
    assert (result.returncode, result.stderr) == (0, "")


def test_the_style_of_a_program_that_draws_is_left_alone(tmp_path):
    before = 'import matplotlib; matplotlib.rcParams.update({"text.usetex": True, "axes.facecolor": "red"})\n'
    result = draw(tmp_path, before)
    assert (result.returncode, result.stdout, result.stderr) == (0, "True red\n", "")


def test_matplotlib_is_imported_in_one_place():
    imported = re.compile(r"^\s*(import|from) matplotlib", re.MULTILINE)
    importing = [
        path.relative_to(SRC).as_posix() for path in SRC.rglob("*.py") if imported.search(path.read_text())
    ]
    assert importing == ["io/figures.py"]
