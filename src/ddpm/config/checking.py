"""Read the declarations of a command's keys, and check a config against them.

A schema is a dataclass of `schema.py`: each field's type and `key(…)` declare a key.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ddpm.config.choices import Component, check_choice, check_keys
from ddpm.config.limits import GROUP_KEYS, Interval, Key, Labels, Several, like, number_or_name
from ddpm.errors import UserError


def key(*declared: Any, **more: Any) -> Any:
    """Declare a field of a config; the arguments are those of `Key`."""
    return dataclasses.field(metadata={"key": Key(*declared, **more)})


def declared(schema: type) -> dict[str, Key]:
    """Return every key of a command by its full name, those of its groups too."""
    found: dict[str, Key] = {}
    for field in dataclasses.fields(schema):
        found[field.name] = field.metadata["key"]
        if dataclasses.is_dataclass(field.type) and field.type is not Component:
            inner = declared(typing.cast(type, field.type))
            found |= {f"{field.name}.{name}": inside for name, inside in inner.items()}
        elif Component in (field.type, *typing.get_args(field.type)):
            found |= {
                name: inside for name, inside in GROUP_KEYS.items() if name.startswith(f"{field.name}.")
            }
    return found


def groups(schema: type) -> list[str]:
    """Return the keys that choose a file."""
    return [
        field.name
        for field in dataclasses.fields(schema)
        if any(map(dataclasses.is_dataclass, (field.type, *typing.get_args(field.type))))
    ]


def check(schema: type, raw: Mapping[str, Any], path: str = "") -> Any:
    """Return `raw` as an instance of the dataclass `schema`.

    Raises UserError with one line: the full key, the value, and what is allowed.
    """
    fields = dataclasses.fields(schema)
    check_keys(raw, [field.name for field in fields], path)
    return schema(
        **{f.name: _value(f.type, raw[f.name], path + f.name, f.metadata["key"].allowed) for f in fields}
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a checked config as plain data, the inverse of `check`."""

    def plain(part: Any) -> Any:
        if isinstance(part, Component):
            return part.to_dict()
        return vars(part) if dataclasses.is_dataclass(part) else part

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def by_key(config: Any) -> dict[str, Any]:
    """Return a checked config by key, as it is typed: flat, the name of a choice under its group."""
    flat: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        for inner, item in value.items() if isinstance(value, dict) else [("", value)]:
            flat[key if inner in ("", "name") else f"{key}.{inner}"] = item
    return flat


def _value(hint: Any, value: Any, path: str, allowed: Any) -> Any:
    if hint is Component:
        return check_choice(path, value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}: must be a set of keys")
        return check(typing.cast(type, hint), value, path + ".")
    if isinstance(hint, types.UnionType):  # … | None
        return None if value is None else _value(typing.get_args(hint)[0], value, path, allowed)
    if hint in (Several, Labels):
        if value == []:
            raise UserError(f"{path}=[]: must be a number, or a list of at least one")
        items = value if isinstance(value, list) else [value]
        if hint is Several:
            return Several(like([0], items, path, allowed))
        names = like([""], items, path, allowed)
        return "all" if names == ["all"] else Labels(map(number_or_name, names))
    if hint is Interval:
        ends = like([0.0], value, path, allowed)
        if len(ends) != 2 or ends[0] > ends[1]:
            raise UserError(f"{path}={value}: must be two rising numbers [low, high]")
        return ends
    if typing.get_origin(hint) is list:
        return like([typing.get_args(hint)[0]()], value, path, allowed)
    return like(hint(), value, path, allowed)
