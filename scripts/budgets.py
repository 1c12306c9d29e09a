"""Measure the size and the imports of src/ddpm beside their budgets.

python scripts/budgets.py            print every figure; exit status 1 where one is above its ceiling
python scripts/budgets.py --write    make today's figures the ceilings

Ceilings are what was measured last: a change may lower a figure, and raises one only with a reason in its commit.
Imports inside functions count as any other; those under TYPE_CHECKING are reported apart.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__)
SOURCE = SCRIPT.parents[1] / "src" / "ddpm"

# Lower layers first. A file imports from its own layer and from lower ones.
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

# Figures that have an aim: lines of each part of the package, and counts.
ALL, CORE = "all, C included", "core"
CIRCULAR, UPWARD, INSIDE, PRIVATE = (
    "files in circles",
    "imports upwards",
    "imports inside functions",
    "files with a private name of another library",
)
AIMS = {
    "errors": 60,
    "io": 420,
    "runtime": 620,
    "networks": 800,
    "diffusion": 1100,
    "config": 650,
    "data": 1000,
    "build, register": 170,
    "checkpoint": 500,
    "sample, api": 870,
    "train": 1100,
    "runs": 400,
    "export": 310,
    "evaluate": 1900,
    "report": 700,
    "sweep": 350,
    "cli": 1050,
    ALL: 12000,
    CORE: 2500,
    CIRCULAR: 0,
    UPWARD: 0,
    INSIDE: 25,
    PRIVATE: 0,
}
CORE_FILES = re.compile(
    r"diffusion/.*|networks/\w+\.py|data/(info|dataset|batches)\.py|train/(loop|step|state)\.py"
    r"|sample/(model|sampling)\.py"
)
# Private names of other libraries that may be used, with the reason.
ALLOWED = {
    r"torch\._foreach_\w+": "the only call that updates a list of tensors in one kernel; torch.optim uses it, too",
    r"os\._exit": "documented by Python",
    r".*\._(asdict|replace)": "documented for named tuples",
}

# Written by --write.
# begin
MEASURED: dict[str, int] = {
    "errors": 57,  # aim 60
    "io": 812,  # aim 420
    "runtime": 1132,  # aim 620
    "networks": 1123,  # aim 800
    "diffusion": 1136,  # aim 1100
    "config": 1158,  # aim 650
    "data": 1279,  # aim 1000
    "build, register": 182,  # aim 170
    "checkpoint": 542,  # aim 500
    "sample, api": 1112,  # aim 870
    "train": 1646,  # aim 1100
    "runs": 705,  # aim 400
    "export": 468,  # aim 310
    "evaluate": 2974,  # aim 1900
    "report": 984,  # aim 700
    "sweep": 466,  # aim 350
    "cli": 1346,  # aim 1050
    "all, C included": 17273,  # aim 12000
    "core": 2483,  # aim 2500
    "files in circles": 0,  # aim 0
    "imports upwards": 0,  # aim 0
    "imports inside functions": 25,  # aim 25
    "files with a private name of another library": 0,  # aim 0
    "__init__, old_names": 151,
}
KNOWN_CIRCLES: list[list[str]] = []
KNOWN_UPWARD: list[str] = []
# end


@dataclass
class Found:
    """What one file imports and which private names of other libraries it uses."""

    lines: int
    imports: set[str] = field(default_factory=set)  # files of the package
    for_types: set[str] = field(default_factory=set)  # the same, under TYPE_CHECKING only
    inside: int = 0  # import statements in functions
    private: set[str] = field(default_factory=set)


def measure(source: Path = SOURCE) -> dict[str, Found]:
    """Read every Python and C file. Keys are paths below `source`."""
    trees = {_name(file, source): ast.parse(file.read_text()) for file in sorted(source.rglob("*.py"))}
    own = {name for tree in trees.values() for name in _defined(tree)}
    found = {name: Found(_lines(source / name)) for name in trees}
    for name, tree in trees.items():
        for node, function, typing in _walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                targets = set(_targets(node, found)) - {name}
                (found[name].for_types if typing else found[name].imports).update(targets)
                found[name].inside += function and not typing
                found[name].private.update(_private_imports(node))
            elif isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
                found[name].private.add(ast.unparse(node))
        found[name].private = {n for n in found[name].private if not any(re.fullmatch(a, n) for a in ALLOWED)}
        found[name].for_types -= found[name].imports
    return found | {_name(file, source): Found(_lines(file)) for file in sorted(source.rglob("*.c"))}


def circles(found: dict[str, Found]) -> list[list[str]]:
    """Return each set of files that import each other, directly or through others."""
    reach = {name: set(file.imports) for name, file in found.items()}
    for middle in reach:  # Warshall's transitive closure
        for name in reach:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    sets = {frozenset(b for b in reach[a] if a in reach[b]) for a in reach}
    return sorted(sorted(files) for files in sets if files)


def upward(found: dict[str, Found]) -> list[str]:
    """Return "importer → imported" for each import of a higher layer."""
    return sorted(
        f"{name} → {other}"
        for name, file in found.items()
        for other in file.imports | file.for_types
        if name != "__init__.py" and layer(other) > layer(name)
    )


def layer(name: str) -> int:
    """Return the position of a file in LAYERS; the package's own __init__.py, `import ddpm`, stands above api."""
    part = "api" if name == "__init__.py" else _part(name)
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def figures(found: dict[str, Found]) -> dict[str, int]:
    """Return what MEASURED holds: lines of each part, then the counts."""
    lines = {row: 0 for row in AIMS}
    rows = {part: row for row in AIMS for part in row.split(", ")}
    for name, file in found.items():
        row = rows.get(_part(name), "__init__, old_names")
        lines[row] = lines.get(row, 0) + file.lines
        lines[ALL] += file.lines
        lines[CORE] += file.lines * bool(CORE_FILES.fullmatch(name))
    lines[CIRCULAR] = sum(len(files) for files in circles(found))
    lines[UPWARD] = len(upward(found))
    lines[INSIDE] = sum(file.inside for file in found.values())
    lines[PRIVATE] = sum(bool(file.private) for file in found.values())
    return lines


