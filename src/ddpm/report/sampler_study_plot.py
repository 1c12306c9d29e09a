"""study.png: how good a sampler's images are over what they cost."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ddpm.io.files import write_atomically
from ddpm.report.sampler_study import QUALITY, Row, Study, best, cheapest, name


def draw(study: Study, picture: Path) -> None:
    """Plot the excess over network evaluations and over seconds for 1,000 images. Raises OSError."""
    page = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = page.subplots(1, 2, sharey=True)
    _curves(left, study, lambda row: row.evaluations, "network evaluations for an image")
    _curves(right, study, lambda row: row.seconds, "seconds for 1,000 images")
    left.set_ylabel("Fréchet distance less its floor")
    page.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    data = io.BytesIO()
    page.savefig(data, dpi=110)
    write_atomically(picture, data.getvalue(), durable=False)


def _curves(axes: Any, study: Study, cost: Callable[[Row], float], label: str) -> None:
    """A line for each sampler, the interval of the best as a band, a ring around the cheapest within it."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}  # of rows that differ in steps alone
    for row in study.rows:
        if row.excess:
            points = lines.setdefault(name(row, study.varied, steps=False), [])
            value, low, high = row.excess
            points.append((cost(row), value, value - low, high - value))
    for title, points in lines.items():
        x, values, below, above = zip(*sorted(points), strict=True)
        axes.errorbar(x, values, (below, above), label=title, marker=".", lw=1, capsize=2)
    top, chosen = best(study), cheapest(study)
    if top and chosen and top.excess and chosen.excess:
        axes.axhspan(top.excess.low, top.excess.high, color="0.87", zorder=0, label="interval of the best")
        ring = {"marker": "o", "ms": 13, "mfc": "none", "mec": "black", "ls": "none"}
        axes.plot(cost(chosen), chosen.excess.value, **ring, label="cheapest within it")
        if min(row.excess.low for row in study.rows if row.excess) > 0:
            axes.set_yscale("log")
        else:  # an excess may be below 0: linear around it, as wide as the best's interval
            axes.set_yscale("symlog", linthresh=max(top.excess.high - top.excess.low, 1e-3))
    if real := study.real.get(f"real_{QUALITY}"):
        axes.axhline(real.value, color="0.4", ls=":", lw=1, label="real training images")
    axes.set(xlabel=label, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
