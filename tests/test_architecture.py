"""The house stays in order: imports run one way, only cli prints or knows Hydra, no file grows out of its room."""

import ast
from pathlib import Path

import ddpm

PACKAGE = Path(ddpm.__file__).parent
# Lower layers first; a module may import from its own layer's folder and from lower ones.
LAYERS = [
    {"errors", "old_names"},
    {"io"},
    {"runtime", "networks"},
    {"diffusion", "config", "data"},
    {"build", "register"},
    {"checkpoint"},
    {"sample"},
    {"api"},
    {"train"},
    {"runs", "export"},
    {"evaluate"},
    {"report"},
    {"sweep"},
    {"cli"},
]
# Beside cli, these know Hydra, print, exit or start processes. Nothing may be added.
LIKE_CLI = {
    "config/hydra.py",
    "config/load_plugins.py",
    "evaluate/run.py",
    "old_names.py",
    "register.py",
    "runtime/signals.py",
    "train/tensorboard.py",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer(name: str) -> int:
    (number,) = [i for i, layer in enumerate(LAYERS) if name in layer]
    return number


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
    for file in modules():
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imports(file):
            if name.startswith("ddpm.") and name != "ddpm.__version__":
                other = name.split(".")[1]
                assert other == own or layer(other) <= layer(own), f"{file} imports {name}"


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
        starts_gcc = {"subprocess"} if file.name == "native.py" else set()
        assert not (tops & {"pickle", "subprocess"}) - starts_gcc, file
        harmless = {"importlib.util.find_spec"}  # which looks for a package and does not import it
        assert not {name for name in imports(file) if name.startswith("importlib")} - harmless, file


def test_files_stay_readable() -> None:
    for file in modules():
        assert len(file.read_text().splitlines()) <= 350, file
