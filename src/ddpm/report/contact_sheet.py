"""contact.png: the same noise through every run of a report, one run in a row."""

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ddpm.checkpoint import locate
from ddpm.config.choices import Component
from ddpm.io.figures import get_data_path
from ddpm.io.files import reason, try_to_draw
from ddpm.io.images import WIDEST, Pixels, save_png, to_uint8
from ddpm.report.runs import RunRow, brief
from ddpm.report.table import label, measured, varying
from ddpm.runtime import device as runtime_device
from ddpm.sample.model import Guidance, Model, labels, load
from ddpm.sample.sampling import draw_all, generation

CELL = 64  # pixels of an image in the sheet, about: small ones are enlarged by whole factors
LARGEST = 192  # larger ones are reduced to this
MAX_ROWS = 100
GAP = 4
LABEL = 330  # pixels: the column of labels
FONT = 11
CHARACTERS = 47  # in a line of a label
LINE = 17  # pixels from one line of text to the next
PAPER, INK, FAINT, PALE = (255, 255, 255), (25, 25, 25), (110, 110, 110), (232, 232, 232)


@dataclass(frozen=True, eq=False)
class Strip:
    """A row of the sheet."""

    head: str  # one line
    text: str  # may be broken into two
    foot: str  # one line
    images: Pixels  # (n, H, W, C)


def write(
    picture: Path,
    rows: Sequence[RunRow],
    n: int,
    seed: int,
    sampler: Component | None,
    figure: str,
    device: str,
) -> list[str]:
    """Draw n images from every run, with a bar on a terminal, and write the sheet.

    Returns lines that say what was written and why a run was left out. Raises UserError.
    """
    found, keys = runtime_device.device(device), varying(rows)
    strips, lines = list[Strip](), list[str]()
    for row in tqdm(rows, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True):
        if len(strips) == MAX_ROWS:
            lines.append(f"{picture.name} shows the first {MAX_ROWS} runs of {len(rows)}")
            break
        try:
            if not locate.of_run(row.path):  # the table says what is the matter
                continue
            images, step = drawn(row.path, n, seed, sampler, found)
        except Exception as error:  # one bad run must not take the others' images away
            lines.append(f"no images of {row.name}: {brief(reason(error), row.path)}")
            continue
        head, foot = measured(row, figure) or f"no {figure}", f"{row.status}, step {step}: {row.name}"
        strips.append(Strip(head, label(row, keys), foot, images))
    if not strips:
        return [*lines, f"nothing to draw from: no {picture.name}"]
    of = "each run's own sampler" if sampler is None else sampler.name
    title = f"{n} images of seed {seed}, {of}, best {figure} first"
    return lines + (try_to_draw(_save, title, strips, picture) or [str(picture)])


def _save(title: str, strips: Sequence[Strip], picture: Path) -> None:
    save_png(picture, sheet(title, strips))


def drawn(
    run: Path, n: int, seed: int, sampler: Component | None, device: torch.device
) -> tuple[Pixels, int]:
    """Draw images 0 … n-1 of the seed from a run's newest whole checkpoint. Returns them and its step.

    `sampler` None: that of its training, so that a study of one run's samplers does not set it apart. Raises UserError.
    """
    _, (model, _), _ = locate.read_newest(lambda: locate.of_run(run), lambda file: load(file, device))
    sampler, guidance, index = fitted(sampler or model.config.sampler, model), Guidance(), torch.arange(n)
    y, steps = labels(model, None, index, guidance), generation(model, sampler, index, seed)
    x, _ = draw_all(
        model, sampler, guidance, y, index, steps, n, lambda at, step: None, lambda left, size: None
    )
    return to_uint8(x), model.step


def fitted(sampler: Component, model: Model) -> Component:
    """Limit the steps to the model's timesteps; many are written for a thousand of them."""
    steps = sampler.params["num_steps"]
    if steps is None:
        return sampler
    return Component(sampler.name, {**sampler.params, "num_steps": min(steps, model.schedule.num_timesteps)})


def sheet(title: str, strips: Sequence[Strip]) -> Pixels:
    """Return (H, W, 3): a title and a row for each strip. Images have any size and channels, cells one size."""
    cell = max(_scaled_size(strip.images[0]) for strip in strips)
    most = max(len(strip.images) for strip in strips)
    columns = min(most, max(1, (WIDEST - LABEL - GAP) // (cell + GAP)))
    height = max(math.ceil(most / columns) * (cell + GAP), 4 * LINE + GAP)  # room for four lines of text
    top, width = LINE + 3 * GAP, LABEL + columns * (cell + GAP) + GAP
    canvas = Image.new("RGB", (width, top + len(strips) * height), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((2 * GAP, GAP), title, INK, _font(bold=True))
    for row, strip in enumerate(strips):
        y = top + row * height
        lines = [(line, INK, True) for line in _wrapped(strip.head, 1)]
        lines += [(line, INK, False) for line in _wrapped(strip.text, 2)]
        lines += [(line, FAINT, False) for line in _wrapped(strip.foot, 1)]
        for i, (line, colour, bold) in enumerate(lines):
            pen.text((2 * GAP, y + i * LINE), line, colour, _font(bold))
        for number, image in enumerate(strip.images):
            x, below = LABEL + number % columns * (cell + GAP), y + number // columns * (cell + GAP)
            pen.rectangle((x, below, x + cell - 1, below + cell - 1), PALE)
            scaled = _scaled(image)
            canvas.paste(scaled, (x + (cell - scaled.width) // 2, below + (cell - scaled.height) // 2))
    return np.asarray(canvas)


def _scaled_size(image: Pixels) -> int:
    size: int = image.shape[0]
    return min(size * max(1, round(CELL / size)), LARGEST)


def _scaled(image: Pixels) -> Any:
    """Return (H, W, C) in colour, every pixel a square of pixels; of more than three channels the first three."""
    colours = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, axis=-1)
    picture = Image.fromarray(np.ascontiguousarray(colours))
    size = _scaled_size(image)
    enlarged = size % image.shape[0] == 0
    return picture.resize((size, size), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)


def _font(bold: bool) -> Any:
    """DejaVu, which matplotlib brings along; it knows ± and most of the world's letters. All are of one width."""
    name = "DejaVuSansMono-Bold.ttf" if bold else "DejaVuSansMono.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, FONT)


def _wrapped(text: str, lines: int) -> list[str]:
    return textwrap.wrap(text, CHARACTERS, max_lines=lines, placeholder=" …")
