"""evaluation.json: the metrics of one set of images, their errors and the protocol. Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm.errors import DataError, UserError
from ddpm.io.files import read_bounded, write_atomically
from ddpm.io.plain_data import is_number, parse_json

FORMAT_VERSION = 1
FILE, PICTURE = "evaluation.json", "evaluation.png"
MAX_BYTES = 1 << 20  # a file has about 20 thousand
MAX_FIGURES = 256
MAX_TEXT = 4096  # characters
# Of the protocol: whole numbers with the smallest allowed, and other numbers.
WHOLE = {"n": 1, "split_images": 1, "image_size": 1}
WHOLE |= dict.fromkeys(("step", "seed", "num_steps", "batch_size", "feature_dim"), 0)
NUMBERS = ("evaluations_per_image", "guidance_scale", "guidance_rescale")


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

    unguided: where the images are guided, the same figures of images drawn without guidance.
    histogram: class shares of `samples` and of `real` test images, by `classes` (their names); empty without classes.
    curves: numbers by name for each curve. memorization: what `memorization.py` found, in plain data.
    """

    subject: str
    figures: Mapping[str, Metric]
    protocol: Mapping[str, Any]
    unguided: Mapping[str, Metric] = field(default_factory=dict)
    histogram: Mapping[str, list[Any]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memorization: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        parts = {"figures": plain(self.figures), "unguided": plain(self.unguided), "notes": list(self.notes)}
        return {"format_version": FORMAT_VERSION, **vars(self), **parts}


def plain(figures: Mapping[str, Metric]) -> dict[str, Any]:
    """Return figures as plain data."""
    return {name: figure.to_dict() for name, figure in figures.items()}


def write(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json, whole or not at all. Raises OSError, and ValueError for a number that is not finite."""
    write_atomically(path, json.dumps(evaluation.to_dict(), indent=2, allow_nan=False).encode())


def read(spec: str) -> Evaluation:
    """Read an evaluation.json, or the one in a folder, and check it. Raises UserError."""
    path = Path(spec)
    file = path / FILE if path.is_dir() else path
    data = read_bounded(file, MAX_BYTES)
    try:
        return _checked(parse_json(data))
    except (DataError, ValueError, TypeError, KeyError):
        raise DataError(f"{file}: is no evaluation.json of ddpm-eval (format {FORMAT_VERSION})") from None


def _checked(raw: Any) -> Evaluation:
    """Check what `write` writes. Raises ValueError, TypeError or KeyError."""
    if type(raw["format_version"]) is not int or raw["format_version"] != FORMAT_VERSION:
        raise ValueError("another format")
    parts = {key: raw[key] for key in ("protocol", "histogram", "curves", "memorization")}
    if not (
        _is_text(raw["subject"])
        and isinstance(raw["notes"], list)
        and all(isinstance(part, dict) for part in parts.values())
    ):
        raise ValueError("a part is not what it must be")
    check_protocol(parts["protocol"])
    notes = tuple(note[:MAX_TEXT] for note in raw["notes"] if isinstance(note, str))
    figures, unguided = metrics(raw["figures"]), metrics(raw.get("unguided", {}))
    return Evaluation(raw["subject"], figures, unguided=unguided, notes=notes, **parts)


def check_protocol(protocol: Mapping[str, Any]) -> None:
    """Check all of a protocol that is calculated with or printed. Raises ValueError that names the key."""
    for key, value in protocol.items():
        if key in WHOLE:
            right = type(value) is int and WHOLE[key] <= value < 2**64
        elif key in NUMBERS:
            right = is_number(value)
        elif key == "seconds":
            right = isinstance(value, dict) and all(map(is_number, value.values()))
        elif key == "sampler":
            right = (
                isinstance(value, dict)
                and _is_text(value.get("name"))
                and all(map(_is_short, value.values()))
            )
        else:
            right = _is_short(value)
        if not right:
            raise ValueError(key)


def metrics(raw: Any) -> dict[str, Metric]:
    """Check the figures of a file. Raises ValueError, TypeError."""
    if not isinstance(raw, dict) or len(raw) > MAX_FIGURES:
        raise ValueError("no figures by name, or too many")
    return {name: _metric(figure) for name, figure in raw.items()}


def _metric(raw: Mapping[str, Any]) -> Metric:
    figure = Metric(**raw)  # TypeError for other keys
    for key, value in raw.items():
        if not (_is_text(value) if key == "text" else is_number(value)):
            raise ValueError(key)
    low, high = (figure.value if end is None else end for end in (figure.low, figure.high))
    if not low <= figure.value <= high:
        raise ValueError("an interval without its value")
    return figure


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_short(value: object) -> bool:
    return not isinstance(value, str) or len(value) <= MAX_TEXT


def read_all(specs: list[str]) -> list[Evaluation]:
    """Read each for `compare=`. Raises UserError that names the key."""
    try:
        return [read(spec) for spec in specs]
    except DataError as error:
        raise UserError(f"compare: {error}") from None
