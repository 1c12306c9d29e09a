"""The layout holds: imports run downwards, no circles, only cli prints or knows Hydra, no size grows."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ddpm

PACKAGE = Path(ddpm.__file__).parent
SCRIPT = Path(__file__).parents[1] / "scripts" / "budgets.py"
BUDGETS: dict[str, Any] = runpy.run_path(str(SCRIPT))
FOUND = BUDGETS["measure"](PACKAGE)
# Beside cli and sweep, these know Hydra, print, exit or start processes. Nothing may be added.
LIKE_CLI = {
    "config/hydra.py",
    "config/load_plugins.py",
    "evaluate/run.py",
    "old_names.py",
    "register.py",
    "runtime/signals.py",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Names of all modules that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_downwards() -> None:
    """Those inside functions and those for types, too. The list of exceptions may only shrink."""
    for file in modules():
        assert BUDGETS["layer"](file.relative_to(PACKAGE).as_posix()) >= 0, f"{file} has no layer"
    assert [line for line in BUDGETS["upward"](FOUND) if line not in BUDGETS["KNOWN_UPWARD"]] == []


def test_files_import_each_other_in_no_circle() -> None:
    known = [set(files) for files in BUDGETS["KNOWN_CIRCLES"]]
    assert [files for files in BUDGETS["circles"](FOUND) if not any(set(files) <= k for k in known)] == []


def test_no_figure_is_above_its_ceiling() -> None:
    assert BUDGETS["too_much"](FOUND) == [], "python scripts/budgets.py says more"


def test_budgets_are_printed_beside_their_aims() -> None:
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, aim in BUDGETS["AIMS"].items():
        assert any(line.startswith(name) and str(aim) in line.split() for line in result.stdout.splitlines())
    assert sum(aim for name, aim in list(BUDGETS["AIMS"].items())[:17]) == BUDGETS["AIMS"][BUDGETS["ALL"]]


def test_budgets_find_circles_private_names_and_imports_upwards(tmp_path: Path) -> None:
    for name, text in {
        "io/a.py": "from ddpm.io import b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ddpm.api",
        "io/b.py": "def f():\n    from ddpm.io.c import x\n    import torch._dynamo\n    x._hidden, x._own\n_own = 1",
        "io/c.py": "import ddpm.io.a\nfrom ddpm import __version__, cli\nx = 1\n",
        "cli/__init__.py": "",
        "api.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = BUDGETS["measure"](tmp_path)
    assert BUDGETS["circles"](found) == [["io/a.py", "io/b.py", "io/c.py"]]
    assert BUDGETS["upward"](found) == ["io/a.py → api.py", "io/c.py → cli/__init__.py"]
    assert found["io/b.py"].private == {"torch._dynamo", "x._hidden"} and found["io/b.py"].inside == 2
    figures = BUDGETS["figures"](found)
    assert figures["io"] == figures[BUDGETS["ALL"]] == 12 and figures["cli"] == figures["sample, api"] == 0
    assert figures[BUDGETS["CIRCULAR"]] == 3 and figures[BUDGETS["PRIVATE"]] == 1
    with pytest.raises(StopIteration):
        BUDGETS["layer"]("elsewhere/x.py")


def test_only_cli_knows_hydra_prints_or_exits() -> None:
    for file in modules():
        where = file.relative_to(PACKAGE)
        if where.parts[0] in {"cli", "sweep"} or where.as_posix() in LIKE_CLI:
            continue
        tops = {name.split(".")[0] for name in imports(file)}
        assert not {"hydra", "omegaconf"} & tops, file
        calls = {
            n.func.id
            for n in ast.walk(ast.parse(file.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"print", "exit", "exec", "eval"}, file
        starts_gcc_or_git = {"subprocess"} if file.name in ("native.py", "environment.py") else set()
        assert not (tops & {"pickle", "subprocess"}) - starts_gcc_or_git, file
        harmless = {"importlib.util.find_spec"}  # which looks for a package and does not import it
        assert not {name for name in imports(file) if name.startswith("importlib")} - harmless, file


def test_files_stay_readable() -> None:
    for file in modules():
        assert len(file.read_text().splitlines()) <= 350, file
