"""Groups with a choice, whose YAML files are their schemas, and the choices that `ddpm.register` adds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ddpm.config.limits import GROUP_KEYS, PLUGIN_HINT, REQUIRED, Key, like, nearest
from ddpm.config.tables import TABLES
from ddpm.errors import UserError
from ddpm.io.plain_data import parse_yaml

_PACKAGED = Path(__file__).parents[1] / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "configs"


@dataclass(frozen=True)
class Component:
    """A named function or class and its parameters, as in `configs/<group>/<file>.yaml`."""

    name: str
    params: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.params}


def choose_sampler(base: Component | str, settings: Mapping[str, Any]) -> Component:
    """Return a sampler, given itself or by its file's name, with these settings. Raises UserError."""
    if isinstance(base, Component):
        return check_choice("sampler", {**base.to_dict(), **settings})
    known = choices("sampler")
    if not isinstance(base, str) or base not in known:
        hint = plugin_hint("sampler") + nearest(str(base), known)
        raise UserError(f"sampler={base}: must be one of {', '.join(known)}{hint}")
    return check_choice("sampler", {**known[base], **settings})


ADDED: dict[str, dict[str, dict[str, Any]]] = {}  # choices without a file, by group and name


def add_choice(group: str, content: dict[str, Any]) -> None:
    """Add what `ddpm.register` brings. Raises UserError where a key has another type or limits in its group."""
    for key, value in content.items():
        others = [c[key] for c in choices(group).values() if key in c and c["name"] != content["name"]]
        _like_any([*others, value], value, f"{group}.{key}")
    ADDED.setdefault(group, {})[content["name"]] = content


def choices(group: str) -> dict[str, dict[str, Any]]:
    """Return all choices of a group, `{file name without .yaml: its content}`."""
    return _files(group) | ADDED.get(group, {})


@cache
def _files(group: str) -> dict[str, dict[str, Any]]:
    files = sorted((CONFIG_DIR / group).glob("*.yaml"))
    return {file.stem: read_yaml(file) for file in files}


def plugin_hint(group: str) -> str:
    """Return a hint for an unknown name in a group that `ddpm.register` adds to, else ""."""
    return PLUGIN_HINT * any(group == table.group for table in TABLES.values())


def check_keys(raw: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    """Raise UserError where `raw` has other keys than the known ones; `path` goes in front of a key."""
    known = list(known)
    for key in raw:
        if key not in known:
            hint = nearest(str(key), known)
            raise UserError(f"unknown key '{path}{key}'{hint} (known: {', '.join(known)})")
    for key in known:
        if key not in raw:
            raise UserError(f"'{path}{key}' is missing")


def check_choice(path: str, raw: Any) -> Component:
    """Return what was chosen for the group `path`: `raw` is its name and all of its keys. Raises UserError."""
    contents = choices(path).values()
    names = {content["name"] for content in contents}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        raise UserError(f"{path}={raw!r}: must be a set of keys with a name, of {', '.join(sorted(names))}")
    if raw["name"] not in names:
        hint = plugin_hint(path) + nearest(raw["name"], names)
        raise UserError(f"{path}.name='{raw['name']}': must be one of {', '.join(sorted(names))}{hint}")
    known = {key: None for content in contents if content["name"] == raw["name"] for key in content}
    absent = {key: GROUP_KEYS.get(f"{path}.{key}", Key()).absent for key in known}
    raw = {key: value for key, value in absent.items() if value is not REQUIRED} | dict(raw)
    check_keys(raw, known, path + ".")
    del known["name"]
    params = {}
    for key in known:  # which means the same in every file of its group
        examples = [content[key] for content in contents if key in content]
        params[key] = _like_any(examples, raw[key], f"{path}.{key}")
    return Component(raw["name"], params)


def _like_any(examples: list[Any], value: Any, path: str) -> Any:
    """Return `value` if it is of the examples' type and allowed; null if one of them is. Raises UserError."""
    if value is None and None in examples:
        return None
    allowed = GROUP_KEYS.get(path, Key()).allowed
    if path == "sampler.spacing" and isinstance(value, list):
        return like([0.0], value, path, allowed)
    example = next((example for example in examples if example is not None), None)
    return like(example, value, path, allowed)


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values; an empty one has none."""
    return parse_yaml(file.read_bytes())


def known_keys(program: str) -> list[str]:
    """Return every key that can be typed: those of configs/<program>.yaml, the groups, and their files' keys."""
    top = read_yaml(CONFIG_DIR / f"{program}.yaml")
    return [*own_keys(top), *default_files(top), *file_keys(default_files(top), {})]


def own_keys(top: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that are no group's, with their defaults."""
    return {key: value for key, value in top.items() if key not in ("defaults", "hydra")}


def default_files(top: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the groups that can be typed, each with the name of its default file or None."""
    entries = [entry for entry in top["defaults"] if isinstance(entry, dict)]
    groups = {group: file for entry in entries for group, file in entry.items() if " " not in group}
    if groups.pop("recipe", None):  # goes with the dataset, and names the model
        groups["model"] = None
    return groups


def file_keys(groups: Iterable[str], chosen: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the keys of the groups' chosen files with their values; of all files where none is chosen."""
    inside: dict[str, Any] = {}
    for group in groups:
        files, name = choices(group), chosen.get(group)
        for content in [files[name]] if name in files else files.values():
            inside |= {f"{group}.{key}": value for key, value in content.items() if key != "name"}
    return {key: value for key, value in inside.items() if not key.startswith("experiment.")}
