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
    return hydra_app.as_overrides({"sampler": check(TrainConfig, meta.config).sampler.to_dict()})


def sample(config: SampleConfig) -> None:
    """The whole command for one checked config."""
    from ddpm import build, checkpoint, sampling

    started = time.perf_counter()
    path = checkpoint.find(config.ckpt)
    model, meta = sampling.load(path, build.device(config.device), config.ema)
    drawn = _draw(config, model)
    out = _folder(config, path)
    files = _write(config, drawn, out)
    about = {
        "checkpoint": str(path),
        "checkpoint_sha256": meta.sha256,
        "step": meta.step,
        **to_dict(config),
        "evaluations_per_image": drawn.evaluations,
        "seconds": round(time.perf_counter() - started, 3),
        "files": files,
    }
    checkpoint.write_atomically(out / "sample.json", json.dumps(about, indent=2).encode())
    for file in [*files, "sample.json"]:
        print(out / file)


@dataclass(frozen=True)
class Drawn:
    x: "Tensor"  # (n, C, H, W)
    y: "Tensor | None"  # (n,)
    film: "list[Tensor]"  # the first images after each step
    evaluations: float  # of the network, for each image


def _draw(config: SampleConfig, model: "Model") -> Drawn:
    """All images, in chunks of batch_size."""
    import torch
    from tqdm import tqdm

    from ddpm.sampling import Guidance, denoiser, draw, labels, levels

    guidance = Guidance(config.guidance_scale, config.guidance_rescale, _interval(config.guidance_interval))
    index = torch.tensor(config.index) if config.index else torch.arange(config.n)
    y = labels(model, _wanted(config), index, guidance)
    images, film, evaluations = [], [], 0
    total = (len(levels(model, config.sampler)) - 1) * -(-len(index) // config.batch_size)
    with (
        torch.inference_mode(),
        tqdm(total=total, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar,
    ):
        for places in torch.split(torch.arange(len(index)), config.batch_size):
            part_y = None if y is None else y[places].to(model.device)
            denoise = denoiser(model, config.sampler, part_y, guidance)
            for step in draw(model, config.sampler, denoise, index[places].to(model.device), config.seed):
                bar.update()
                if places[0] == 0 and "trajectory" in config.save:
                    film.append(step.x[:FILM_IMAGES].cpu())
            images.append(step.x.cpu())
            evaluations = denoise.evaluations
    x = torch.cat(images)
    broken = (~torch.isfinite(x)).flatten(1).any(1)
    if broken.any():
        raise UserError(
            f"images {index[broken][:10].tolist()} are not finite after {config.sampler.name} with "
            f"{total} steps: try sampler.clip=clip, or more steps"
        )
    return Drawn(x, y, film, evaluations)


def _interval(bounds: list[float]) -> tuple[float, float]:
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise UserError(f"guidance_interval={bounds}: must be two rising numbers [low, high]")
    return bounds[0], bounds[1]


def _wanted(config: SampleConfig) -> list[int] | None:
    """The classes asked for; None where all are, or nothing was said."""
    if isinstance(config.label, str):
        if config.label != "all":
            raise UserError(f"label={config.label}: must be a number, a list such as [0,1,2], or all")
        return None
    return config.label


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


def _write(config: SampleConfig, drawn: Drawn, out: Path) -> list[str]:
    """What `save` asks for; returns the names of the files."""
    import numpy as np

    from ddpm.images import grid, rows, save_gif, save_png, to_uint8

    pixels, files = to_uint8(drawn.x), []
    classes = None if drawn.y is None else drawn.y.cpu().numpy()
    if "grid" in config.save:
        if classes is not None and config.nrow is None and len(np.unique(classes)) > 1:
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
