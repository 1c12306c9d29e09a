"""Refuse typed settings that have no effect beside the other settings, by `needs` of their declarations."""

from collections.abc import Iterable, Sequence
from typing import Any

from ddpm.config.checking import by_key, declared
from ddpm.config.limits import Key
from ddpm.config.overrides import literal
from ddpm.config.tables import REGISTERED
from ddpm.errors import UserError


def refuse_unused(jobs: Iterable[tuple[Sequence[str], Any]]) -> None:
    """Raise UserError for an override that has no effect in any of the jobs: the overrides and the config of each.

    A value that says "off" (null, false, 0) is no setting. What a plug-in reads is not known.
    """
    found = [_unused(*job) for job in jobs]
    for key, message in found[0].items():
        if all(key in each for each in found):
            raise UserError(message)


def _unused(overrides: Sequence[str], config: Any) -> dict[str, str]:
    """Return a message for each typed key without effect, by the key."""
    keys, values, found = declared(type(config)), by_key(config), dict[str, str]()
    for override in overrides:
        key, _, typed = override.lstrip("+").partition("=")
        declarations = [keys.get(name, Key()) for name in dict.fromkeys([key.partition(".")[0], key])]
        needs = " ".join(each.needs for each in declarations).split()
        for need in needs if values.get(key) else []:
            gate, _, wanted = need.partition("=")
            gate, other = gate.rstrip("!"), gate.endswith("!")
            if not _holds(gate, wanted, other, values):
                now = f"{gate}={literal(values[gate])}".replace("'", "")
                if other:
                    need = f"{gate}=…" if wanted == "null" else f"another {gate}"
                found.setdefault(key, f"{key}={typed}: has no effect with {now}; it needs {need}")
    return found


def _holds(gate: str, wanted: str, other: bool, values: dict[str, Any]) -> bool:
    """Return whether the key `gate` has the wanted value, or any other; the command may lack the key."""
    if gate not in values:
        return True
    value = values[gate] if isinstance(values[gate], list) else [literal(values[gate]).strip("'")]
    registered = {name for names in REGISTERED.values() for name in names}
    return bool(registered.intersection(value)) or (wanted in value) != other