def too_much(found: dict[str, Found]) -> list[str]:
    """Return one line for each figure above its ceiling and each circle or upward import that is new."""
    wrong = [
        f"{name}: {value}, and the ceiling is {MEASURED.get(name, 0)}"
        for name, value in figures(found).items()
        if value > MEASURED.get(name, 0)
    ]
    wrong += [f"new import upwards: {line}" for line in upward(found) if line not in KNOWN_UPWARD]
    for files in circles(found):
        if not any(set(files) <= set(known) for known in KNOWN_CIRCLES):
            wrong.append(f"new circle: {', '.join(files)}")
    return wrong


def tree_differences(
    found: dict[str, Found], page: Path = SCRIPT.parents[1] / "CONTRIBUTING.md"
) -> list[str]:
    """Return one line for each file that the tree in CONTRIBUTING.md lacks, or names though it is gone."""
    named, folders = set(), [""]
    for line in page.read_text().split("```\n")[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth + 1 :] = [folders[depth] + name]
        if folders[-1].startswith("src/ddpm/") and not name.endswith("/"):
            named.add(folders[-1].removeprefix("src/ddpm/"))
    files = {name for name in found if not name.endswith("__init__.py")}
    return [f"lacks {name}" for name in sorted(files - named)] + [
        f"names {name}" for name in sorted(named - files)
    ]


def _part(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def _name(file: Path, source: Path) -> str:
    return file.relative_to(source).as_posix()


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def _walk(
    tree: ast.AST, function: bool = False, typing: bool = False
) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Yield every node, whether it stands in a function, and whether it stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        yield node, function, typing
        inside = function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for part, is_typing in ((node.body, True), (node.orelse, typing)):
                for statement in part:
                    yield statement, inside, is_typing
                    yield from _walk(statement, inside, is_typing)
        else:
            yield from _walk(node, inside, typing)


def _targets(node: ast.Import | ast.ImportFrom, files: dict[str, Found]) -> Iterator[str]:
    """Yield the files of the package that an import names. `from ddpm import __version__` names none."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        parts = name.split(".")
        if parts[0] != "ddpm" or name == "ddpm.__version__":
            continue
        for end in (len(parts), len(parts) - 1):
            path = "/".join(parts[1:end])
            if target := next(
                (p for p in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if p in files), ""
            ):
                yield target
                break


def _private_imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    for alias in node.names:
        name = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        if name.split(".")[0] not in ("ddpm", "__future__") and any(map(_is_private, name.split("."))):
            yield name


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not name.endswith("__")


def _defined(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a file itself defines: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and _is_private(node.name):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and _is_private(node.id):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_private(node.attr):
            yield from [node.attr] * (ast.unparse(node.value) == "self")


def _write(found: dict[str, Found]) -> None:
    """Put today's figures between the marks of this file, as ruff would format them."""
    block = ["MEASURED: dict[str, int] = {"]
    for name, value in figures(found).items():
        block.append(f'    "{name}": {value},' + (f"  # aim {AIMS[name]}" if name in AIMS else ""))
    block += ["}", *_list("KNOWN_CIRCLES: list[list[str]]", circles(found))]
    block += _list("KNOWN_UPWARD: list[str]", upward(found))
    text, new = SCRIPT.read_text(), "\n".join(["# begin", *block, "# end"])
    SCRIPT.write_text(re.sub(r"^# begin$.*?^# end$", lambda _: new, text, count=1, flags=re.M | re.S))


def _list(name: str, items: list[str] | list[list[str]]) -> list[str]:
    if not items:
        return [f"{name} = []"]
    lines = [f"{name} = ["]
    for item in items:
        if isinstance(item, str):
            lines.append(f'    "{item}",')
        else:
            lines += ["    [", *(f'        "{file}",' for file in item), "    ],"]
    return [*lines, "]"]


def main() -> int:
    found = measure()
    if "--write" in sys.argv[1:]:
        _write(found)
        return 0
    print(f"{'':<46}{'measured':>9}{'aim':>8}{'ceiling':>9}")
    for name, value in figures(found).items():
        print(f"{name:<46}{value:>9}{AIMS.get(name, '–'):>8}{MEASURED.get(name, 0):>9}")
    for files in circles(found):
        print(f"circle: {', '.join(files)}")
    for line in upward(found):
        print(f"upwards: {line}")
    for name, file in found.items():
        if file.for_types:
            print(f"for types only: {name} → {', '.join(sorted(file.for_types))}")
    for name, file in found.items():
        if file.private:
            print(f"private: {name}: {', '.join(sorted(file.private))}")
    for name, reason in ALLOWED.items():
        print(f"private, allowed: {name}: {reason}")
    for line in tree_differences(found):
        print(f"CONTRIBUTING.md: its tree {line}")
    wrong = too_much(found)
    for line in wrong:
        print(f"TOO MUCH: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
