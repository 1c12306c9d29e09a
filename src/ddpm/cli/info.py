"""ddpm-info: what a checkpoint is, read from its header alone."""

import math

from ddpm.cli import app
from ddpm.config.schema import InfoConfig
from ddpm.errors import printable


def main() -> None:
    app.run("info", InfoConfig, info)


def info(config: InfoConfig) -> None:
    from ddpm.checkpoint import file as checkpoint
    from ddpm.checkpoint import locate

    path, notes = locate.newest_good(locate.find(config.ckpt), check=checkpoint.read_meta)
    meta, tensors = checkpoint.read_meta(path)
    trained = checkpoint.config(path, meta)
    parameters = sum(math.prod(t.shape) for name, t in tensors.items() if name.startswith("model."))
    facts, length = meta.facts, trained.trainer
    size = facts["image_size"]
    of = (
        f"of {length.max_steps:,} steps"
        if length.max_epochs is None
        else f"steps of {length.max_epochs} epochs"
    )
    rows = {
        "checkpoint": f"{path} ({path.stat().st_size / 2**20:.1f} MiB)",
        "data": f"{facts['name']}, {size}×{size}×{facts['channels']}, {facts['num_classes']} classes",
        "network": f"{trained.model.name}, {parameters:,} parameters ({_flat(trained.model.params)})",
        "schedule": f"{trained.schedule.name} ({_flat(trained.schedule.params)})",
        "objective": f"predicts {trained.objective.prediction}, weight {trained.objective.weight}",
        "sampler": f"{trained.sampler.name} ({_flat(trained.sampler.params)})",
        "trained": f"{meta.step:,} {of}, batch {length.batch_size}, seed {trained.seed}",
        "figures": ", ".join(f"{key} {value:.5g}" for key, value in meta.figures.items()),
        "made with": ", ".join(f"{key} {value}" for key, value in meta.versions.items()),
        "tensors": f"{len(tensors)}, SHA-256 {meta.sha256}",
    }
    for note in notes:
        print(printable(note))
    for key, value in rows.items():
        print(f"{key:<11} {printable(value)}")


def _flat(params: object) -> str:
    assert hasattr(params, "items")
    return ", ".join(f"{key}={value}" for key, value in params.items())
