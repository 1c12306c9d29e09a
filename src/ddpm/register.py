"""A user's own schedule, sampler, network and so on beside those of ddpm; `docs/extending.md` shows one of each."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from ddpm.config.choices import ADDED, add_choice, choices
from ddpm.config.tables import REGISTERED, TABLES, Names
from ddpm.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

# What a function of each kind begins with.
BEGIN = {
    "schedule": ["num_timesteps"],
    "sampler": ["denoiser", "levels", "x", "noise"],
    "dataset": ["data_root"],
    "metric": ["samples", "reference"],
    "network": ["image_size", "in_channels", "out_channels", "num_classes"],
    "prediction": ["alpha", "sigma"],
    "weight": ["snr"],
    "timesteps": ["seed", "step", "index", "batch_size", "num_timesteps"],
    "optimizer": ["network", "lr", "betas", "weight_decay"],
    "logger": ["run_dir", "settings", "step", "max_steps"],
}
# The keys that all choices of a group have. Of these groups, further parameters are keys.
COMMON: dict[str, dict[str, Any]] = {
    "schedule": {"num_timesteps": 1000},
    "sampler": {
        "num_steps": 50,
        "spacing": "linspace",
        "rho": 7.0,
        "clip": "clip",
        "dynamic_percentile": 0.995,
    },
    "dataset": {},
    "model": {"conditional": False},
}


def register(kind: str, *, name: str | None = None, **defaults: Any) -> Callable[[Function], Function]:
    """Decorator: make a function or class one of its kind, to be typed by `name` (its own unless given).

    Of a schedule, sampler, dataset and network, the parameters after those that the kind begins with are keys; each
    needs a default, which says its type. `defaults` are for keys that every choice of the kind has, such as
    `num_steps` of a sampler. Raises UserError for a name that is taken and for a function that does not fit.
    """

    def add(function: Function) -> Function:
        named = str(name or getattr(function, "__name__", ""))
        _add("network" if kind == "model" else str(kind), named, function, defaults)
        return function

    return add


def _add(kind: str, name: str, function: Callable[..., Any], defaults: dict[str, Any]) -> None:
    if kind not in TABLES:
        raise UserError(f"register('{kind}'): must be one of {', '.join(TABLES)}")
    here, (module, attribute, group, key) = f"{kind} '{name}'", TABLES[kind]
    if not (name.isidentifier() and name.isascii()):
        raise UserError(f"{here}: a name is made of the letters a to z, digits and _")
    table = getattr(import_module(module), attribute)
    if name in table and _home(table[name]) != _home(function):  # not just a cell run again
        raise UserError(f"{here} exists already, in {_home(table[name])}: choose another name")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise UserError(f"{here}: must be a function or class of Python ({error})") from None
    begin, rest = BEGIN[kind], parameters[len(BEGIN[kind]) :]
    if [p.name for p in parameters[: len(begin)]] != begin:
        raise UserError(f"{here}: its parameters must begin with {', '.join(begin)}")
    common = COMMON.get(group, {})
    if unknown := defaults.keys() - common.keys():
        raise UserError(f"{here}: register takes no {min(unknown)} (known: {', '.join(common)})")
    if group in COMMON:
        own = {p.name: _plain(p.default) for p in rest}
        for parameter, default in own.items():
            if parameter in ("name", *common):
                raise UserError(
                    f"{here}: its parameter '{parameter}' has the name of a key of every {kind}; rename it"
                )
            if default is inspect.Parameter.empty:
                raise UserError(f"{here}: its parameter '{parameter}' needs a default")
        plain = {key: _plain(value) for key, value in defaults.items()}
        add_choice(group, {"name": name, **common, **plain, **own})
    elif kind in ("prediction", "optimizer"):  # each has a file: this one gets a copy of the first
        like = {**choices(group)[next(iter(Names(kind)))]}
        extra = {"weight": "plain"} if kind == "prediction" else {}
        ADDED.setdefault(group, {})[name] = {**like, **extra, key: name}
    table[name] = REGISTERED[kind][name] = function


def _plain(default: Any) -> Any:
    """Convert numbers of other libraries, and tuples, to what a config holds."""
    default = default.tolist() if hasattr(default, "tolist") else default
    return list(default) if isinstance(default, tuple) else default


def _home(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
