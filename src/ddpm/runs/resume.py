"""`trainer.resume`: in which folder a run goes on, from which checkpoints, and what settings have changed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config.schema import PATH_KEYS, TrainConfig, settings_of
from ddpm.errors import CheckpointError, UserError

# A path is not followed because a file says so: a checkpoint may come from anywhere.
NO_MATTER = {*PATH_KEYS, "trainer.max_steps", "trainer.max_epochs"}


class Place(NamedTuple):
    """Where a run is to live, and what it is to go on from."""

    folder: str | None  # None: a new one
    in_place: bool  # go on with the run that is there
    files: list[Path]  # checkpoints to go on from, best first; none in place: those that are there
    again: bool = False  # torchrun started the same run once more; see elastic.py


def place(config: TrainConfig) -> Place:
    """Return where a run begins or goes on. Raises UserError where there is nothing to go on from."""
    wanted = config.trainer.resume
    if wanted is None:
        return Place(config.run_dir, False, [])
    if wanted == "auto":
        if config.run_dir is None:
            raise UserError("trainer.resume=auto needs run_dir=…, to know which run to go on with")
        return Place(config.run_dir, True, [])
    files = locate.find(wanted)
    home = files[0].parent.parent if files[0].parent.name == "checkpoints" else None
    folder = config.run_dir or (None if home is None else str(home))
    in_place = home is not None and folder is not None and home.resolve() == Path(folder).resolve()
    a_run = wanted == "latest" or Path(wanted).is_dir()
    return Place(folder, in_place, [] if in_place and a_run else files)


def same_run(folder: Path, config: TrainConfig) -> bool:
    """Whether the newest checkpoint of a run was made, to its last step, with just these settings."""
    files = locate.saved_steps(folder)
    if not files:
        return False
    try:
        stored = checkpoint.config(files[-1], checkpoint.read_meta(files[-1])[0])
    except CheckpointError:
        return False
    return length(stored) == length(config) and not changes(stored, config)


def length(config: TrainConfig) -> tuple[int, int | None]:
    return config.trainer.max_steps, config.trainer.max_epochs


def changes(was: TrainConfig, now: TrainConfig) -> dict[str, str]:
    """Return a line for each changed setting, by its key: "optimizer.lr was 0.001, is 1e-05"."""
    old, new = settings_of(was), settings_of(now)
    return {
        key: f"{key} was {brief(old.get(key))}, is {brief(new.get(key))}"
        for key in old | new
        if key not in NO_MATTER and old.get(key) != new.get(key)
    }


def brief(value: Any) -> str:
    return json.dumps(value) if len(json.dumps(value)) < 60 else "…"
