"""Compose and check with Hydra: a mistake is one UserError, and no folder is made."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ddpm.config.choices import CONFIG_DIR, choices, known_keys, plugin_hint
from ddpm.config.limits import nearest
from ddpm.config.schema import PATH_KEYS
from ddpm.errors import UserError, install_hint

# Values that are paths are quoted for Hydra, whose grammar has no é, #, ~ or ( and reads 12_34 as a number.
QUOTED = (*PATH_KEYS, "gpus")  # gpus=0,2,3 is one value, too


def read_overrides(arguments: list[str]) -> list[str]:
    """The arguments as Hydra overrides, paths quoted. Raises UserError for flags that are not ours."""
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(f"unknown flag '{argument}'; see ddpm-… --help (settings are written key=value)")
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(f"'{argument}': settings are written key=value")
    return [quote_path(argument) for argument in arguments]


def compose(program: str, overrides: list[str]) -> dict[str, Any]:
    """configs/<program>.yaml with the overrides as plain data, interpolations resolved. Raises UserError."""
    plain = _composed(program, overrides)
    missing = [key for key, value in _flat(plain) if value == "???"]
    if missing:
        raise UserError(f"{missing[0]} is needed: {missing[0]}=…")
    return plain


@contextmanager
def parsed(program: str, overrides: list[str]) -> Iterator[list[Any]]:
    """The overrides as Hydra's own objects, whose sweeps (glob(*), too) can be unrolled inside. Raises UserError."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            loader = GlobalHydra.instance().config_loader()
            yield OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    except HydraException as error:
        raise UserError(one_line(error, program)) from None


def hydra_settings(program: str, overrides: list[str]) -> dict[str, Any]:
    """What Hydra itself is told: its launcher, its sweeper. Raises UserError."""
    settings = _composed(program, overrides, of_hydra=True)["hydra"]
    assert isinstance(settings, dict)
    return settings


def _composed(program: str, overrides: list[str], of_hydra: bool = False) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            config = hydra_compose(program, overrides, return_hydra_config=of_hydra)
        plain = OmegaConf.to_container(config, resolve=not of_hydra)
    except MissingConfigException as error:
        raise UserError(_missing_choice(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error, program)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def typed_value(overrides: list[str], key: str) -> str | None:
    """The last value typed for a key, without the quotes that `read_overrides` added."""
    values = [
        value
        for name, _, value in (override.partition("=") for override in overrides)
        if name.lstrip("+") == key
    ]
    if not values:
        return None
    value = values[-1]
    if len(value) < 2 or value[0] not in "'\"":
        return value
    return re.sub(r"(\\+)('|$)", lambda match: match[1][: len(match[1]) // 2] + match[2], value[1:-1])


def as_overrides(config: dict[str, Any]) -> list[str]:
    """A checked config as overrides, so that what is typed after them wins."""
    chosen, values = [], []
    for key, value in config.items():
        if not isinstance(value, dict):
            values.append(f"{key}={_literal(value)}")
            continue
        if "name" in value:
            file = next(file for file, content in choices(key).items() if content["name"] == value["name"])
            chosen.append(f"{key}={file}")
        values += [f"{key}.{name}={_literal(item)}" for name, item in value.items() if name != "name"]
    return chosen + values


def _literal(value: Any) -> str:
    """In Hydra's grammar. Raises UserError for a text that Hydra would take for an interpolation."""
    if isinstance(value, str):
        if "${" in value:
            raise UserError(f"'{value}': a stored config holds plain values only")
        return quoted(value)
    if isinstance(value, list):
        return "[" + ",".join(_literal(item) for item in value) + "]"
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else repr(value)
    )


def enter_hydra(program: str, arguments: list[str], task: Callable[[Any], Any]) -> None:
    """Hydra's own main, told to raise what it would print."""
    import hydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=program)(task)()
    except MissingConfigException as error:
        raise UserError(_missing_choice(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error, program)) from None


def quote_path(override: str, always: bool = False) -> str:
    """The override with its value in quotes, if it is a path."""
    key, equals, value = override.partition("=")
    bare = key.lstrip("+")
    if not (always or bare in QUOTED) or not equals or value in ("null", "") or value[0] in "'\"":
        return override
    return f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """In quotes; only backslashes in front of a quote mean anything to Hydra."""
    return "'" + re.sub(r"(\\+)('|$)", r"\1\1\2", text).replace("'", "\\'") + "'"


def _missing_choice(error: Any) -> str:
    """Hydra's "could not find" with the nearest choice."""
    path = str(error.missing_cfg_file or "")
    group, _, name = path.rpartition("/")
    options = [str(option) for option in error.options or []]
    if not group or not options:
        return str(error).splitlines()[0]
    if group == "hydra/launcher" or group == "hydra/sweeper":
        options = [option for option in options if option != "manual_launcher"]
        extra = "optuna" if group == "hydra/sweeper" else "sweep"
        more = f"; more come with: {install_hint(extra)}"
        return f"{group}={name}: must be one of {', '.join(options)}{nearest(name, options) or more}"
    if group == "recipe":
        return f"dataset={name} has no recipe: add configs/recipe/{name}.yaml"
    return f"{group}={name}: must be one of {', '.join(options)}{plugin_hint(group)}{nearest(name, options)}"


def one_line(error: Exception, program: str) -> str:
    """What Hydra or OmegaConf said, in one line, with the nearest key where a key is unknown."""
    text = str(error)
    if match := re.search(r"(?:Could not override|not at|Could not delete from config\.) '([^']+)'", text):
        key = match[1]
        if key not in (known := known_keys(program)):
            return f"unknown key '{key}'{nearest(key, known) or '; --help lists them'}"
        group = key.rpartition(".")[0]
        return f"'{key}': the chosen {group} has no such key; another {group} has"
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"'+{match[1]}=': this key is there already, write {match[1]}=…"
    if match := re.match(r"Ambiguous value for argument '([^=]+)=", text):
        return f"several values for {match[1]}: add -m to run a job for each, or write [a,b] for a list"
    return text.splitlines()[0] if text else type(error).__name__


def _flat(node: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
