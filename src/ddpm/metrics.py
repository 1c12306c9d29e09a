"""metrics.jsonl: a line of figures for each step that was logged, each step once, whatever stops a run."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from ddpm.files import open_regular, write_atomically

VALIDATED = ("val_loss", "val_loss_error", "val_eps_mse", "val_eps_mse_error")  # in a line together
MAX_BYTES = 1 << 28  # a million lines


def append(path: Path, record: Mapping[str, float]) -> None:
    """Opened anew for each line and never created, so that a file that has gone is noticed."""
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())


def cut(path: Path, step: int) -> None:
    """Leave out what a resumed run writes again: lines past `step`, and all from one that makes no sense.

    A killed process may have left half a line.
    """
    text = ""
    if path.exists():
        with open_regular(path) as file:
            text = file.read(MAX_BYTES).decode(errors="replace")
    kept = ""
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (_is_record(record) and line.endswith("\n")):
            break
        if record["step"] <= step:
            kept += line
    write_atomically(path, kept.encode())


def _is_record(record: object) -> bool:
    """Whether it may be a line of metrics.jsonl: finite numbers, those that belong together all there."""
    if not isinstance(record, dict) or not all(type(value) in (int, float) for value in record.values()):
        return False
    needed = {"step", "loss", *(VALIDATED if record.keys() & set(VALIDATED) else ())}
    return needed <= record.keys() and all(abs(value) < math.inf for value in record.values())
