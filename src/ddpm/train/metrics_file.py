"""metrics.jsonl: a line of figures for each step that was logged, each step once, whatever stops a run."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeGuard

from ddpm.io.files import open_regular, read_regular, write_atomically

VALIDATED = ("val_loss", "val_loss_error", "val_eps_mse", "val_eps_mse_error")  # in a line together
MAX_BYTES = 1 << 28  # a million lines
MAX_LINE = 1 << 14  # bytes of each


def append(path: Path, record: Mapping[str, float]) -> None:
    """Opened anew for each line and never created, so that a file that has gone is noticed."""
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())


def cut(path: Path, step: int) -> None:
    """Leave out what a resumed run writes again: lines past `step`, and all from one that makes no sense.

    A killed process may have left half a line. Raises OSError, also for a file of more than MAX_BYTES.
    """
    data = read_regular(path, MAX_BYTES) if path.exists() else b""
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


def read(path: Path) -> Iterator[dict[str, float]]:
    """The lines of anybody's file, one by one. A last line without an end is being written, and not there yet.

    Raises OSError, also for a file of more than MAX_BYTES, and ValueError for a line that makes no sense.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise OSError(errno.EFBIG, f"more than {MAX_BYTES >> 20} MiB")
        for number in range(1, MAX_BYTES):
            line = file.readline(MAX_LINE + 1)
            if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                return
            try:
                record = json.loads(line) if len(line) <= MAX_LINE else None
            except (ValueError, RecursionError):
                record = None
            if not _is_record(record):
                raise ValueError(f"line {number} makes no sense")
            yield record


def _is_record(record: object) -> TypeGuard[dict[str, float]]:
    """Whether it may be a line of metrics.jsonl: finite numbers, those that belong together all there."""
    if not isinstance(record, dict) or not all(type(value) in (int, float) for value in record.values()):
        return False
    needed = {"step", "loss", *(VALIDATED if record.keys() & set(VALIDATED) else ())}
    step = record.get("step")
    if not isinstance(step, int) or not 0 <= step <= 10**12:
        return False
    # a whole number may also be too long to be a float at all
    return needed <= record.keys() and all(abs(value) < 1e300 for value in record.values())


def lowest(path: Path, key: str) -> float | None:
    """The lowest of the figures `key` in the lines that make sense; None if there is none."""
    best = None
    with suppress(OSError, ValueError):
        for record in read(path):
            if key in record and (best is None or record[key] < best):
                best = record[key]
    return best
