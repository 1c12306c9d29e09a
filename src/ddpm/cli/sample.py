"""ddpm-sample: rebuild everything from a checkpoint and draw images."""

import io
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.cli import app, default_sampler
from ddpm.config.schema import SampleConfig, to_dict
from ddpm.errors import printable
from ddpm.io.files import write_atomically
from ddpm.runs import output_dirs
from ddpm.runtime.world import ALONE, World, world

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddpm.checkpoint.header import Meta
    from ddpm.sample.model import Model
    from ddpm.sample.tasks import Plan

FILM_IMAGES = 16
FILM_FRAMES = 40
STRIP_COLUMNS = 10


def main() -> None:
    app.run("sample", SampleConfig, sample, defaults=_default_sampler)


def _default_sampler(typed: list[str]) -> list[str]:
    return default_sampler.overrides("sample", SampleConfig, typed)


def sample(config: SampleConfig) -> None:
    """The whole command for one checked config.

    Of several processes (torchrun) each draws its share of the images; rank 0 chooses the checkpoint, and writes.
    """
    from ddpm.runtime import device as runtime_device
    from ddpm.runtime import memory
    from ddpm.runtime.distributed import process_group

    started, own = time.perf_counter(), world()
    memory.keep_freed()
    device = runtime_device.device(config.device, own)
    with process_group(own, device):
        _sample_on(config, own, device, started)


def _sample_on(config: SampleConfig, own: World, device: "torch.device", started: float) -> None:
    from ddpm.checkpoint import locate, verify
    from ddpm.runtime.device import slow_in_bf16
    from ddpm.runtime.distributed import broadcast_object, gather_to_rank_zero, raise_on_all_ranks
    from ddpm.sample import tasks
    from ddpm.sample.model import load

    path, notes = Path(), list[str]()
    with raise_on_all_ranks(own):
        if own.first:
            path, notes = locate.newest_good(locate.find(config.ckpt), check=verify.examine)
    path = broadcast_object(own, path)
    with raise_on_all_ranks(own):
        model, meta = load(path, device, config.ema, config.precision)
        todo = tasks.make(config, model)
    slow = slow_in_bf16("precision", config.precision, device)
    for note in filter(None, [*notes, *todo.notes, slow] if own.first else []):
        print(printable(note), flush=True)
    with raise_on_all_ranks(own):
        drawn = _draw(config, model, todo, own)
    drawn = replace(
        drawn,
        x=gather_to_rank_zero(own, drawn.x, own.lengths(todo.n)),
        film=_whole_film(config, drawn.film, todo.n, own),
    )
    with raise_on_all_ranks(own):
        if own.first:
            _finish(config, todo, drawn, path, meta, started)


def _finish(
    config: SampleConfig, todo: "Plan", drawn: "Drawn", path: Path, meta: "Meta", started: float
) -> None:
    """All that is written and said of all images."""
    measured, figures = todo.measure(drawn.x) if todo.measure else ("", {})
    about = {
        "checkpoint": str(path),
        "checkpoint_sha256": meta.sha256,
        "step": meta.step,
        **to_dict(config),
        "sampler": todo.sampler.to_dict(),
        "images": todo.n,
        **todo.about,
        **figures,
        "evaluations_per_image": drawn.evaluations,
    }
    with output_dirs.results(config.out, output_dirs.of_run(path) / "samples" / "drawn") as out:
        files = _write(config, todo, drawn, out)
        about |= {"seconds": round(time.perf_counter() - started, 3), "files": files}
        write_atomically(out / "sample.json", json.dumps(about, indent=2).encode())
    if measured:
        print(measured)
    for file in [*files, "sample.json"]:
        print(out / file)


@dataclass(frozen=True)
class Drawn:
    x: "Tensor"  # (n, C, H, W)
    y: "Tensor | None"  # (n,)
    film: "Tensor"  # (k, steps, C, H, W), the first images after each step; no steps where it is not wanted
    evaluations: float  # of the network, for each image


def _draw(config: SampleConfig, model: "Model", todo: "Plan", own: World = ALONE) -> Drawn:
    """This process's images, with a bar on a terminal."""
    import torch
    from torch import Tensor

    from ddpm.diffusion.samplers import Step
    from ddpm.runtime import console
    from ddpm.sample.sampling import draw_all
    from ddpm.sample.user_images import guidance

    share, filmed = own.share(todo.n), _filmed(config, todo.n)
    film: dict[int, list[Tensor]] = {}  # by the first place of a chunk, after each step
    with console.of_steps(own, todo.num_steps, share.stop - share.start, config.batch_size, leave=True) as (
        bar,
        smaller,
    ):

        def watch(places: Tensor, step: Step) -> None:
            bar.update()
            if places[0] < filmed:
                film.setdefault(int(places[0]), []).append(step.x[: filmed - int(places[0])].cpu())

        def halved(left: int, size: int) -> None:
            film.pop(share.stop - left, None)
            smaller(left, size)

        x, evaluations = draw_all(
            model,
            todo.sampler,
            guidance(config),
            todo.y,
            torch.arange(share.start, share.stop),
            todo.steps,
            config.batch_size,
            watch,
            halved,
        )
    frames = [torch.stack(steps, dim=1) for steps in film.values()]
    return Drawn(x, todo.y, torch.cat(frames) if frames else torch.empty(0, 0, *model.shape), evaluations)


def _filmed(config: SampleConfig, n: int) -> int:
    """How many of the first images are seen after each step."""
    return min(FILM_IMAGES, config.batch_size, n) if "trajectory" in config.save else 0


def _whole_film(config: SampleConfig, own_part: "Tensor", n: int, own: World) -> "Tensor":
    """On rank 0, of all the images that are filmed, from each process's part of them."""
    from ddpm.runtime.distributed import gather_to_rank_zero

    filmed, shares = _filmed(config, n), (own.share(n, rank) for rank in range(own.size))
    return gather_to_rank_zero(
        own, own_part, [max(0, min(share.stop, filmed) - share.start) for share in shares]
    )


def _write(config: SampleConfig, todo: "Plan", drawn: Drawn, out: Path) -> list[str]:
    """What `save` asks for; returns the names of the files."""
    import numpy as np

    from ddpm.io.images import grid, rows, save_gif, save_png, to_uint8

    pixels, files = to_uint8(drawn.x), []
    classes = None if drawn.y is None else drawn.y.cpu().numpy()
    if "grid" in config.save:
        if todo.rows is not None:
            save_png(out / "grid.png", grid(*todo.table(pixels)))
        elif classes is not None and config.nrow is None and len(np.unique(classes)) > 1:
            save_png(out / "grid.png", grid(*rows(pixels, classes)))
        else:
            save_png(out / "grid.png", grid(pixels, config.nrow))
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
        frames = [film[round(i * (len(film) - 1) / (FILM_FRAMES - 1))] for i in range(FILM_FRAMES)]
        save_gif(out / "trajectory.gif", [grid(to_uint8(frame)) for frame in frames])
        columns = min(STRIP_COLUMNS, len(film))
        chosen = [film[round((i + 1) * len(film) / columns) - 1][:8] for i in range(columns)]
        strip = np.stack([to_uint8(frame) for frame in chosen], axis=1)
        save_png(out / "trajectory.png", grid(strip.reshape(-1, *strip.shape[2:]), nrow=columns))
        files += ["trajectory.gif", "trajectory.png"]
    return files
