"""evaluation.png: one page with samples, metrics, closest training images, class shares and error curves."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddpm.errors import printable
from ddpm.evaluate import table
from ddpm.evaluate.evaluator import Gallery
from ddpm.evaluate.record import Evaluation
from ddpm.io.figures import Figure, default_style, save
from ddpm.io.images import grid

COLUMNS = 8  # of samples
PAIRS = 16
PAIR_ROWS = 2
NOTE_WIDTH = 190  # characters in a line of the foot
LINE = 0.155  # inches, of the foot
SAMPLE, REAL, TRAIN = "#1f77b4", "#8c8c8c", "#d95f02"


@default_style()
def draw(evaluation: Evaluation, gallery: Gallery, picture: Path) -> None:
    """Write the page, whole or not at all. Raises OSError."""
    foot = _foot(evaluation)
    page = Figure(figsize=(13, 9.6 + LINE * len(foot)), layout="constrained")
    page.suptitle(_plain(evaluation.subject), fontsize=11, x=0.01, ha="left")
    parts = page.add_gridspec(3, 1, height_ratios=[5.2, 3.6, 0.3 + LINE * len(foot)])
    halves = parts[0].subgridspec(1, 2, width_ratios=[5, 7.6])
    _show(
        page.add_subplot(halves[0]),
        grid(_pixels(gallery.samples), COLUMNS),
        f"{len(gallery.samples)} samples",
    )
    _metrics(page.add_subplot(halves[1]), evaluation)
    panels = [panel for panel, wanted in (
        (_pairs, len(gallery.pairs)), (_classes, evaluation.histogram), (_curves, evaluation.curves)
    ) if wanted]  # fmt: skip
    places = parts[1].subgridspec(1, max(1, len(panels)))
    for number, panel in enumerate(panels):
        panel(page.add_subplot(places[number]), evaluation, gallery)
    axes = page.add_subplot(parts[2])
    axes.axis("off")
    axes.text(0, 1, "\n".join(foot), fontsize=7.5, va="top", linespacing=1.35)
    save(page, picture)


def _plain(text: str) -> str:
    """Escape dollars, between which Matplotlib expects a formula."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def _foot(evaluation: Evaluation) -> list[str]:
    texts = [table.protocol(evaluation), *(f"note: {note}" for note in evaluation.notes[: table.NOTES])]
    return [line for text in texts for line in textwrap.wrap(_plain(text), NOTE_WIDTH)]


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """Convert uint8 (N, C, H, W) to (N, H, W, 1 or 3)."""
    channels = images.permute(0, 2, 3, 1).numpy()
    return channels if channels.shape[-1] in (1, 3) else channels[..., :1]


def _show(axes: Any, picture: NDArray[np.uint8], title: str) -> None:
    grey = picture.shape[-1] == 1
    axes.imshow(picture[..., 0] if grey else picture, cmap="gray" if grey else None, vmin=0, vmax=255)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def _metrics(axes: Any, evaluation: Evaluation) -> None:
    """Show the printed table, its column headed "this", as the page names the subject above."""
    head, *lines = table.rows([evaluation])
    text = "\n".join(table.aligned([[head[0], "this", *head[2:]], *lines]))
    axes.axis("off")
    axes.text(0, 1, _plain(text), fontsize=8.5, va="top", linespacing=1.5, family="monospace")


def _pairs(axes: Any, evaluation: Evaluation, gallery: Gallery) -> None:
    pairs = gallery.pairs[:PAIRS]
    columns = 2 * -(-len(pairs) // PAIR_ROWS)
    shown = grid(_pixels(pairs.flatten(0, 1)), min(columns, 8))
    _show(axes, shown, "closest pairs: sample | nearest training image")


def _classes(axes: Any, evaluation: Evaluation, gallery: Gallery) -> None:
    names = [_plain(str(name)) for name in evaluation.histogram["classes"]]
    place = np.arange(len(names))
    for shift, key, colour, label in (
        (-0.2, "samples", SAMPLE, "samples"),
        (0.2, "real", REAL, "real test images"),
    ):
        axes.bar(place + shift, 100 * np.array(evaluation.histogram[key]), 0.4, color=colour, label=label)
    few = len(names) <= 30
    axes.set_xticks(
        place if few else [], names if few else [], rotation=0 if max(map(len, names)) < 4 else 45
    )
    axes.set_title("share of each class, by the feature network, %", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)


def _curves(axes: Any, evaluation: Evaluation, gallery: Gallery) -> None:
    for name, colour, label in (("test", SAMPLE, "test images"), ("train", TRAIN, "training images")):
        curve = evaluation.curves.get(name)
        if curve is None:
            continue
        points = zip(curve["lambda_"], curve["eps_mse"], curve["error"], strict=True)
        known = [point for point in points if None not in point]  # lambda = -∞ has no place on an axis
        if known:
            axes.errorbar(*zip(*known, strict=True), color=colour, label=label, marker=".", lw=1)
    axes.set_yscale("log")
    axes.set_title("squared error in eps by noise level", fontsize=9)
    axes.set_xlabel("lambda = log(alpha / sigma): noise … image", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
