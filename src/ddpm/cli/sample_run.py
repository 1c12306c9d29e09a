"""Run ddpm-sample for a checked config: load a model, make a task, draw its images, gather, write."""

import io
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.config.schema import SampleConfig, to_dict
from ddpm.diffusion.samplers import Step
from ddpm.errors import printable
from ddpm.io.files import write_atomically
from ddpm.io.images import (
    WIDEST,
    Pixels,
    by_class,
    fitting,
    grid,
    in_rows,
    save_gif,
    save_png,
    table,
    to_uint8,
)
from ddpm.runs import output_dirs
from ddpm.runtime import console, memory
from ddpm.runtime import device as runtime_device
from ddpm.runtime.distributed import (
    gather_to_rank_zero,
    process_group,
    raise_on_all_ranks,
)
from ddpm.runtime.world import ALONE, World, world
from ddpm.sample import tasks
from ddpm.sample.model import Model, ambiguous, guidance, load_newest
from ddpm.sample.sampling import draw_all
from ddpm.sample.tasks import Plan

FILM_IMAGES = 16
FILM_FRAMES = 40
STRIP_COLUMNS = 10


class Drawn(NamedTuple):
    x: Tensor  # (n, C, H, W)
    film: Tensor  # (k, steps, C, H, W), the first images after each step; no steps where it is not wanted
    evaluations: float  # of the network, for each image


def run(config: SampleConfig, started: float) -> None:
    """Run the command, begun at `started` (perf_counter). Raises UserError.

    Under torchrun each process draws its share of the images; rank 0 chooses the checkpoint, and writes.
    """
    own = world()
    memory.keep_freed()
    device = runtime_device.device(config.device, own)
    with process_group(own, device):
        path, model, meta, notes = load_newest(config.ckpt, own, device, config.ema, config.precision)
        with raise_on_all_ranks(own):
            if own.first:
                output_dirs.check_results(config.out, _stem(path))
            todo = tasks.make(config, model)
        slow = runtime_device.slow_in_bf16("precision", config.precision, device)
        said = [*notes, *ambiguous(model.facts, config.label), *todo.notes, slow]
        for note in filter(None, said if own.first else []):
            print(printable(note), flush=True)
        with raise_on_all_ranks(own):
            drawn = draw(config, model, todo, own)
        drawn = _gathered(config, drawn, todo.n, own)
        with raise_on_all_ranks(own):
            if own.first:
                checkpoint = {"checkpoint": str(path), "checkpoint_sha256": meta.sha256, "step": meta.step}
                config = replace(config, precision=model.precision_name)
                _finish(config, todo, drawn, path, checkpoint, started)


def draw(config: SampleConfig, model: Model, todo: Plan, own: World = ALONE) -> Drawn:
    """Draw this process's images, with a bar on a terminal."""
    share, filmed = own.share(todo.n), _filmed(config, todo.n, model.facts.image_size)
    film: dict[int, list[Tensor]] = {}  # by the first place of a chunk, after each step
    number = share.stop - share.start
    with console.of_steps(own, todo.num_steps, number, config.batch_size, leave=True) as (bar, smaller):

        def watch(places: Tensor, step: Step) -> None:
            bar.update()
            if places[0] < filmed:
                film.setdefault(int(places[0]), []).append(step.x[: filmed - int(places[0])].cpu())

        def halved(left: int, size: int) -> None:
            film.pop(share.stop - left, None)
            smaller(left, size)

        places, size = torch.arange(share.start, share.stop), config.batch_size
        of_model = (model, todo.sampler, guidance(config), todo.y)
        x, evaluations = draw_all(*of_model, places, todo.steps, size, watch, halved)
    frames = [torch.stack(steps, dim=1) for steps in film.values()]
    return Drawn(x, torch.cat(frames) if frames else torch.empty(0, 0, *model.shape), evaluations)


def _filmed(config: SampleConfig, n: int, size: int) -> int:
    """Return how many of the first images are kept after each step."""
    return min(FILM_IMAGES, fitting(size) ** 2, config.batch_size, n) if "trajectory" in config.save else 0


