"""Parse YAML and JSON from anywhere: plain values of bounded size and depth, and DataError for all else."""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn

import yaml

from ddpm.errors import DataError

MAX_DEPTH = 8  # of YAML
MAX_DIGITS = 64  # characters of a number; what is longer is a text in YAML, and refused in JSON
MAX_NUMBER = 1e300


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's parser where it is installed: ten times as fast. Its constructors are not used."""


# YAML 1.1 takes 1e-3 for a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_construct = yaml.constructor.SafeConstructor()
_KINDS = {
    "tag:yaml.org,2002:null": _construct.construct_yaml_null,
    "tag:yaml.org,2002:bool": _construct.construct_yaml_bool,
    "tag:yaml.org,2002:int": _construct.construct_yaml_int,
    "tag:yaml.org,2002:float": _construct.construct_yaml_float,
}


def parse_yaml(data: bytes) -> dict[str, Any]:
    """Parse a set of keys, whose values are plain ones, lists or such sets; {} of an empty file.

    Dates are texts. Raises DataError, without the file's name, also for tags, anchors, aliases and deep nesting.
    """
    try:
        events = yaml.parse(data.decode(), _Loader)
        found = [_value(event, events, 0) for event in events if isinstance(event, yaml.NodeEvent)]
    except (yaml.YAMLError, ValueError, RecursionError):
        raise DataError("it is no YAML") from None
    if len(found) > 1 or not all(isinstance(each, dict) for each in found):
        raise DataError("it is no set of keys")
    return found[0] if found else {}


def _value(event: Any, rest: Iterator[Any], depth: int) -> Any:
    """Return the value that an event begins, and take its further events from `rest`. Raises DataError."""
    if depth > MAX_DEPTH or event.anchor is not None or event.tag is not None:
        raise DataError("it has tags, anchors, aliases or deep nesting, and only plain values are read")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value) if event.implicit[0] else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, rest, depth + 1) for item in _inside(rest)]
    found: dict[str, Any] = {}
    for key in _inside(rest):
        if not isinstance(key, yaml.ScalarEvent) or key.anchor is not None or key.tag is not None:
            raise DataError("it has keys that are no plain texts")
        if key.value in found:
            raise DataError(f"'{key.value[:80]}' stands twice")
        found[key.value] = _value(next(rest), rest, depth + 1)
    return found


def _inside(rest: Iterator[Any]) -> Iterator[Any]:
    """Return the events before the end of a list or set of keys, where each takes its own further ones."""
    return itertools.takewhile(lambda event: not isinstance(event, yaml.CollectionEndEvent), rest)


def _scalar(text: str) -> Any:
    """Return the null, truth value or number that a text without quotes stands for, else the text."""
    if len(text) <= MAX_DIGITS:
        for tag, pattern in _Loader.yaml_implicit_resolvers.get(text[:1], []):
            if tag in _KINDS and pattern.match(text):
                with suppress(ValueError):  # of 0x_
                    return _KINDS[tag](yaml.ScalarNode(tag, text))
    return text


def parse_json(data: bytes | str) -> Any:
    """Parse JSON of numbers that arithmetic stands: integers of at most MAX_DIGITS, others below MAX_NUMBER.

    Raises DataError, without the file's name, also where a name stands twice.
    """
    try:
        return _JSON.decode(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise DataError("it is no JSON of ddpm") from None


def is_number(value: object) -> bool:
    """Return whether a parsed value is a number; True and False are none."""
    return type(value) in (int, float)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("an integer is too long")
    return int(text)


def _float(text: str) -> float:
    if abs(number := float(text)) >= MAX_NUMBER:
        raise ValueError("a number is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_no_constant
)
