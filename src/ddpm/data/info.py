"""Describe a dataset's images, without importing torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddpm.errors import DataError, is_plain

# Lowest and highest value of each number in a DatasetInfo
FACT_LIMITS = {"channels": (1, 16), "image_size": (1, 1024), "num_classes": (0, 10_000), "levels": (2, 256)}
MAX_NAME = 255  # characters, as many as a file name can have


@dataclass(frozen=True)
class DatasetInfo:
    """Shape, classes and grey levels of a dataset's images. A dataset function sets them; no config does."""

    name: str
    channels: int
    image_size: int
    num_classes: int  # 0: no labels
    class_names: tuple[str, ...]
    levels: int  # grey levels a pixel can take


def check_facts(facts: DatasetInfo) -> None:
    """Raise DataError, one short line whatever the value is, for a value that is not allowed."""
    if not isinstance(facts, DatasetInfo) or not _is_name(facts.name):
        raise DataError("the dataset's facts must be a DatasetInfo, with a name of plain text")
    for key, (low, high) in FACT_LIMITS.items():
        value = getattr(facts, key)
        if type(value) is not int or not low <= value <= high:
            must = f"must be a whole number from {low} to {high}"
            raise DataError(f"dataset {facts.name}: facts.{key}={value!r:.40}; {must}")
    names = facts.class_names
    if not isinstance(names, tuple) or len(names) not in (0, facts.num_classes):
        must = f"must be a tuple, empty or of {facts.num_classes} names"
        raise DataError(f"dataset {facts.name}: facts.class_names {must}")
    if strange := [name for name in names if not _is_name(name)]:
        raise DataError(f"dataset {facts.name}: the class name {strange[0]!a:.40} is no plain, short text")


LISTED = 20  # classes in a message


def listed(names: Sequence[str], most: int | None = LISTED) -> str:
    """List the classes with their numbers, as in "0 'cat', 1 'dog'"; None lists them all."""
    shown = [f"{number} '{name}'" for number, name in enumerate(names[:most])]
    more = [f"and {len(names) - len(shown):,} more"] if len(names) > len(shown) else []
    return ", ".join(shown + more)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and is_plain(name)


def facts(stored: Mapping[str, Any]) -> DatasetInfo:
    """Build a DatasetInfo from a checkpoint's JSON."""
    return DatasetInfo(**{**stored, "class_names": tuple(stored["class_names"])})
