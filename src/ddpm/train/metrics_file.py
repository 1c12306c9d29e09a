"""metrics.jsonl: a line of figures for each step that was logged, each step once, whatever stops a run."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ddpm.errors import DataError
from ddpm.io.files import open_regular, write_atomically
from ddpm.io.plain_data import is_number, parse_json

VALIDATED = ("val_loss", "val_loss_error", "val_eps_mse", "val_eps_mse_error")  # in a line together
MAX_BYTES = 1 << 28  # a million lines
MAX_LINE = 1 << 14  # bytes of each
MAX_STEP = 10**12


def append(path: Path, record: Mapping[str, float]) -> None:
    """Write a line. The file is opened anew and never created, so that a file that has gone raises OSError."""
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())


def cut(path: Path, step: int) -> None:
    """Delete what a resumed run writes again: lines past `step`, and all from the first malformed one.

    A killed process may have left half a line. Raises OSError, also for a file of more than MAX_BYTES.
    """
    kept = []
    with suppress(FileNotFoundError, ValueError):
        for line, record in _lines(path):
            if record["step"] <= step:
                kept.append(line)
    write_atomically(path, b"".join(kept))


def complete(path: Path, step: int, figures: Mapping[str, float]) -> None:
    """Cut the file, and add the line of a checkpoint's figures where a kill came between the two. Raises OSError."""
    cut(path, step)
    if "loss" in figures and not any(record["step"] == step for record in read(path)):
        append(path, {"step": step, **figures})


def read(path: Path) -> Iterator[dict[str, float]]:
    """Yield the lines of a file from anywhere. A last line without an end is still being written, and left out.

    Raises OSError, also for a file of more than MAX_BYTES, and ValueError for a malformed line.
    """
    return (record for _, record in _lines(path))


def validated_after(path: Path, step: int) -> bool:
    """Return whether a line past `step` has figures of a validation. Raises OSError for a file that cannot be read."""
    with suppress(FileNotFoundError, ValueError):  # a killed process may have left half a line
        return any(record["step"] > step and VALIDATED[0] in record for record in read(path))
    return False


def is_whole(path: Path) -> bool:
    """Return whether no line of a file is malformed; half a line at the end does not count. Raises OSError."""
    with suppress(FileNotFoundError):
        try:
            for _ in read(path):
                pass
        except ValueError:
            return False
    return True


def lowest(path: Path, key: str) -> float | None:
    """Return the lowest of the figures `key` in the lines before the first malformed one, or None."""
    found = []
    with suppress(OSError, ValueError):
        for record in read(path):
            found += [record[key]] if key in record else []
    return min(found, default=None)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, float]]]:
    """Yield each line with its figures, for all who read such a file. Raises OSError, ValueError."""
    with open_regular(path, MAX_BYTES) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                return
            if (record := _record(line)) is None:
                raise ValueError(f"line {number} makes no sense")
            yield line, record


def _record(line: bytes) -> dict[str, float] | None:
    """Parse a line of numbers, those that belong together all there; None if it is none."""
    try:
        record = parse_json(line) if len(line) <= MAX_LINE else None
    except DataError:
        return None
    if not isinstance(record, dict):
        return None
    needed = {"step", "loss", *(VALIDATED if record.keys() & set(VALIDATED) else ())}
    if not needed <= record.keys() or not all(map(is_number, record.values())):
        return None
    if not isinstance(step := record.pop("step"), int) or not 0 <= step <= MAX_STEP:
        return None
    return {"step": step, **{key: float(value) for key, value in record.items()}}
