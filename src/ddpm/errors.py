"""The errors a user can cause. Each message is one line that says what is wrong, where, and what is allowed."""

import math
import unicodedata
from collections.abc import Iterable
from pathlib import Path

TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder what follows in the line


def install_hint(extra: str = "") -> str:
    """Return the command that installs this, or an extra: into a checkout where this is one, else as a wheel."""
    checkout = Path(__file__).parents[2]
    name = f"-e '{checkout}" if (checkout / "pyproject.toml").is_file() else "'ddpm-toolkit"
    return f"pip install {name}{f'[{extra}]' * bool(extra)}'"


class UserError(Exception):
    """A mistake or a missing thing on the user's side; the command line prints it without a traceback."""


class RankError(UserError):
    """What only this one of several processes knows of, so that it has to say it itself."""


class DataError(UserError):
    """A data file is absent, malformed or not what it claims to be."""


class CheckpointError(UserError):
    """A checkpoint is absent, broken, or does not fit what it is used for."""


def printable(text: str) -> str:
    """Escape control characters, broken Unicode and turns of direction as \\x1b and the like, for a terminal."""
    return "".join(c if is_plain(c) and c not in TURNS else c.encode("unicode_escape").decode() for c in text)


def is_plain(text: str) -> bool:
    """Return whether a text has neither control characters nor lone surrogates (broken Unicode)."""
    return text.isprintable() or all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in text)


def one_of(parameter: str, value: str, choices: Iterable[str]) -> None:
    if value not in (allowed := list(choices)):
        raise ValueError(f"{parameter} = {value}: must be one of {', '.join(allowed)}")


def positive(parameter: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{parameter} = {value}: must be above 0")


def within(parameter: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        must = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{parameter} = {value}: must be {must}")
