"""TAB: complete keys, choices, values and paths of a command line."""

import glob
import os
import re
from typing import Any

from ddpm.config.checking import declared
from ddpm.config.choices import CONFIG_DIR, choices, default_files, file_keys, own_keys, read_yaml
from ddpm.config.limits import Key, words
from ddpm.config.schema import PATH_KEYS, SCHEMAS

# A shell expands each word that it is offered, and runs a $(command) in a file's name: offer plain names only.
_PLAIN_PATH = re.compile(r"[\w./+=:,@%-]+")


def completions(program: str, line: str) -> list[str]:
    """Return what the last word of a command line can become. Hydra's own completion takes three times as long."""
    typed = line.split()[1:]
    word = typed.pop() if typed and not line[-1].isspace() else ""
    named = {key: value for key, _, value in (other.partition("=") for other in typed)}
    top = read_yaml(CONFIG_DIR / f"{program}.yaml")
    groups = default_files(top)
    # an experiment chooses by itself, and so does a checkpoint: then the keys of all files are possible
    chosen = named if {"experiment", "ckpt"} & named.keys() else groups | named
    inside = file_keys(groups, chosen)
    key, equals, value = word.partition("=")
    if not equals:
        whole = {
            f"{name}=" for name in [*own_keys(top), *groups, *inside] if name.count(".") == word.count(".")
        }
        parts = {f"{name.partition('.')[0]}." for name in inside} if "." not in word else set()
        return sorted(name for name in whole | parts if name.startswith(word))
    if key in groups:
        values = list(choices(key))
    elif key in PATH_KEYS:
        found = filter(_PLAIN_PATH.fullmatch, glob.glob(f"{glob.escape(value)}*"))
        values = [path + "/" * os.path.isdir(path) for path in found]
    else:
        of_key = declared(SCHEMAS[program]).get(key, Key())
        values = _values(of_key, (own_keys(top) | inside).get(key))
    return sorted(f"{key}={one}" for one in values if one.startswith(value))


def _values(key: Key, example: Any) -> list[str]:
    """Return the words that a key takes or, where it takes any number, its default."""
    if allowed := words(key.allowed):
        return list(allowed)
    if isinstance(example, bool):
        return ["false", "true"]
    return [] if example is None or isinstance(example, list) else [str(example)]
