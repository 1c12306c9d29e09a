"""metrics.jsonl: a line of figures for each step that was logged, each step once, whatever stops a run."""

import errno
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
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

    A killed process may have left half a line. Raises OSError, also for a file of more than MAX_BYTES.
    """
    data = b""
    if path.exists():
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{path.name} has more than {MAX_BYTES} bytes")
    kept = b""
    for line in data.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (_is_record(record) and line.endswith(b"\n")):
            break
        if record["step"] <= step:
            kept += line
    write_atomically(path, kept)


def _is_record(record: object) -> bool:
    """Whether it may be a line of metrics.jsonl: finite numbers, those that belong together all there."""
    if not isinstance(record, dict) or not all(type(value) in (int, float) for value in record.values()):
        return False
    needed = {"step", "loss", *(VALIDATED if record.keys() & set(VALIDATED) else ())}
    return needed <= record.keys() and all(abs(value) < math.inf for value in record.values())


def lowest(path: Path, key: str) -> float | None:
    """The lowest of the figures `key` in the lines that make sense; None if there is none, or no such file."""
    found = []
    try:
        with open_regular(path) as file:
            lines = file.read(MAX_BYTES).splitlines()
    except OSError:
        return None
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if _is_record(record) and key in record:
                found.append(float(record[key]))
    return min(found, default=None)
