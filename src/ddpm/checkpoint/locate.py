"""Find the checkpoints of a run or of `ckpt=`, and the newest intact one."""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ddpm.checkpoint.file import read_meta, verify
from ddpm.errors import CheckpointError
from ddpm.io.files import reason

T = TypeVar("T")
MAX_TRIES = 50  # to read the checkpoint of a run that writes one faster than it is read
_STEP = re.compile(r"step_[0-9]{1,12}\.safetensors")
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def saved_steps(run: Path) -> list[Path]:
    """Return the step files of a run by increasing step in their names, whatever their modification times.

    Raises OSError for a folder that cannot be read: it may hold some.
    """
    folder, names = run / "checkpoints", list[str]()
    with suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(folder)
    return sorted((folder / name for name in names if _STEP.fullmatch(name)), key=step_of)


def of_run(run: Path) -> list[Path]:
    """Return the checkpoints of a run by decreasing step; `best` is last if its header is broken."""
    files, best = list(reversed(saved_steps(run))), run / "checkpoints" / "best.safetensors"
    if not best.exists():
        return files
    try:
        step = read_meta(best)[0].step
    except CheckpointError:
        return [*files, best]
    newer = sum(step_of(file) >= step for file in files)
    return [*files[:newer], best, *files[newer:]]


def step_of(file: Path) -> int:
    """Return the step in a step file's name."""
    return int(file.stem.removeprefix("step_"))


def find(spec: str, outputs: Path = Path("outputs")) -> list[Path]:
    """Return the files that `spec` may mean, best first: a file, or `of_run` of a folder or "latest".

    Raises CheckpointError if there is none.
    """
    if spec == "latest":
        runs = [Path(folder) for folder, inside, _ in os.walk(outputs) if "checkpoints" in inside]
        files = [file for run in runs for file in saved_steps(run)]
        if not files:
            raise CheckpointError(f"no checkpoint under {outputs}/ yet: run ddpm-train first, or type ckpt=…")
        return find(str(max(files, key=lambda file: (_modified(file), file.name)).parent))
    path = Path(spec)
    try:
        path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise CheckpointError(f"cannot read {spec}: {reason(error)}") from None
    if path.is_dir():
        inside = path.name == "checkpoints" and not (path / "checkpoints").is_dir()
        files = of_run(path.parent if inside else path)
        if not files:
            raise CheckpointError(f"{path} holds no checkpoint (checkpoints/step_….safetensors)")
        return files
    if not path.exists():
        raise CheckpointError(f"{path} does not exist (ckpt is a checkpoint file, a run folder, or latest)")
    if path.suffix.lower() in PICKLED:
        convert = "convert one that you trust with scripts/convert_pt.py"
        raise CheckpointError(f"{path}: pickled checkpoints can run code and are not read; {convert}")
    return [path]


def newest_good(files: Sequence[Path], check: Callable[[Path], object] = verify) -> tuple[Path, list[str]]:
    """Return the first file that passes the check, and a warning for each file before it.

    Raises CheckpointError if none passes.
    """
    path, _, notes = read_newest(lambda: files, check)
    return path, notes


def read_newest(
    list_files: Callable[[], Sequence[Path]], read: Callable[[Path], T]
) -> tuple[Path, T, list[str]]:
    """Return the first of the listed files that `read` can read, what it returns, and a warning for each file before.

    A run that trains deletes its older checkpoints: where a listed file has gone, list them again. So `read` does all
    that needs the file. Raises CheckpointError if it does so for all of them, or if there is none.
    """
    for attempt in itertools.count():
        files, notes = list_files(), list[str]()
        for number, file in enumerate(files):
            try:
                return file, read(file), notes
            except (CheckpointError, FileNotFoundError) as error:
                if attempt < MAX_TRIES and not file.exists():
                    break
                if len(files) == 1:
                    raise
                following = f"; trying {files[number + 1]}" if number + 1 < len(files) else ""
                notes.append(f"warning: {error}{following}")
        else:
            break
    if not files:
        raise CheckpointError("no checkpoint yet")
    first = notes[0].removeprefix("warning: ").partition("; trying ")[0]
    raise CheckpointError(f"{first}; nor is any other of the {len(files)} checkpoints there whole")


def read_wanted(ckpt: str, read: Callable[[Path], T]) -> tuple[Path, T, list[str]]:
    """Read what `ckpt=` names: a file, the newest intact file of a run's folder, or of the latest run.

    See `find` and `read_newest`.
    """
    return read_newest(lambda: find(ckpt), read)


def _modified(file: Path) -> int:
    """Return the modification time in ns, 0 for a file that is gone."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
