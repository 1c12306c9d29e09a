"""ddpm-sample: rebuild everything from a checkpoint and draw images."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from ddpm.cli import hydra_app
from ddpm.config import SampleConfig, TrainConfig, check, to_dict
from ddpm.errors import UserError

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
    from ddpm import build, checkpoint

    started = time.perf_counter()
    path = checkpoint.find(config.ckpt)
    device = build.device(config.device)
    meta, tensors = checkpoint.load(path)
    trained = check(TrainConfig, meta.config)
    facts = build.facts(meta.facts)
    network = build.network(trained.model, trained.objective, facts)
    build.load_weights(network, checkpoint.part(tensors, "ema" if config.ema else "model"))
    network.to(device).eval()
    x, film = _draw(config, network, trained, facts, device)
    out = _folder(config, path)
    files = _write(config, x, film, out)
    about = {
        "checkpoint": str(path), "checkpoint_sha256": meta.sha256, "step": meta.step, **to_dict(config),
        "seconds": round(time.perf_counter() - started, 3), "files": files,
    }
    checkpoint.write_atomically(out / "sample.json", json.dumps(about, indent=2).encode())
    for file in [*files, "sample.json"]:
        print(out / file)


def _draw(config: SampleConfig, network: Any, trained: TrainConfig, facts: Any, device: Any) -> tuple[Any, list[Any]]:
    """Images (n, C, H, W) in chunks of batch_size, and the film of the first ones, if it is wanted."""
    import torch
    from tqdm import tqdm

    from ddpm import build
    from ddpm.sampling import sample

    schedule = build.schedule(trained.schedule)
    images, film = [], []
    steps_per_chunk = config.sampler.params["num_steps"] or schedule.num_timesteps
    chunks = torch.arange(config.n).split(config.batch_size)
    with torch.inference_mode(), tqdm(
        total=steps_per_chunk * len(chunks), unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
    ) as bar:
        for chunk in chunks:
            for step in sample(network, schedule, trained.objective.prediction, config.sampler, facts, chunk.to(device), config.seed):
                bar.update()
                if chunk[0] == 0 and "trajectory" in config.save:
                    film.append(step.x[:FILM_IMAGES].cpu())
            images.append(step.x.cpu())
    x = torch.cat(images)
    broken = (~torch.isfinite(x)).flatten(1).any(1).nonzero()[:, 0].tolist()
    if broken:
        raise UserError(f"images {broken[:10]} are not finite: this checkpoint cannot draw with sampler={config.sampler.name}")
    return x, film


def _folder(config: SampleConfig, checkpoint_file: Path) -> Path:
    if config.out is None:
        run = checkpoint_file.parent.parent if checkpoint_file.parent.name == "checkpoints" else checkpoint_file.parent
        return hydra_app.numbered_folder(run / "samples" / "drawn")
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make out={config.out}: {error.strerror}") from None
    return Path(config.out)


def _write(config: SampleConfig, x: Any, film: list[Any], out: Path) -> list[str]:
    """What `save` asks for; returns the names of the files."""
    import numpy as np

    from ddpm.images import grid, save_gif, save_png, to_uint8

    pixels, files = to_uint8(x), []
    if "grid" in config.save:
        save_png(out / "grid.png", grid(pixels, config.nrow))
        files.append("grid.png")
    if "images" in config.save:
        digits = max(5, len(str(len(pixels) - 1)))
        (out / "images").mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            save_png(out / "images" / f"{i:0{digits}d}.png", image)
        files.append("images")
    if "npz" in config.save:
        np.savez_compressed(out / "samples.npz", images=pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        files.append("samples.npz")
    if film:
        frames = [film[round(i * (len(film) - 1) / (FILM_FRAMES - 1))] for i in range(FILM_FRAMES)]
        save_gif(out / "trajectory.gif", [grid(to_uint8(frame)) for frame in frames])
        columns = min(STRIP_COLUMNS, len(film))
        chosen = [film[round((i + 1) * len(film) / columns) - 1][:8] for i in range(columns)]
        strip = np.stack([to_uint8(frame) for frame in chosen], axis=1)
        save_png(out / "trajectory.png", grid(strip.reshape(-1, *strip.shape[2:]), nrow=columns))
        files += ["trajectory.gif", "trajectory.png"]
    return files
