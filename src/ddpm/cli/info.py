"""ddpm-info: describe a checkpoint by its header alone."""

import math
from collections.abc import Mapping

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.cli import command
from ddpm.config.schema import InfoConfig
from ddpm.data.info import listed
from ddpm.errors import printable


def main(arguments: list[str]) -> None:
    command.run("info", arguments, info)


def info(config: InfoConfig) -> None:
    """Run the command for one checked config. Raises UserError."""
    path, (meta, tensors, length), notes = locate.read_wanted(
        config.ckpt, lambda file: (*checkpoint.read_meta(file), file.stat().st_size)
    )
    trained = checkpoint.config(path, meta)
    parameters = sum(math.prod(t.shape) for name, t in tensors.items() if name.startswith("model."))
    data, trainer = meta.facts, trained.trainer
    size, epochs = data["image_size"], trainer.max_epochs
    classes = f"{data['num_classes']} classes"
    if data["class_names"]:
        classes += f": {listed(data['class_names'], most=None)}"
    end = f"of {trainer.max_steps:,} steps" if epochs is None else f"steps of {epochs} epochs"
    rows = {
        "checkpoint": f"{path} ({length / 2**20:.1f} MiB)",
        "data": f"{data['name']}, {size}×{size}×{data['channels']}, {classes}",
        "network": f"{trained.model.name}, {parameters:,} parameters ({_flat(trained.model.params)})",
        "schedule": f"{trained.schedule.name} ({_flat(trained.schedule.params)})",
        "objective": f"predicts {trained.objective.prediction}, weight {trained.objective.weight}",
        "sampler": f"{trained.sampler.name} ({_flat(trained.sampler.params)})",
        "trained": f"{meta.step:,} {end}, batch {trainer.batch_size}, seed {trained.seed}",
        "figures": ", ".join(f"{key} {value:.5g}" for key, value in meta.figures.items()),
        "made with": ", ".join(f"{key} {value}" for key, value in meta.versions.items()),
        "tensors": f"{len(tensors)}, SHA-256 {meta.sha256}",
    }
    for line in [*notes, *(f"{key:<11} {value}" for key, value in rows.items())]:
        print(printable(line))


def _flat(params: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in params.items())
