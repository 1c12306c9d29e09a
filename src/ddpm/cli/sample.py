"""ddpm-sample: rebuild everything from a checkpoint and draw images."""

import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.cli import hydra_app
from ddpm.config import SampleConfig, check, to_dict, trained_sampler
from ddpm.errors import UserError, printable
from ddpm.files import reason, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm.cli.plan import Plan
    from ddpm.sampling import Model

FILM_IMAGES = 16
FILM_FRAMES = 40
STRIP_COLUMNS = 10


def main() -> None:
    hydra_app.run("sample", SampleConfig, sample, defaults=_trained_sampler)


def _trained_sampler(overrides: list[str]) -> list[str]:
    """The sampler the checkpoint was trained with, unless another one is typed."""
    from ddpm import checkpoint

    ckpt = hydra_app.typed_value(overrides, "ckpt")
    if ckpt is None or hydra_app.typed_value(overrides, "sampler") is not None:
        return []
    others = [override for override in overrides if not override.lstrip("+~").startswith("sampler")]
    check(SampleConfig, hydra_app.compose("sample", others))  # their mistakes come before those of a file
    path, _ = checkpoint.newest_good(checkpoint.find(ckpt), check=checkpoint.read_meta)
    trained = checkpoint.config(path, checkpoint.read_meta(path)[0])
    # these two want no fresh noise
    if hydra_app.typed_value(overrides, "task") in ("reconstruct", "interpolate"):
        return ["sampler=ddim", "sampler.spacing=logsnr"]
    return hydra_app.as_overrides({"sampler": trained_sampler(trained).to_dict()})


def sample(config: SampleConfig) -> None:
    """The whole command for one checked config."""
    from ddpm import build, checkpoint, sampling
    from ddpm.cli import plan

    started = time.perf_counter()
    path, notes = checkpoint.newest_good(checkpoint.find(config.ckpt), check=build.examine)
    model, meta = sampling.load(path, build.device(config.device), config.ema)
    todo = plan.make(config, model)
    for note in [*notes, *todo.notes]:
        print(printable(note), flush=True)
    drawn = _draw(config, model, todo)
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
    with _folder(config, path) as out:
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
    film: "list[Tensor]"  # the first images after each step
    evaluations: float  # of the network, for each image


def _draw(config: SampleConfig, model: "Model", todo: "Plan") -> Drawn:
    """All images, with a bar on a terminal."""
    from torch import Tensor
    from tqdm import tqdm

    from ddpm.cli.brought import guidance
    from ddpm.samplers import Step
    from ddpm.sampling import draw_all

    film: list[Tensor] = []
    with tqdm(unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def count(left: int, size: int) -> None:
            bar.total = bar.n + todo.num_steps * -(-left // size)

        def watch(places: Tensor, step: Step) -> None:
            bar.update()
            if places[0] == 0 and "trajectory" in config.save:
                film.append(step.x[:FILM_IMAGES].cpu())

        def halved(left: int, size: int) -> None:
            if left == todo.n:
                film.clear()
            count(left, size)
            tqdm.write(f"out of memory: going on with batch_size={size}, which changes no image")

        count(todo.n, config.batch_size)
        x, evaluations = draw_all(
            model,
            todo.sampler,
            guidance(config),
            todo.y,
            todo.n,
            todo.steps,
            config.batch_size,
            watch,
            halved,
        )
    return Drawn(x, todo.y, film, evaluations)


@contextmanager
def _folder(config: SampleConfig, checkpoint_file: Path) -> Iterator[Path]:
    """Where the files go. A folder made for them goes again if they cannot all be written."""
    if config.out is None:
        home = checkpoint_file.parent
        run = home.parent if home.name == "checkpoints" else home
        out, new = hydra_app.numbered_folder(run / "samples" / "drawn"), True
    else:
        out, new = Path(config.out), not Path(config.out).exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make out={config.out}: {reason(error)}") from None
    try:
        yield out
    except BaseException as error:
        if new:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {out}: {reason(error)}") from None
        raise


def _write(config: SampleConfig, todo: "Plan", drawn: Drawn, out: Path) -> list[str]:
    """What `save` asks for; returns the names of the files."""
    import numpy as np

    from ddpm.images import grid, rows, save_gif, save_png, to_uint8

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
    if film := drawn.film:
        frames = [film[round(i * (len(film) - 1) / (FILM_FRAMES - 1))] for i in range(FILM_FRAMES)]
        save_gif(out / "trajectory.gif", [grid(to_uint8(frame)) for frame in frames])
        columns = min(STRIP_COLUMNS, len(film))
        chosen = [film[round((i + 1) * len(film) / columns) - 1][:8] for i in range(columns)]
        strip = np.stack([to_uint8(frame) for frame in chosen], axis=1)
        save_png(out / "trajectory.png", grid(strip.reshape(-1, *strip.shape[2:]), nrow=columns))
        files += ["trajectory.gif", "trajectory.png"]
    return files
