"""Checks of a user's parameters. Each error is one line: the parameter, its value and what is allowed."""

import math
from collections.abc import Iterable


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
