"""Runs as text: a table for the screen, CSV for everything else, labels for pictures. Needs no torch."""

import csv
import io
import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddpm.config.choices import choices
from ddpm.errors import printable
from ddpm.evaluate.table import aligned
from ddpm.io.files import open_regular
from ddpm.report.runs import FIGURES, RunRow, ranked
from ddpm.runtime.console import typed

MAX_COLUMNS = 8  # of settings in the table; CSV has them all
HEAD = b"run,status,reason,"  # how `csv_text` begins
MAX_CELL = 24
MAX_NAME = 48
MAX_REASON = 100  # failed.txt and the CSV have all of it
# How often something is written and how much is kept, which changes no image.
HOUSEKEEPING = {f"trainer.{key}_every" for key in ("log", "validate", "sample", "checkpoint")} | {
    "trainer.keep"
}


def table(rows: Iterable[RunRow], figure: str) -> str:
    """Format runs for a terminal, best first: the settings that differ, and the reason where something is wrong."""
    rows = ranked(rows, figure)
    keys = varying(rows)
    shown = heads(keys[:MAX_COLUMNS])
    lines = [[*shown.values(), figure, "step", "seconds", "status", "run"]]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        step = f"{row.step}" if row.max_steps in (None, row.step) else f"{row.step}/{row.max_steps}"
        why = f": {textwrap.shorten(row.reason, MAX_REASON, placeholder='…')}" if row.reason else ""
        results = [
            measured(row, figure),
            step,
            seconds,
            row.status,
            row.name + why,
        ]  # whole names, to be copied
        lines.append([*(setting(row, key) for key in shown), *results])
    left = [i for i, cells in enumerate(zip(*lines[1:], strict=True)) if not all(map(_is_number, cells))]
    more = len(keys) - MAX_COLUMNS
    note = [f"{more} more settings differ: {', '.join(keys[MAX_COLUMNS:])}"] if more > 0 else []
    return "\n".join(printable(line).rstrip() for line in [*aligned(lines, left), *note])


def csv_text(rows: Iterable[RunRow], figure: str) -> str:
    """Format runs as CSV, best first: every setting that differs under its full key, numbers in full."""
    rows = ranked(rows, figure)
    keys = varying(rows)
    of_figures = ("best", "best_error", "best_step", "last", "last_error")
    head = ["run", "status", "reason", *keys, "step", "max_steps"]
    head += [f"{name}_{part}" for name in FIGURES for part in of_figures]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, "images_per_second", "seconds", "parameters", "path"])
    for row in rows:
        cells: list[object] = [row.name, row.status, row.reason]
        cells += [text(row.settings[key]) if key in row.settings else None for key in keys]
        cells += [row.step, row.max_steps]
        for name in FIGURES:
            best, last = row.best(name), row.last(name)
            cells += [best.value, best.error, best.step] if best else [None] * 3
            cells += [last.value, last.error] if last else [None] * 2
        cells += [row.images_per_second, row.seconds, row.parameters, row.path.absolute()]
        writer.writerow([_cell(cell) for cell in cells])
    return out.getvalue()


def is_csv(path: Path) -> bool:
    """Return whether a file begins as `csv_text` does."""
    try:
        with open_regular(path) as file:
            return file.read(len(HEAD)) == HEAD
    except OSError:
        return False


def _cell(value: object) -> str:
    """Format a cell of CSV; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    text = "" if value is None else printable(str(value))
    is_number = re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", text)
    return f"'{text}" if text[:1] in tuple("=+-@") and not is_number else text


def label(row: RunRow, keys: Sequence[str]) -> str:
    """Describe a run in a picture: by the settings that differ, else by its name."""
    named = [f"{head}={setting(row, key)}" for key, head in heads(keys).items() if key in row.settings]
    return printable("  ".join(named)) or shortened(row.name, MAX_NAME)


def best(rows: Iterable[RunRow], figure: str) -> str | None:
    """Return the command that draws from the best run, or None where none has the figure."""
    first = next((row for row in ranked(rows, figure) if row.best(figure)), None)
    return None if first is None else f"best: ddpm-sample ckpt={typed(first.path)}"


def varying(rows: Sequence[RunRow]) -> list[str]:
    """Return the settings that differ between runs, in the config's order.

    A parameter that only some choices of a group have (schedule.s) differs where those runs disagree about it; one
    that differs because another choice brings another default says no more than the choice itself.
    """
    found = dict.fromkeys(itertools.chain.from_iterable(row.settings for row in rows))
    groups = list(dict.fromkeys(map(_group, found)))
    keys = sorted(
        (key for key in found if key not in HOUSEKEEPING), key=lambda key: groups.index(_group(key))
    )
    values = {key: {text(row.settings[key]) for row in rows if key in row.settings} for key in keys}
    different = [key for key in keys if len(values[key]) > 1]
    return [
        key
        for key in different
        if not (key != (choice := _choice(key)) and choice in different and _is_default(key, rows))
    ]


def text(value: Any) -> str:
    """Format a setting as it would be typed."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value) if isinstance(value, str) else json.dumps(value)


def setting(row: RunRow, key: str) -> str:
    """Format a run's setting as it is typed, shortened; a dash where the run has no such setting."""
    if key not in row.settings:
        return "–"
    value = row.settings[key]
    return shortened(f"{value:.6g}" if isinstance(value, float) else text(value).replace(", ", ","), MAX_CELL)


def measured(row: RunRow, figure: str) -> str:
    """Format the best value of a figure with its standard error."""
    point = row.best(figure)
    if point is None:
        return ""
    plain = 1e-3 <= abs(point.value) < 1e4
    return f"{point.value:.5f} ± {point.error:.5f}" if plain else f"{point.value:.3e} ± {point.error:.1e}"


def heads(keys: Sequence[str]) -> dict[str, str]:
    """Shorten keys to their last part, where that is unique and longer than a letter: lr, but schedule.s."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {
        key: last if lasts.count(last) == 1 and len(last) > 1 else key
        for key, last in zip(keys, lasts, strict=True)
    }


def shortened(value: str, room: int) -> str:
    """Cut the middle: the beginning and the end of a path say most."""
    end = len(value) + 1 - (room - room // 2)
    return value if len(value) <= room else f"{value[: room // 2]}…{value[end:]}"


def _is_number(cell: str) -> bool:
    return not cell.strip("0123456789.e+-/ ±–")


def _group(key: str) -> str:
    return key.partition(".")[0]


def _choice(key: str) -> str:
    """Return the setting that selects the file of its group, which holds a parameter's default."""
    return "objective.prediction" if _group(key) == "objective" else _group(key)


def _is_default(key: str, rows: Sequence[RunRow]) -> bool:
    """Return whether every choice has one value in all runs, the default in one of its files."""
    group, _, parameter = key.partition(".")
    values: dict[str, set[str]] = {}
    for row in rows:
        if key in row.settings:
            values.setdefault(row.settings[_choice(key)], set()).add(text(row.settings[key]))
    defaults = {
        (content.get("name", content.get("prediction")), text(content[parameter]))
        for content in choices(group).values()
        if parameter in content
    }
    return all(len(own) == 1 and (name, *own) in defaults for name, own in values.items())
