"""The contact sheet: the same noise through every run of a report, one run in a row."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ddpm.checkpoint import locate
from ddpm.config.choices import Component
from ddpm.errors import CheckpointError, UserError
from ddpm.io.images import Pixels, save_png, to_uint8
from ddpm.report.runs import RunRow, brief
from ddpm.report.table import label, measured, varying
from ddpm.runtime import device as runtime_device
from ddpm.runtime import memory
from ddpm.sample.model import Guidance, Model, denoiser, labels, load
from ddpm.sample.sampling import draw, finite, last

CELL = 64  # pixels of an image in the sheet, about: small ones are enlarged by whole factors
LARGEST = 192  # larger ones are reduced to this
MAX_ROWS = 100
MAX_NAME = 28  # characters of a run's name
GAP = 4
LABEL = 330  # pixels: the column of labels
FONT = 13
LINE = 17  # from one line of text to the next
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

    Returns lines that say what was written and why a run was left out. Raises UserError, OSError.
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
        except (UserError, OSError) as error:
            lines.append(f"no images of {row.name}: {brief(str(error), row.path)}")
            continue
        name = f": {row.name}" if len(row.name) <= MAX_NAME else ""  # a job's name repeats its settings
        head = measured(row, figure) or f"no {figure}"
        strips.append(Strip(head, label(row, keys), f"{row.status}, step {step}{name}", images))
    if not strips:
        return [*lines, f"nothing to draw from: no {picture.name}"]
    of = "each run's own sampler" if sampler is None else sampler.name
    save_png(picture, sheet(f"{n} images of seed {seed}, {of}, best {figure} first", strips))
    return [*lines, str(picture)]


def drawn(
    run: Path, n: int, seed: int, sampler: Component | None, device: torch.device
) -> tuple[Pixels, int]:
    """Images 0 … n-1 of the seed from a run's newest whole checkpoint, and its step.

    `sampler` None: that of its training, so that a study of one run's samplers does not set it apart. Raises UserError.
    """
    files = locate.of_run(run)
    if not files:
        raise CheckpointError("no checkpoint yet")
    loaded: list[tuple[Model, int]] = []

    def try_to_load(path: Path) -> None:
        model, meta = load(path, device)
        loaded.append((model, meta.step))

    locate.newest_good(files, check=try_to_load)
    model, step = loaded[-1]
    sampler = fitted(sampler or model.config.sampler, model)
    index = torch.arange(n, device=device)
    try:
        denoise = denoiser(model, sampler, labels(model, None, index, Guidance()), Guidance())
        return to_uint8(last(finite(draw(model, sampler, denoise, index, seed), index.cpu()))), step
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        raise UserError(f"out of memory for {n} images at once") from None


def fitted(sampler: Component, model: Model) -> Component:
    """With no more steps than the model has timesteps; many are written for a thousand of them."""
    steps = sampler.params["num_steps"]
    if steps is None:
        return sampler
    return Component(sampler.name, {**sampler.params, "num_steps": min(steps, model.schedule.num_timesteps)})


def sheet(title: str, strips: Sequence[Strip]) -> Pixels:
    """(H, W, 3): a title and a row for each strip, images of any size and channels in cells of one size."""
    cell = max(_scaled_size(strip.images[0]) for strip in strips)
    columns = max(len(strip.images) for strip in strips)
    height = max(cell, 4 * LINE) + GAP  # room for four lines of text
    top, room = LINE + 3 * GAP, LABEL - 4 * GAP
    width = LABEL + columns * (cell + GAP) + GAP
    canvas = Image.new("RGB", (width, top + len(strips) * height), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((2 * GAP, GAP), _cut(title, _font(True), width - 4 * GAP), INK, _font(True))
    for row, strip in enumerate(strips):
        y = top + row * height
        lines = [(_cut(strip.head, _font(True), room), INK, _font(True))]
        lines += [(line, INK, _font()) for line in _wrapped(strip.text, room, lines=2)]
        lines += [(_cut(strip.foot, _font(), room), FAINT, _font())]
        for i, (line, colour, font) in enumerate(lines):
            pen.text((2 * GAP, y + i * LINE), line, colour, font)
        for column, image in enumerate(strip.images):
            x = LABEL + column * (cell + GAP)
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), PALE)
            scaled = _scaled(image)
            canvas.paste(scaled, (x + (cell - scaled.width) // 2, y + (cell - scaled.height) // 2))
    return np.asarray(canvas)


def _scaled_size(image: Pixels) -> int:
    size: int = image.shape[0]
    return min(size * max(1, round(CELL / size)), LARGEST)


def _scaled(image: Pixels) -> Any:
    """(H, W, C) in colour, every pixel a square of pixels; more than three channels: the first three."""
    colours = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, axis=-1)
    picture = Image.fromarray(np.ascontiguousarray(colours))
    size = _scaled_size(image)
    enlarged = size % image.shape[0] == 0
    return picture.resize((size, size), Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)


def _font(bold: bool = False) -> Any:
    """DejaVu, which matplotlib brings along; it knows ± and most of the world's letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, FONT)


def _wrapped(text: str, room: int, lines: int) -> list[str]:
    """Broken at spaces into at most so many lines, of which the last may be cut."""
    font, broken = _font(), [""]
    for word in text.split():
        longer = f"{broken[-1]}  {word}" if broken[-1] else word
        if font.getlength(longer) <= room or not broken[-1]:
            broken[-1] = longer
        elif len(broken) < lines:
            broken.append(word)
        else:
            broken[-1] += "  …"
            break
    return [_cut(line, font, room) for line in broken]


def _cut(text: str, font: Any, room: int) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"
