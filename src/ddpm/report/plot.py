"""report.png: the figure over every setting that differs, and the curves of all runs. Needs no torch."""

import io
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ddpm.io.files import write_atomically
from ddpm.report.runs import RunRow
from ddpm.report.table import label, measured, shortened, text, varying

PANELS = 6  # of settings, at most
LINES = 6  # in a panel; more cannot be told apart
NAMED = 40  # runs in the legend
POINTS = 300  # of a curve
WIDTH = 12.0  # inches
PANEL_HEIGHT, CURVES_HEIGHT, NAME_HEIGHT = 3.0, 4.3, 0.19
LOGARITHMIC = 8.0  # from this ratio of the largest to the smallest on
COLOURS = ("#1f77b4", "#d95f02", "#2a9d4a", "#c2255c", "#7048c8", "#8c6239", "#0b9aa6", "#6c757d")
Curve = Sequence[tuple[int, float]]


def draw(rows: Sequence[RunRow], figure: str, picture: Path) -> None:
    """`rows` best first, at least one of them with the figure. Raises OSError."""
    compared = [row for row in rows if row.best(figure)]
    keys = sorted(varying(compared), key=lambda key: key == "seed")[:PANELS]
    named = [row for row in rows if row.loss or row.figures[figure]][:NAMED]
    names = _names(named, figure, varying(rows))
    columns = max(1, min(4, len(names), 176 // (max(map(len, names)) + 6)))
    across = len(keys) if len(keys) <= 3 else 2 if len(keys) == 4 else 3
    heights = [PANEL_HEIGHT] * (math.ceil(len(keys) / across) if keys else 0)
    heights += [CURVES_HEIGHT, NAME_HEIGHT * math.ceil(len(names) / columns) + 0.4]
    page = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = page.add_gridspec(len(heights), 1, height_ratios=heights)
    lines = [parts[i].subgridspec(1, across) for i in range(len(heights) - 2)]
    for number, key in enumerate(keys):
        _panel(page.add_subplot(lines[number // across][number % across]), compared, key, figure)
    others = [row for row in rows if (row.loss or row.figures[figure]) and row not in named]
    halves = parts[-2].subgridspec(1, 2)
    left, right = page.add_subplot(halves[0]), page.add_subplot(halves[1])
    validated = [[(p.step, p.value) for p in row.figures[figure]] for row in [*named, *others]]
    trained = [_thinned(row.loss) for row in [*named, *others]]
    _curves(left, f"{figure} (validation, averaged weights)", validated, len(named))
    _curves(right, "loss (training)", trained, len(named))
    _legend(page.add_subplot(parts[-1]), names, columns, len(others))
    data = io.BytesIO()
    with warnings.catch_warnings():  # a letter that the font has not becomes a box
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        page.savefig(data, dpi=110)
    write_atomically(picture, data.getvalue(), durable=False)


def _names(rows: Sequence[RunRow], figure: str, keys: Sequence[str]) -> list[str]:
    room = 64 if len(rows) <= 10 else 52
    names = []
    for row in rows:
        unfinished = "" if row.status == "done" else f" ({row.status})"
        figures = measured(row, figure) or f"no {figure} yet"
        names.append(_plain(f"{figures}   {shortened(label(row, keys), room)}{unfinished}"))
    return names


def _plain(name: str) -> str:
    """Matplotlib would take what is between two dollars for a formula."""
    return name.replace("$", r"\$")


def _styles(count: int) -> list[dict[str, Any]]:
    """Few runs: a colour each; many: from dark, the best, to light, and neighbours by their dashes."""
    if count <= len(COLOURS):
        return [{"color": colour, "lw": 1.4} for colour in COLOURS[:count]]
    dashes = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
    shades = colormaps["turbo"]
    return [
        {"color": shades(0.04 + 0.9 * i / (count - 1)), "ls": dashes[i % 3], "lw": 1.4 if i < 5 else 1.0}
        for i in range(count)
    ]


def _panel(axes: Any, rows: Sequence[RunRow], key: str, figure: str) -> None:
    """The best figure over one setting. Runs that agree in all others share a colour and, over numbers, a line."""
    rows = [row for row in rows if key in row.settings]
    others = [other for other in varying(rows) if other not in (key, "seed")]
    alike: dict[str, list[RunRow]] = {}
    for row in sorted(rows, key=lambda row: [_order(row.settings.get(other)) for other in others]):
        alike.setdefault(label(row, others) if others else "", []).append(row)
    readable = len(alike) <= LINES and any(len(_values(group, key)) > 1 for group in alike.values())
    if not readable:
        alike = {"": rows}
    numbers = key != "seed" and all(type(row.settings[key]) in (int, float) for row in rows)
    place = _number_axis(axes, rows, key) if numbers else _category_axis(axes, rows, key)
    for number, (name, group) in enumerate(alike.items()):
        style = {"color": COLOURS[number], "alpha": 0.85 if len(rows) <= 30 else 0.5}
        at: dict[float, list[float]] = {}
        points = []
        for row in group:
            best = row.best(figure)
            assert best is not None
            x = place[text(row.settings[key])]
            beside = at.setdefault(x, [])
            beside.append(best.value)
            if not numbers:  # side by side: groups apart, and each of many in five lanes
                x += 0.12 * (number - (len(alike) - 1) / 2)
                x += 0.05 * ((len(beside) + 1) % 5 - 2) if len(rows) > 30 else 0
            points.append((x, best.value, best.error))
        axes.errorbar(*zip(*points, strict=True), fmt="o", ms=4, lw=1, capsize=2, **style)
        if numbers and readable and len(at) > 1:
            axes.plot(sorted(at), [statistics.fmean(at[x]) for x in sorted(at)], lw=1, **style)
        axes.plot([], [], "o", ms=4, color=COLOURS[number], label=_plain(shortened(name, 40)))
        if not numbers and not readable and max(map(len, at.values())) > 2:  # a bar at the median
            axes.scatter(
                list(at),
                [statistics.median(v) for v in at.values()],
                s=900,
                color="0.2",
                marker="_",
                linewidths=1.2,
            )
    if len(alike) > 1:
        axes.legend(fontsize=7, framealpha=0.7)
    best_values = [point.value for row in rows if (point := row.best(figure))]
    _value_axis(axes, best_values)
    axes.set_title(_plain(key), fontsize=9)
    axes.set_ylabel(f"best {figure}", fontsize=8)


def _values(rows: Sequence[RunRow], key: str) -> set[str]:
    return {text(row.settings[key]) for row in rows}


def _number_axis(axes: Any, rows: Sequence[RunRow], key: str) -> dict[str, float]:
    """Ticks at the values themselves, where these are few and apart."""
    place = {text(row.settings[key]): float(row.settings[key]) for row in rows}
    values = sorted(place.values())
    scale: Callable[[float], float] = float
    if values[0] > 0 and values[-1] / values[0] > LOGARITHMIC:
        axes.set_xscale("log")
        scale = math.log
    span = scale(values[-1]) - scale(values[0])
    if all(scale(b) - scale(a) > 0.09 * span for a, b in itertools.pairwise(values)):
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    return place


def _category_axis(axes: Any, rows: Sequence[RunRow], key: str) -> dict[str, float]:
    """One place for each value, labels aslant where they are long."""
    values = [text(value) for value in sorted((row.settings[key] for row in rows), key=_order)]
    values = list(dict.fromkeys(values))
    names = [_plain(shortened(value, 20)) for value in values]
    slant = {"rotation": 25, "ha": "right"} if sum(map(len, names)) + 2 * len(names) > 40 else {}
    axes.set_xticks(range(len(names)), names, **slant)
    axes.set_xlim(-0.6, len(names) - 0.4)
    return {value: float(i) for i, value in enumerate(values)}


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then all else by its text."""
    number = type(value) in (int, float)
    return not number, value if number else 0, text(value)


def _value_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic for a wide spread, with plain numbers at the ticks."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low > 0 and high / low > LOGARITHMIC / 4:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _curves(axes: Any, title: str, curves: Sequence[Curve], named: int) -> None:
    """The first so many as the legend names them, the others in grey behind them."""
    grey = {"color": "0.8", "lw": 0.6, "zorder": 1}
    for curve, style in zip(curves, [*_styles(named), *[grey] * (len(curves) - named)], strict=True):
        few = {"marker": ".", "ms": 4} if len(curve) <= 25 else {}
        axes.plot([step for step, _ in curve], [value for _, value in curve], **style, **few)
    _value_axis(axes, [value for curve in curves for _, value in curve])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)


def _thinned(curve: Curve) -> Curve:
    """Means over as many lines as make a curve that can be seen."""
    size = math.ceil(len(curve) / POINTS)
    parts = [curve[i : i + size] for i in range(0, len(curve), size or 1)]
    return [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]


def _legend(axes: Any, names: Sequence[str], columns: int, others: int) -> None:
    axes.axis("off")
    handles = [
        axes.plot([], [], label=name, **style)[0]
        for name, style in zip(names, _styles(len(names)), strict=True)
    ]
    title = "best first" + (f"; {others} more runs in grey" if others else "")
    axes.legend(
        handles=handles,
        ncols=columns,
        loc="upper center",
        fontsize=8,
        title=title,
        title_fontsize=8,
        frameon=False,
        borderaxespad=0,
    )
