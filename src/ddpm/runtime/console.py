"""What is written to the console, and how numbers look there."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ddpm.errors import printable
from ddpm.runtime.world import World


class Log:
    """Lines for the screen, above a progress bar, and for train.log."""

    def __init__(self, path: Path | None) -> None:
        """None: of a process that has nothing to say, as rank 0 says it.

        Raises OSError where there can be no such file, so that nothing else is written first.
        """
        self.path = path
        if path is not None:
            self._open(path).close()

    def say(self, text: str) -> None:
        """Raises OSError where train.log cannot be written."""
        if self.path is None:
            return
        text = printable(text)
        tell(text)
        with self._open(self.path) as file:
            file.write(text + "\n")

    def _open(self, path: Path) -> IO[str]:
        return open(path, "a", encoding="utf-8", opener=_no_link)


@contextmanager
def of_steps(
    own: World, num_steps: int, n: int, batch_size: int, leave: bool
) -> Iterator[tuple[Any, Callable[[int, int], None]]]:
    """On a terminal a bar over the steps of all batches; with it what is to be called when batches get smaller."""
    hidden = not (own.first and sys.stderr.isatty())
    with tqdm(unit="step", disable=hidden, dynamic_ncols=True, leave=leave) as bar:

        def count(left: int, size: int) -> None:
            bar.total = bar.n + num_steps * -(-left // size)

        def smaller(left: int, size: int) -> None:
            count(left, size)
            tqdm.write(f"{own.name}out of memory: going on with batch_size={size}, which changes no image")

        count(n, batch_size)
        yield bar, smaller


def tell(text: str) -> None:
    """A line for the screen; a screen that has gone (`| head`, a closed terminal) is no reason to stop."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def typed(folder: Path) -> str:
    """A folder as a shell takes it; one that is called `latest` is not the latest run."""
    return shlex.quote("./latest" if str(folder) == "latest" else str(folder))


def _no_link(path: str, flags: int) -> int:
    """A link in a folder that somebody else has made could lead anywhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def figures(record: dict[str, float]) -> str:
    """Both validation figures with their errors."""
    return ", ".join(
        f"{key} {record[key]:.4f} ± {record[key + '_error']:.4f}" for key in ("val_loss", "val_eps_mse")
    )


def duration(seconds: float) -> str:
    """In the largest unit that says enough."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
