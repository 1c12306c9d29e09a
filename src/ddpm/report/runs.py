"""Find, read and rank runs. Needs no torch.

Folders are untrusted, and their runs may train while they are read: files change, and go.
"""

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.checkpoint.header import brought_up_to_date
from ddpm.config.schema import TrainConfig, check, settings_of
from ddpm.errors import UserError, printable
from ddpm.io.files import read_regular, reason
from ddpm.io.plain_data import parse_yaml
from ddpm.runs.run_dir import FAILED, read_result
from ddpm.train import metrics_file

FIGURES = ("val_eps_mse", "val_loss")
MAX_RUNS = 10_000
MAX_TEXT = 1 << 16  # bytes of a config or a reason
_MARKS = {"config.yaml", "metrics.jsonl", FAILED}  # files that make a folder a run's
_PARTS = {
    "checkpoints",
    "samples",
    "tensorboard",
    "set_aside",
}  # folders of a run, in which no other run is looked for


@dataclass(frozen=True)
class Point:
    """A figure at a step, with its standard error."""

    step: int
    value: float
    error: float


@dataclass(frozen=True, eq=False)
class RunRow:
    """Results and settings of a run. `status` is done, running, failed, broken or stopped."""

    path: Path
    name: str
    status: str
    reason: str  # why it failed or cannot be read, or what of it cannot; else empty
    settings: Mapping[str, Any]  # as they are typed: schedule, schedule.s, optimizer.lr, …
    step: int
    max_steps: int | None  # None: not known, or said in epochs
    seconds: float | None  # of a finished run, since it was last started
    parameters: int | None
    images_per_second: float | None  # the median
    loss: Sequence[tuple[int, float]]  # training loss by step
    figures: Mapping[str, Sequence[Point]]  # for each of FIGURES, by step

    def best(self, figure: str) -> Point | None:
        return min(self.figures[figure], key=lambda point: point.value, default=None)

    def last(self, figure: str) -> Point | None:
        return self.figures[figure][-1] if self.figures[figure] else None


def find(root: Path) -> list[Path]:
    """Return the run folders at and under `root`, by name, and folders that cannot be read. Raises UserError.

    Links are not followed.
    """
    if not root.is_dir():
        raise UserError(f"folder={root}: {'is not a folder' if root.exists() else 'does not exist'}")
    found = list[Path]()

    def add_unread(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # it may go while it is read
            found.append(Path(error.filename))

    for path, folders, files in os.walk(root, onerror=add_unread):
        is_run = bool(_MARKS & {*files}) or "checkpoints" in folders
        if is_run:
            found.append(Path(path))
        if len(found) > MAX_RUNS:
            raise UserError(f"folder={root}: holds more than {MAX_RUNS:,} runs: name a part of it")
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not (is_run and n in _PARTS))
    return found


def read_all(roots: Sequence[Path], running: Callable[[Path], bool]) -> list[RunRow]:
    """Read every run at and under the folders, once. `running` says whether a process trains in a folder.

    Raises UserError where there is none.
    """
    runs: dict[Path, tuple[Path, str]] = {}
    for root in roots:
        for path in find(root):
            inside = path != root and len(roots) == 1
            runs.setdefault(path.resolve(), (path, str(path.relative_to(root) if inside else path)))
    if not runs:
        named = ", ".join(str(root) for root in roots)
        raise UserError(f"no run in {named}: a run's folder holds config.yaml, metrics.jsonl or checkpoints")
    return [_row(path, printable(name), running) for path, name in runs.values()]


def _row(path: Path, name: str, running: Callable[[Path], bool]) -> RunRow:
    """Read one run. Whatever goes wrong with it, the others are read."""
    try:
        return read(path, name, running)
    except Exception as error:
        why = f"cannot be read: {type(error).__name__}: {reason(error)}"
        none: dict[str, list[Point]] = {figure: [] for figure in FIGURES}
        return RunRow(path, name, "broken", why, {}, 0, None, None, None, None, [], none)


