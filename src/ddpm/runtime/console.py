"""Print to the console and to train.log, and format numbers for them."""

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
        """Open the file once, so that nothing else is written where that fails. None: print nothing, as rank 0 does.

        Raises OSError.
        """
        self.path = path
        if path is not None:
            self._open(path).close()

    def say(self, text: str) -> None:
        """Print a line and append it to the file. Raises OSError where it cannot be written."""
        if self.path is None:
            return
        text = printable(text)
        tell(text)
        with self._open(self.path) as file:
            file.write(text + "\n")

    def _open(self, path: Path) -> IO[str]:
        """Open for appending, but no symbolic link: in a folder that somebody else made it could lead anywhere."""
        no_link = getattr(os, "O_NOFOLLOW", 0)
        return open(path, "a", encoding="utf-8", opener=lambda name, how: os.open(name, how | no_link, 0o666))


@contextmanager
def of_steps(
    own: World, num_steps: int, n: int, batch_size: int, leave: bool
) -> Iterator[tuple[Any, Callable[[int, int], None]]]:
    """Show a bar over the steps of all batches on a terminal. Yields it and a function for smaller batches.

    Call that function with how many images are left and the new batch size.
    """
    hidden, total = not (own.first and sys.stderr.isatty()), num_steps * -(-n // batch_size)
    with tqdm(total=total, unit="step", disable=hidden, dynamic_ncols=True, leave=leave) as bar:

        def smaller(left: int, size: int) -> None:
            bar.total = bar.n + num_steps * -(-left // size)
            tqdm.write(f"{own.name}out of memory: going on with batch_size={size}, which changes no image")

        yield bar, smaller


def tell(text: str) -> None:
    """Print a line above any bar. Where stdout is closed (`| head`, a lost terminal), print nothing from now on."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def typed(folder: Path) -> str:
    """Quote a folder for a shell; begin with ./ where its name alone means something, as `latest` does."""
    name = str(folder)
    return shlex.quote(f"./{name}" if name in ("latest", "null") or name[0] in "'\"" else name)


def figures(record: dict[str, float]) -> str:
    """Format both validation figures with their errors."""
    return ", ".join(
        f"{key} {record[key]:.4f} ± {record[key + '_error']:.4f}" for key in ("val_loss", "val_eps_mse")
    )


def duration(seconds: float) -> str:
    """Format a time in the largest unit that is precise enough."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
