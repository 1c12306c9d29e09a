"""Overrides `key=value` as text: read values from them, quote paths, write a config as overrides. No Hydra."""

import re
from typing import Any

from ddpm.config.choices import choices
from ddpm.config.schema import PATH_KEYS
from ddpm.errors import UserError

# Values that are paths are quoted for Hydra, whose grammar has no é, #, ~ or ( and reads 12_34 as a number.
QUOTED = (*PATH_KEYS, "gpus")  # gpus=0,2,3 is one value, too
LISTS = ("compare", "label")  # each item is quoted


def typed_value(overrides: list[str], key: str) -> str | None:
    """Return the last value typed for a key, without the quotes that `quote_path` added; None if there is none."""
    for override in reversed(overrides):
        name, _, value = override.partition("=")
        if name.lstrip("+") == key:
            if len(value) < 2 or value[0] not in "'\"":
                return value
            return re.sub(r"(\\+)('|$)", lambda match: match[1][: len(match[1]) // 2] + match[2], value[1:-1])
    return None


def as_overrides(config: dict[str, Any]) -> list[str]:
    """Return a checked config as overrides, so that what is typed after them wins.

    Raises UserError for a text that Hydra would take for an interpolation.
    """
    chosen, values = [], []
    for key, value in config.items():
        if not isinstance(value, dict):
            values.append(f"{key}={literal(value)}")
            continue
        if "name" in value:
            file = next(file for file, content in choices(key).items() if content["name"] == value["name"])
            chosen.append(f"{key}={file}")
        values += [f"{key}.{name}={literal(item)}" for name, item in value.items() if name != "name"]
    return chosen + values


def literal(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    match value:
        case str():
            if "${" in value:
                raise UserError(f"'{value}': a stored config holds plain values only")
            return quoted(value)
        case list():
            return "[" + ",".join(map(literal, value)) + "]"
        case None:
            return "null"
        case bool():
            return str(value).lower()
    return repr(value)


def quote_path(override: str) -> str:
    """Put the value of an override into quotes if it is a path, or the name of a class; each of [a,b]."""
    key, equals, value = override.partition("=")
    if key.lstrip("+") in LISTS and value not in ("null", ""):
        items = value[1:-1].split(",") if value[0] == "[" and value[-1] == "]" else [value]
        if key == "label" and "," in value and items == [value]:
            return override  # of which Hydra says that there are several
        items = [item.strip("\"' ") for item in items if item]
        return f"{key}=[{','.join(map(quoted, items))}]"
    if key.lstrip("+") not in QUOTED or not equals or value in ("null", "") or value[0] in "'\"":
        return override
    return f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """Put text into quotes for Hydra; backslashes mean something to it only in front of a quote."""
    return "'" + re.sub(r"(\\+)('|$)", r"\1\1\2", text).replace("'", "\\'") + "'"