def read(path: Path, name: str, running: Callable[[Path], bool]) -> RunRow:
    """Read one run, whatever is left of it: what cannot be read becomes its `reason`."""
    busy = running(path)  # asked first, so that a run that ends now is not taken for a stopped one
    result, outline = read_result(path), _outline(path)
    loss: list[tuple[int, float]] = []
    speeds: list[float] = []
    figures: dict[str, list[Point]] = {figure: [] for figure in FIGURES}
    steps, notes = [outline.step, int(result["step"]) if result else 0], [outline.reason]
    try:
        for record in metrics_file.read(path / "metrics.jsonl"):
            steps.append(int(record["step"]))
            loss.append((steps[-1], record["loss"]))
            if "images_per_second" in record:
                speeds.append(record["images_per_second"])
            _add_figures(figures, steps[-1], record)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        notes.append(f"metrics.jsonl: {reason(error)}")
    if not any(figures.values()):
        _add_figures(figures, outline.step, outline.figures)
    failed = _failed(path)
    if result is not None:
        status = "done"
    elif busy:
        status = "running"
    elif failed is not None:
        status, notes = "failed", [failed]
    else:
        status = "broken" if outline.broken else "stopped"
    in_epochs = outline.settings.get("trainer.max_epochs")
    return RunRow(
        path,
        name,
        status,
        printable("; ".join(filter(None, notes))),
        outline.settings,
        max(steps),
        None if in_epochs else outline.settings.get("trainer.max_steps"),
        result.get("seconds") if result else None,
        outline.parameters,
        statistics.median(speeds) if speeds else None,
        loss,
        figures,
    )


def ranked(rows: Iterable[RunRow], figure: str) -> list[RunRow]:
    """Sort best first; runs without the figure come last."""
    return sorted(rows, key=lambda row: point.value if (point := row.best(figure)) else math.inf)


@dataclass(frozen=True)
class _Outline:
    """What a checkpoint or config.yaml says about a run."""

    settings: Mapping[str, Any]
    reason: str = ""
    broken: bool = False
    step: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None


def _outline(path: Path) -> _Outline:
    """Read the newest checkpoint whose header is whole, or config.yaml where there is none."""
    wrong = ""
    try:
        if locate.of_run(path):
            file, (meta, tensors), notes = locate.read_newest(
                lambda: locate.of_run(path), checkpoint.read_meta
            )
            settings = settings_of(checkpoint.config(file, meta))
            parameters = sum(math.prod(t.shape) for name, t in tensors.items() if name.startswith("model."))
            note = notes[0].removeprefix("warning: ").partition("; trying")[0] if notes else ""
            return _Outline(settings, brief(note, path), False, meta.step, meta.figures, parameters)
    except (UserError, OSError) as error:
        wrong = brief(reason(error), path)
    typed, of_config = _read_config(path)
    wrong = wrong or of_config
    return _Outline(typed, wrong, broken=bool(wrong))


def _read_config(path: Path) -> tuple[Mapping[str, Any], str]:
    """Read an untrusted config.yaml. Returns its settings, and what is wrong with it."""
    try:
        raw = parse_yaml(read_regular(path / "config.yaml", MAX_TEXT))
        return settings_of(check(TrainConfig, brought_up_to_date(raw))), ""
    except FileNotFoundError:
        return {}, ""
    except (UserError, OSError) as error:
        return {}, brief(f"config.yaml: {reason(error)}", path)


def _failed(path: Path) -> str | None:
    """Read why a job of a sweep failed. Returns None without such a file."""
    try:
        lines = read_regular(path / FAILED, MAX_TEXT).decode().splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return f"{FAILED} cannot be read"
    return lines[0].strip()[:300] if lines else "no reason given"


def _add_figures(figures: Mapping[str, list[Point]], step: int, record: Mapping[str, float]) -> None:
    for figure, points in figures.items():
        if figure in record and f"{figure}_error" in record:
            points.append(Point(step, float(record[figure]), float(abs(record[f"{figure}_error"]))))


def brief(message: str, path: Path) -> str:
    """Shorten a message to a line, and cut the path of the run's folder, which is named anyway."""
    message = message.replace(f"{path / 'checkpoints'}{os.sep}", "").replace(f"{path}{os.sep}", "")
    return message if len(message) <= 160 else message[:159] + "…"
