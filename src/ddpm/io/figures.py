"""Draw with matplotlib in its default style, whatever a matplotlibrc says: here alone it is imported.

Matplotlib obeys a file of that name in the current folder, which may call LaTeX or hold what cannot be read.
"""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from importlib.util import find_spec
from pathlib import Path

from ddpm.io.files import write_atomically

_found = find_spec("matplotlib")
assert _found is not None and _found.origin is not None  # a dependency of ddpm
_backend = os.environ.pop("MPLBACKEND", None)  # one that is not there would end the import; here none is used
with chdir(Path(_found.origin).parent / "mpl-data"):  # the matplotlibrc in this folder has the defaults
    from matplotlib import colormaps, get_data_path, rc_context, rcParamsDefault
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
if _backend is not None:
    os.environ["MPLBACKEND"] = _backend

__all__ = ["Axes", "Figure", "LogLocator", "colormaps", "default_style", "get_data_path", "save"]


@contextmanager
def default_style() -> Iterator[None]:
    """Within the block, or the decorated function, matplotlib's defaults count; then the caller's style again."""
    with rc_context(dict(rcParamsDefault)):
        yield


def save(figure: Figure, picture: Path, dpi: int = 110) -> None:
    """Write a figure as PNG, whole or not at all. Raises OSError."""
    data = io.BytesIO()
    with warnings.catch_warnings():  # about letters that the font has not, and labels too long for the page
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(data, format="png", dpi=dpi)
    write_atomically(picture, data.getvalue(), durable=False)
