"""A user's own schedule, sampler or dataset beside those of ddpm; `docs/extending.md` shows one of each."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

# What a function of each kind begins with, and the keys that all choices of its group have.
BEGIN = {
    "schedule": ["num_timesteps"],
    "sampler": ["denoiser", "levels", "x", "noise"],
    "dataset": ["data_root"],
}
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
}


def register(
    kind: Literal["schedule", "sampler", "dataset"], *, name: str | None = None, **defaults: Any
) -> Callable[[Function], Function]:
    """Decorator: makes a function a choice, `<kind>=<name>`; `name` is the function's own unless given.

    The parameters after those the kind begins with are its keys; each needs a default, which says its type.
    `defaults` are for keys that every choice of the kind has, such as `num_steps` of a sampler. Raises
    UserError for a name that is taken and for a function that does not fit.
    """

    def add(function: Function) -> Function:
        _add(kind, name or function.__name__, function, defaults)
        return function

    return add


def _add(kind: str, name: str, function: Callable[..., Any], defaults: dict[str, Any]) -> None:
    from ddpm.config.choices import add_choice
    from ddpm.data.datasets import DATASETS
    from ddpm.diffusion.samplers import SAMPLERS
    from ddpm.diffusion.schedules import SCHEDULES
    from ddpm.errors import UserError

    tables: dict[str, dict[str, Any]] = {"schedule": SCHEDULES, "sampler": SAMPLERS, "dataset": DATASETS}
    if kind not in tables:
        raise UserError(f"register('{kind}'): must be one of {', '.join(tables)}")
    here = f"{kind} '{name}'"
    if not (name.isidentifier() and name.isascii()):
        raise UserError(f"{here}: a name is made of the letters a to z, digits and _")
    if name in tables[kind] and _home(tables[kind][name]) != _home(function):  # not just a cell run again
        raise UserError(f"{here} exists already, in {_home(tables[kind][name])}: choose another name")
    parameters = list(inspect.signature(function).parameters.values())
    begin, own = BEGIN[kind], {p.name: _plain(p.default) for p in parameters[len(BEGIN[kind]) :]}
    if [p.name for p in parameters[: len(begin)]] != begin:
        raise UserError(f"{here}: its parameters must begin with {', '.join(begin)}")
    for key, default in own.items():
        if key in ("name", *COMMON[kind]):
            raise UserError(f"{here}: '{key}' cannot be its own parameter, every {kind} has that key")
        if default is inspect.Parameter.empty:
            raise UserError(f"{here}: its parameter '{key}' needs a default")
    if unknown := defaults.keys() - COMMON[kind].keys():
        raise UserError(f"{here}: register takes no {min(unknown)} (known: {', '.join(COMMON[kind])})")
    add_choice(kind, {"name": name, **COMMON[kind], **defaults, **own})
    tables[kind][name] = function


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def _home(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
