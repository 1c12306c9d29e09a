"""report.png: the best figure over each setting that differs, and the curves of all runs. Needs no torch."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm.io.figures import Figure, LogLocator, colormaps, default_style, save
from ddpm.report.runs import RunRow
from ddpm.report.table import label, measured, shortened, text, varying

MAX_PANELS = 4
MAX_GROUPS = 6  # colours in a panel
MAX_NAMED = 20  # runs in the legend, two in a line
MAX_POINTS = 300  # of a curve
MAX_TICKS = 6  # at the values themselves
LOG_RATIO = 8.0  # largest to smallest, from which an axis of settings is logarithmic; of figures from 2
COLOURS = [colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]  # dark ones first
GREY = {"color": "0.8", "lw": 0.6, "zorder": 1}


@default_style()
def draw(rows: Sequence[RunRow], figure: str, picture: Path) -> None:
    """Plot `rows`, best first, of which at least one has the figure. Raises OSError."""
    compared = [row for row in rows if row.best(figure)]
    keys = [key for key in varying(compared) if key != "seed"][:MAX_PANELS]
    curves_height = 4.7 + 0.19 * math.ceil(min(len(rows), MAX_NAMED) / 2)  # inches
    heights = [3.0, curves_height] if keys else [curves_height]
    page = Figure(figsize=(12, sum(heights)), layout="constrained")
    parts = page.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if keys:
        for axes, key in zip(parts[0].subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            _panel(axes, compared, key, figure)
    _curves(parts[-1], [row for row in rows if row.loss or row.figures[figure]], figure, varying(rows))
    save(page, picture)


def _panel(axes: Any, rows: Sequence[RunRow], key: str, figure: str) -> None:
    """Plot the best figure over one setting. Runs that agree in all others share a colour and, over numbers, a line."""
    rows = [row for row in rows if key in row.settings]
    others = [other for other in varying(rows) if other not in (key, "seed")]
    groups: dict[str, list[RunRow]] = {}
    for row in rows:
        groups.setdefault(label(row, others) if others else "", []).append(row)
    alike = len(groups) <= MAX_GROUPS and any(len(_values(group, key)) > 1 for group in groups.values())
    if not alike:
        groups = {"": rows}
    numbers = all(type(row.settings[key]) in (int, float) for row in rows)
    places = _number_axis(axes, rows, key) if numbers else _category_axis(axes, rows, key)
    for number, (name, group) in enumerate(groups.items()):
        beside = 0 if numbers else 0.12 * (number - (len(groups) - 1) / 2)
        points = [(places[text(row.settings[key])] + beside, row.best(figure)) for row in group]
        shown = [(x, best.value, best.error) for x, best in points if best]
        style = {"color": COLOURS[number], "lw": 1}
        named = _plain(shortened(name, 40))
        axes.errorbar(*zip(*shown, strict=True), fmt="o", ms=4, capsize=2, label=named, **style)
        if numbers and alike:
            at = sorted({x for x, *_ in shown})
            axes.plot(
                at, [statistics.fmean(value for x, value, _ in shown if x == one) for one in at], **style
            )
    if len(groups) > 1:
        axes.legend(fontsize=7, framealpha=0.7)
    _value_axis(axes, [best.value for row in rows if (best := row.best(figure))])
    axes.set_title(_plain(key), fontsize=9)
    axes.set_ylabel(f"best {figure}", fontsize=8)


def _values(rows: Sequence[RunRow], key: str) -> dict[str, Any]:
    """Return the values of a setting by their text: numbers by size, then all else by its text."""
    found = {text(row.settings[key]): row.settings[key] for row in rows}
    number = {name: value if type(value) in (int, float) else math.inf for name, value in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: (number[name], name))}


def _number_axis(axes: Any, rows: Sequence[RunRow], key: str) -> dict[str, float]:
    """Set up an axis of numbers. Returns the place of each value."""
    places = {name: float(value) for name, value in _values(rows, key).items()}
    low, high = min(places.values()), max(places.values())
    if low > 0 and high / low > LOG_RATIO:
        axes.set_xscale("log")
    if len(places) <= MAX_TICKS:
        axes.set_xticks([*places.values()], [f"{value:g}" for value in places.values()])
        axes.minorticks_off()
    return places


def _category_axis(axes: Any, rows: Sequence[RunRow], key: str) -> dict[str, float]:
    """Set up an axis with one place for each value. Returns the places."""
    names = [*_values(rows, key)]
    axes.set_xticks(
        range(len(names)), [_plain(shortened(name, 20)) for name in names], rotation=20, ha="right"
    )
    axes.set_xlim(-0.6, len(names) - 0.4)
    return {name: float(i) for i, name in enumerate(names)}


def _value_axis(axes: Any, values: Sequence[float]) -> None:
    """Make the axis of a figure logarithmic for a wide spread, with plain numbers at the ticks."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low > 0 and high / low > 2:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _curves(part: Any, rows: Sequence[RunRow], figure: str, keys: Sequence[str]) -> None:
    """Plot validation and training curves: the best runs with a name, the others in grey behind them."""
    left, right = part.subplots(1, 2)
    validated = [[(point.step, point.value) for point in row.figures[figure]] for row in rows]
    trained = [_thinned(row.loss) for row in rows]
    titles = (f"{figure} (validation, averaged weights)", "loss (training)")
    for axes, title, curves in zip((left, right), titles, (validated, trained), strict=True):
        for number, (row, curve) in enumerate(zip(rows, curves, strict=True)):
            style = GREY
            if number < MAX_NAMED:
                style = {"color": COLOURS[number], "lw": 1.3, "label": _name(row, figure, keys)}
            few = {"marker": ".", "ms": 4} if len(curve) <= 25 else {}
            axes.plot([step for step, _ in curve], [value for _, value in curve], **style, **few)
        _value_axis(axes, [value for curve in curves for _, value in curve])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
    more = len(rows) - MAX_NAMED
    title = "best first" + (f"; {more} more runs in grey" if more > 0 else "")
    style = {"ncols": 2, "fontsize": 8, "title": title, "title_fontsize": 8, "frameon": False}
    part.legend(*left.get_legend_handles_labels(), loc="outside lower center", **style)


def _name(row: RunRow, figure: str, keys: Sequence[str]) -> str:
    unfinished = "" if row.status == "done" else f" ({row.status})"
    return _plain(
        f"{measured(row, figure) or f'no {figure} yet'}   {shortened(label(row, keys), 64)}{unfinished}"
    )


def _plain(name: str) -> str:
    """Escape dollars, between which matplotlib would look for a formula."""
    return name.replace("$", r"\$")


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average neighbours, so that at most MAX_POINTS are left."""
    size = max(1, math.ceil(len(curve) / MAX_POINTS))
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]
