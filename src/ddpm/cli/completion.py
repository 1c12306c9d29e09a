"""The keys a command knows, by its YAML files: for the hint after a mistake, and for TAB."""

import glob
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ddpm.config import yaml_files
from ddpm.config.limits import LIMITS, Between
from ddpm.config.schema import CONFIG_DIR, choices

PATH_KEYS = (
    *("run_dir", "data_root", "ckpt", "out", "input", "mask", "samples"),
    *("dataset.path", "trainer.resume", "trainer.init_from"),
)
# What the shell takes as it is: it expands each word that it is offered, and runs a $(command) in a file's name.
_PLAIN_PATH = re.compile(r"[\w./+=:,@%-]+")


def known_keys(program: str) -> list[str]:
    """Every key that can be typed: those of configs/<program>.yaml, the groups, and the keys of all their files."""
    top = yaml_files.read(CONFIG_DIR / f"{program}.yaml")
    return [*_own(top), *_groups(top), *_of_groups(_groups(top), {})]


def completions(program: str, line: str) -> list[str]:
    """What the last word of a command line can become. Hydra could say it, too, but takes three times as long."""
    typed = line.split()[1:]
    word = typed.pop() if typed and not line[-1].isspace() else ""
    named = {key: value for key, _, value in (other.partition("=") for other in typed)}
    top = yaml_files.read(CONFIG_DIR / f"{program}.yaml")
    groups = _groups(top)
    # an experiment chooses by itself, and so does a checkpoint: then the keys of all files are possible
    chosen = named if {"experiment", "ckpt"} & named.keys() else groups | named
    inside = _of_groups(groups, chosen)
    key, equals, value = word.partition("=")
    if not equals:
        whole = {f"{name}=" for name in [*_own(top), *groups, *inside] if name.count(".") == word.count(".")}
        parts = {f"{name.partition('.')[0]}." for name in inside} if "." not in word else set()
        return sorted(name for name in whole | parts if name.startswith(word))
    if key in groups:
        values = list(choices(key))
    elif key in PATH_KEYS:
        found = filter(_PLAIN_PATH.fullmatch, glob.glob(f"{glob.escape(value)}*"))
        values = [path + "/" * os.path.isdir(path) for path in found]
    else:
        values = _values(key, (_own(top) | inside).get(key))
    return sorted(f"{key}={one}" for one in values if one.startswith(value))


def _own(top: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are no group's, with their defaults."""
    return {key: value for key, value in top.items() if key not in ("defaults", "hydra")}


def _groups(top: Mapping[str, Any]) -> dict[str, str | None]:
    """The groups that can be typed, and the file that each has by default, where it has one."""
    entries = [entry for entry in top["defaults"] if isinstance(entry, dict)]
    groups = {group: file for entry in entries for group, file in entry.items() if " " not in group}
    if groups.pop("recipe", None):  # goes with the dataset, and names the model
        groups["model"] = None
    return groups


def _of_groups(groups: Iterable[str], chosen: Mapping[str, str | None]) -> dict[str, Any]:
    """The keys of the chosen files of these groups, with what stands there; of all files where none is chosen."""
    inside: dict[str, Any] = {}
    for group in groups:
        files, name = choices(group), chosen.get(group)
        for content in [files[name]] if name in files else files.values():
            inside |= {f"{group}.{key}": value for key, value in content.items() if key != "name"}
    return {key: value for key, value in inside.items() if not key.startswith("experiment.")}


def _values(key: str, example: Any) -> list[str]:
    """The words that a key takes or, where it takes any number, what it is now."""
    allowed = LIMITS.get(key)
    if isinstance(allowed, tuple) and not isinstance(allowed, Between):
        return list(allowed)
    if isinstance(example, bool):
        return ["false", "true"]
    return [] if example is None or isinstance(example, list) else [str(example)]