def _gathered(config: SampleConfig, drawn: Drawn, n: int, own: World) -> Drawn:
    """Return the images and the film of all processes on rank 0."""
    filmed, shares = _filmed(config, n, drawn.x.shape[-1]), (own.share(n, rank) for rank in range(own.size))
    lengths = [max(0, min(share.stop, filmed) - share.start) for share in shares]
    x = gather_to_rank_zero(own, drawn.x, own.lengths(n))
    return drawn._replace(x=x, film=gather_to_rank_zero(own, drawn.film, lengths))


def _finish(
    config: SampleConfig,
    todo: Plan,
    drawn: Drawn,
    path: Path,
    checkpoint: dict[str, object],
    started: float,
) -> None:
    """Write the images and sample.json, and print the names of the files."""
    measured, figures = todo.measure(drawn.x) if todo.measure else ("", {})
    about = {
        **checkpoint,
        **to_dict(config),
        "sampler": todo.sampler.to_dict(),
        "images": todo.n,
        **todo.about,
        **figures,
        "evaluations_per_image": drawn.evaluations,
    }
    with output_dirs.results(config.out, _stem(path)) as (folder, out):
        files = _write(config, todo, drawn, folder)
        about |= {"seconds": round(time.perf_counter() - started, 3), "files": files}
        write_atomically(folder / "sample.json", json.dumps(about, indent=2).encode())
    if measured:
        print(measured)
    for file in [*files, "sample.json"]:
        print(out / file)


def _stem(checkpoint_file: Path) -> Path:
    return output_dirs.of_run(checkpoint_file) / "samples" / "drawn"


def _write(config: SampleConfig, todo: Plan, drawn: Drawn, out: Path) -> list[str]:
    """Write what `save` asks for; return the names of the files."""
    pixels, files = to_uint8(drawn.x), []
    classes = None if todo.y is None else todo.y.cpu().numpy()
    if "grid" in config.save:
        picture, shown = _grid(config, todo, pixels, classes)
        save_png(out / "grid.png", picture)
        if shown < len(pixels):
            print(f"grid.png shows {shown:,} of {len(pixels):,} images; save=[grid,images] keeps each")
        files.append("grid.png")
    if "images" in config.save:
        digits = max(5, len(str(len(pixels) - 1)))
        (out / "images").mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            save_png(out / "images" / f"{i:0{digits}d}.png", image)
        files.append("images")
    if "npz" in config.save:
        arrays = {"images": pixels[..., 0] if pixels.shape[-1] == 1 else pixels}
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays if classes is None else {**arrays, "labels": classes})
        write_atomically(out / "samples.npz", packed.getvalue(), durable=False)
        files.append("samples.npz")
    if film := drawn.film.unbind(1):
        _write_film(film, out)
        files += ["trajectory.gif", "trajectory.png"]
    return files


def _grid(
    config: SampleConfig, todo: Plan, pixels: Pixels, classes: NDArray[np.int64] | None
) -> tuple[Pixels, int]:
    """Draw rows of `nrow` images, or one for each input, or for each of several classes. Returns how many are shown."""
    n, fit, images = len(pixels), fitting(pixels.shape[1]), pixels
    if todo.rows is not None:
        images, numbers = todo.table(pixels)
    elif classes is not None and config.nrow is None and 1 < len(np.unique(classes)) <= fit:
        numbers = by_class(classes)
    else:
        numbers = in_rows(n, min(config.nrow or math.ceil(math.sqrt(n)), fit))
        if config.nrow and min(config.nrow, n) > fit:
            print(f"nrow={config.nrow}: {fit} images fill a row of {WIDEST:,} pixels")
    picture, shown = table(images, numbers)
    return picture, int(np.count_nonzero((shown >= 0) & (shown < n)))


def _write_film(film: tuple[Tensor, ...], out: Path) -> None:
    """Write images (k, C, H, W) after each step as a film, and a few of them as a strip."""
    frames = [film[round(i * (len(film) - 1) / (FILM_FRAMES - 1))] for i in range(FILM_FRAMES)]
    save_gif(out / "trajectory.gif", [grid(to_uint8(frame)) for frame in frames])
    fit = fitting(film[0].shape[-1])
    columns = min(STRIP_COLUMNS, len(film), fit)
    chosen = [film[round((i + 1) * len(film) / columns) - 1][: min(8, fit)] for i in range(columns)]
    strip: Pixels = np.stack([to_uint8(frame) for frame in chosen], axis=1)
    save_png(out / "trajectory.png", grid(strip.reshape(-1, *strip.shape[2:]), nrow=columns))
