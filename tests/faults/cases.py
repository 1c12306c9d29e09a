"""What a case of the fault harness is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """`run(folder, count)` makes `count` trials in an empty folder and returns the outcome in one line.

    It raises AssertionError where the promise is broken. `short` and `long` are the counts of pytest and of the drill.
    """

    name: str
    promise: str
    short: int
    long: int
    run: Callable[[Path, int], str]

    def __str__(self) -> str:
        return self.name
