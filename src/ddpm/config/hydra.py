"""Compose and check with Hydra: a mistake is one UserError, and no folder is made."""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.config.checking import groups
from ddpm.config.choices import ADDED, CONFIG_DIR, choices, known_keys, plugin_hint
from ddpm.config.limits import nearest
from ddpm.config.overrides import quote_path
from ddpm.config.schema import SCHEMAS
from ddpm.errors import UserError, install_hint

OF_HYDRA = (HydraException, OmegaConfBaseException)


def read_overrides(arguments: list[str]) -> list[str]:
    """Return the arguments as Hydra overrides, paths quoted. Raises UserError for flags that are not ours."""
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(f"unknown flag '{argument}'; see ddpm-… --help (settings are written key=value)")
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(f"'{argument}': settings are written key=value")
    return [quote_path(argument) for argument in arguments]


def compose(program: str, overrides: list[str]) -> dict[str, Any]:
    """Compose configs/<program>.yaml with the overrides as plain data, interpolations resolved. Raises UserError."""
    with _initialized(program, overrides):
        config = hydra.compose(program, overrides)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is needed: {missing[0]}=…")
    return dict(plain)


def hydra_settings(program: str, overrides: list[str]) -> Any:
    """Return the settings of Hydra itself: its launcher, its sweeper, its choices. Raises UserError."""
    with _initialized(program, overrides):
        return OmegaConf.to_container(hydra.compose(program, overrides, return_hydra_config=True).hydra)


@contextmanager
def parsed(program: str, overrides: list[str]) -> Iterator[list[Any]]:
    """Parse overrides into Hydra's objects, whose sweeps (glob(*), too) can be unrolled inside. Raises UserError."""
    with _initialized(program, overrides):
        loader = GlobalHydra.instance().config_loader()
        yield OverridesParser.create(config_loader=loader).parse_overrides(overrides)


def unrolled(override: Any) -> list[str]:
    """Return each override that a parsed, perhaps sweeping one stands for. Raises UserError for intervals and none."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: an interval has no end of values; list some: {key}=1,2")
    found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not found:
        raise UserError(f"{override.input_line}: holds no value; -m makes a run of each")
    return found


def enter_hydra(program: str, arguments: list[str], task: Callable[[Any], Any]) -> None:
    """Run Hydra's own main. Raises UserError for its errors, and what a launcher or the task raises."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *arguments]
    with _errors_in_one_line(program, arguments, OF_HYDRA):
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=program)(task)()


def answer_flags(program: str, arguments: list[str]) -> None:
    """Print what Hydra's own flags ask for, such as --cfg job. Raises UserError."""
    said = io.StringIO()
    try:
        with _errors_in_one_line(program, arguments), redirect_stderr(said):
            enter_hydra(program, arguments, lambda config: None)
    except SystemExit as end:  # of argparse, after its usage
        if end.code:
            raise UserError(said.getvalue().rpartition("error: ")[2].strip()) from None


@contextmanager
def _initialized(program: str, overrides: list[str]) -> Iterator[None]:
    GlobalHydra.instance().clear()
    with (
        hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)),
        _errors_in_one_line(program, overrides),
    ):
        yield


@contextmanager
def _errors_in_one_line(
    program: str, overrides: list[str], caught: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn what Hydra raises for typed overrides into UserError; it has no class for many of their mistakes."""
    _store_registered()
    try:
        yield
    except UserError:
        raise
    except MissingConfigException as error:
        raise UserError(_missing_choice(error)) from None
    except OverrideParseException as error:
        quote = "quote a value with other characters than letters and digits"
        raise UserError(f"{error.override}: settings are written key=value; {quote}: \"key='…'\"") from None
    except caught as error:
        known = isinstance(error, OF_HYDRA)
        raise UserError(_one_line(error, program) if known else _foreign(error, program, overrides)) from None


def _store_registered() -> None:
    """Let Hydra find registered choices, which have no YAML file. A dataset gets the recipe of `folder`."""
    store = ConfigStore.instance()
    for group, name, content in ((g, n, c) for g, contents in ADDED.items() for n, c in contents.items()):
        store.store(group=group, name=name, node=content)
        if group == "dataset":
            recipe = OmegaConf.load(CONFIG_DIR / "recipe" / "folder.yaml")
            store.store(group="recipe", name=name, node=recipe, package="_global_")


def _missing_choice(error: MissingConfigException) -> str:
    """Return Hydra's "could not find" as one line with the nearest choice."""
    path = str(error.missing_cfg_file or "")
    group, _, name = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
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


def _one_line(error: Exception, program: str) -> str:
    """Return what Hydra or OmegaConf said as one line, with the nearest key where a key is unknown."""
    text = str(error)
    if match := re.search(r"(?:Could not override|not at|Could not delete from config\.) '([^']+)'", text):
        key = match[1]
        if key not in (known := known_keys(program)):
            return f"unknown key '{key}'{nearest(key, known) or '; --help lists them'}"
        if group := key.rpartition(".")[0]:
            return f"'{key}': the chosen {group} has no such key; another {group} has"
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"'+{match[1]}=': this key is there already, write {match[1]}=…"
    if match := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '[+~]*([^=]+)=([^']*)", text):
        return _several(program, match[1], match[2])
    return text.splitlines()[0] if text else type(error).__name__


def _several(program: str, key: str, typed: str) -> str:
    """Return what to do with several values, typed as a,b, for a key."""
    if program == "train":
        return f"several values for {key}: add -m to run a job for each, or write [a,b] for a list"
    if program == "eval" and (key.startswith("guidance_") or key.partition(".")[0] == "sampler"):
        return f"several values for {key}: add -m to compare them"
    types = {field.name: str(field.type) for field in fields(SCHEMAS[program])}
    if re.search("list|Several|Labels|Interval", types.get(key, "")):
        return f"several values for {key}: a list is written {key}=[{typed}]"
    return f"{key}={typed}: must be one value"


def _foreign(error: Exception, program: str, overrides: list[str]) -> str:
    """Return an error that Hydra did not expect as one line, with the override that alone brings it."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    for override in overrides:
        try:
            hydra.compose(program, [override])
        except Exception as alone:
            if str(alone) != str(error):
                continue
            key = override.partition("=")[0].strip("+~ ")
            if key in groups(SCHEMAS[program]):
                text = f"must be one of {', '.join(choices(key))}"
            return f"{override}: {text}"
    return text
