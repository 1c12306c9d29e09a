"""docs/library.ipynb, run as it stands, but for a shorter training."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PAGE = Path(__file__).parents[1] / "docs" / "library.ipynb"


def read() -> nbformat.NotebookNode:
    notebook = nbformat.read(PAGE, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.mark.slow
def test_every_cell_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notebook = read()
    train = notebook.cells[1]
    train.source, changed = re.subn(r"max_steps=\d+", "max_steps=20", train.source)
    assert changed == 1
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()  # raises where a cell does
    printed = [
        "".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells
    ]
    assert "done in" in printed[1] and "step 20" in printed[2]
    assert float(re.findall(r"tensor\((.*)\)", printed[5])[0]) < 1e-4
    assert "unknown key 'sampler.num_stepz'; did you mean 'num_steps'?" in printed[7]
    pictures = [
        i
        for i, cell in enumerate(notebook.cells)
        for out in cell.get("outputs", [])
        if "image/png" in out.get("data", {})
    ]
    assert pictures == [3, 5, 9]


def test_it_is_short_and_carries_one_small_picture_at_most() -> None:
    notebook = read()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(notebook.cells) <= 10 and len(outputs) <= 1 and PAGE.stat().st_size < 40_000
    assert all(set(output.data) <= {"image/png", "text/plain"} for output in outputs)
