"""evaluation.json: the metrics of one set of images, their errors and the protocol. Needs no torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ddpm.errors import DataError, UserError
from ddpm.io.files import read_bounded, write_atomically

FORMAT_VERSION = 1
FILE, PICTURE = "evaluation.json", "evaluation.png"
MAX_BYTES = 1 << 22
MAX_FIGURES = 256
MAX_TEXT = 4096  # characters


@dataclass(frozen=True)
class Metric:
    """A value and its accuracy: interval or standard error, the floor subtracted, and n images (or draws)."""

    value: float
    low: float | None = None
    high: float | None = None
    error: float | None = None
    floor: float | None = None
    n: int | None = None
    text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """All of evaluation.json. `figures` that could not be measured are absent, and `notes` say why.

    histogram: class shares of `samples` and of `real` test images, by `classes` (their names); empty without classes.
    curves: numbers by name for each curve. memorization: what `memorization.py` found, in plain data.
    """

    subject: str
    figures: Mapping[str, Metric]
    protocol: Mapping[str, Any]
    histogram: Mapping[str, list[Any]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memorization: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        figures = {name: figure.to_dict() for name, figure in self.figures.items()}
        return {"format_version": FORMAT_VERSION, **vars(self), "figures": figures, "notes": list(self.notes)}


def write(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json, whole or not at all. Raises OSError, and ValueError for a number that is not finite."""
    write_atomically(path, json.dumps(evaluation.to_dict(), indent=2, allow_nan=False).encode())


def read(spec: str) -> Evaluation:
    """Read an evaluation.json, or the one in a folder, and check it. Raises UserError."""
    path = Path(spec)
    file = path / FILE if path.is_dir() else path
    data = read_bounded(file, MAX_BYTES)
    try:
        return _checked(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise DataError(f"{file}: is no evaluation.json of ddpm-eval (format {FORMAT_VERSION})") from None


def _checked(raw: Any) -> Evaluation:
    """Check what `write` writes. Raises ValueError, TypeError or KeyError."""
    json.dumps(raw, allow_nan=False)  # JSON of Python's may hold NaN and infinity, anywhere
    if type(raw["format_version"]) is not int or raw["format_version"] != FORMAT_VERSION:
        raise ValueError("another format")
    if not isinstance(raw["subject"], str) or len(raw["subject"]) > MAX_TEXT:
        raise ValueError("no subject")
    parts = {key: raw[key] for key in ("figures", "protocol", "histogram", "curves", "memorization")}
    if not all(isinstance(part, dict) for part in parts.values()) or len(parts["figures"]) > MAX_FIGURES:
        raise ValueError("no sets of keys")
    parts["figures"] = {name: _metric(figure) for name, figure in parts["figures"].items()}
    notes = tuple(note[:MAX_TEXT] for note in raw["notes"] if isinstance(note, str))
    return Evaluation(subject=raw["subject"], notes=notes, **parts)


def _metric(raw: Mapping[str, Any]) -> Metric:
    if unknown := raw.keys() - {each.name for each in fields(Metric)}:
        raise ValueError(f"unknown: {unknown}")
    for key, value in raw.items():
        if key == "text":
            right = isinstance(value, str) and len(value) <= MAX_TEXT
        else:
            right = type(value) in (int, float) and math.isfinite(value)
        if not right:
            raise ValueError(key)
    figure = Metric(**raw)
    low, high = (figure.value if end is None else end for end in (figure.low, figure.high))
    if not low <= figure.value <= high:
        raise ValueError("an interval without its value")
    return figure


def read_all(specs: list[str]) -> list[Evaluation]:
    """Read each for `compare=`. Raises UserError that names the key."""
    try:
        return [read(spec) for spec in specs]
    except DataError as error:
        raise UserError(f"compare: {error}") from None
