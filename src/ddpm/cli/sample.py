"""ddpm-sample: rebuild everything from a checkpoint and draw images."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.cli import hydra_app
from ddpm.config import SampleConfig, TrainConfig, check, to_dict
from ddpm.errors import UserError

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
    meta, _ = checkpoint.read_meta(checkpoint.find(ckpt))
    trained = check(TrainConfig, meta.config)
    if hydra_app.typed_value(overrides, "task") in (
        "reconstruct",
        "interpolate",
    ):  # these want no fresh noise
        return ["sampler=ddim", "sampler.spacing=logsnr"]
    sampler = trained.sampler.to_dict()
    if sampler["num_steps"] is not None:  # written for many timesteps; this model may have few
        sampler["num_steps"] = min(sampler["num_steps"], trained.schedule.params["num_timesteps"])
    return hydra_app.as_overrides({"sampler": sampler})


def sample(config: SampleConfig) -> None:
    """The whole command for one checked config."""
    from ddpm import build, checkpoint, sampling
    from ddpm.cli import plan

    started = time.perf_counter()
    path = checkpoint.find(config.ckpt)
    model, meta = sampling.load(path, build.device(config.device), config.ema)
    todo = plan.make(config, model)
    for note in todo.notes:
        print(note, flush=True)
    drawn = _draw(config, model, todo)
    measured, figures = todo.measure(drawn.x) if todo.measure else ("", {})
    out = _folder(config, path)
    files = _write(config, todo, drawn, out)
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
        "seconds": round(time.perf_counter() - started, 3),
        "files": files,
    }
    checkpoint.write_atomically(out / "sample.json", json.dumps(about, indent=2).encode())
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
    """All images, in chunks of batch_size."""
    import torch
    from tqdm import tqdm

    from ddpm.cli.brought import guidance
    from ddpm.sampling import denoiser

    images, film, evaluations = [], [], 0
    total = todo.num_steps * -(-todo.n // config.batch_size)
    with (
        torch.inference_mode(),
        tqdm(total=total, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar,
    ):
        for places in torch.split(torch.arange(todo.n), config.batch_size):
            y = None if todo.y is None else todo.y[places].to(model.device)
            denoise = denoiser(model, todo.sampler, y, guidance(config))
            for step in todo.steps(denoise, places):
                bar.update()
                if places[0] == 0 and "trajectory" in config.save:
                    film.append(step.x[:FILM_IMAGES].cpu())
            images.append(step.x.cpu())
            evaluations = denoise.evaluations
    x = torch.cat(images)
    broken = (~torch.isfinite(x)).flatten(1).any(1)
    if broken.any():
        raise UserError(
            f"images {broken.nonzero()[:10, 0].tolist()} are not finite after {todo.sampler.name} with "
            f"{todo.num_steps} steps: try sampler.clip=clip, or more steps"
        )
    return Drawn(x, todo.y, film, evaluations)


def _folder(config: SampleConfig, checkpoint_file: Path) -> Path:
    if config.out is None:
        run = (
            checkpoint_file.parent.parent
            if checkpoint_file.parent.name == "checkpoints"
            else checkpoint_file.parent
        )
        return hydra_app.numbered_folder(run / "samples" / "drawn")
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make out={config.out}: {error.strerror}") from None
    return Path(config.out)


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
        np.savez_compressed(
            out / "samples.npz", **arrays if classes is None else {**arrays, "labels": classes}
        )
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
