"""study.png: how good a sampler's images are over what they cost."""

from pathlib import Path
from typing import Any

from ddpm.io.figures import Figure, LogLocator, default_style, save
from ddpm.report.sampler_study import QUALITY, Study, best, cheapest, name


@default_style()
def draw(study: Study, picture: Path) -> None:
    """Plot the excess over network evaluations: a line for each sampler, the interval of the best as a band, a ring
    around the cheapest within it. Raises OSError.
    """
    page = Figure(figsize=(9.6, 4.6), layout="constrained")
    axes = page.add_subplot()
    curves: dict[str, list[tuple[float, ...]]] = {}  # of rows that differ in steps alone
    for row in study.rows:
        if row.excess:
            value, low, high = row.excess
            points = curves.setdefault(name(row, study.varied, steps=False), [])
            points.append((row.evaluations, value, value - low, high - value))
    for title, points in curves.items():
        x, values, below, above = zip(*sorted(points), strict=True)
        axes.errorbar(x, values, (below, above), label=title, marker=".", lw=1, capsize=2)
    top, chosen = best(study), cheapest(study)
    if top and chosen:
        _, low, high = top.excess
        axes.axhspan(low, high, color="0.87", zorder=0, label="interval of the best")
        ring: dict[str, Any] = {"marker": "o", "ms": 13, "mfc": "none", "mec": "black", "ls": "none"}
        axes.plot(chosen.evaluations, chosen.excess[0], **ring, label="cheapest within it")
        if min(row.excess[1] for row in study.rows if row.excess) > 0:
            axes.set_yscale("log")
        else:  # an excess may be below 0: linear around it, as wide as the best's interval
            axes.set_yscale("symlog", linthresh=max(high - low, 1e-3))
    if real := study.real.get(f"real_{QUALITY}"):
        axes.axhline(real.value, color="0.4", ls=":", lw=1, label="real training images")
    axes.set(
        xlabel="network evaluations for an image", ylabel="Fréchet distance less its floor", xscale="log"
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    page.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save(page, picture)
