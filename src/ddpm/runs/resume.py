"""`trainer.resume`: where a run goes on, from which checkpoints and settings, and what has changed."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config.overrides import as_overrides, typed_value
from ddpm.config.schema import PATH_KEYS, TrainConfig, Trainer, settings_of, to_dict
from ddpm.errors import CheckpointError, UserError

# A path is not followed because a file says so: a checkpoint may come from anywhere.
NO_MATTER = {*PATH_KEYS, "trainer.max_steps", "trainer.max_epochs"}


class Place(NamedTuple):
    """Where a run is to live, and what it is to go on from."""

    folder: str | None  # None: a new one
    in_place: bool  # go on with the run that is there
    files: list[Path]  # checkpoints to go on from, best first; none in place: those that are there
    again: bool = False  # the same command once more: trainer.resume=auto, or a restart by torchrun


def place(config: TrainConfig) -> Place:
    """Return where a run begins or goes on. Raises UserError where there is nothing to go on from.

    Where torchrun restarts its processes, the run goes on in its folder, whatever was typed for the first start.
    """
    asked, allowed = _asked(config), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if asked.folder is None and allowed != "0":
        raise UserError(f"torchrun --max-restarts={allowed}: name the folder to go on in with run_dir=…")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or asked.folder is None:
        return asked
    return Place(asked.folder, True, locate.of_run(Path(asked.folder)) or asked.files, again=True)


def _asked(config: TrainConfig) -> Place:
    """Return what `run_dir` and `trainer.resume` say. Raises UserError."""
    wanted = config.trainer.resume
    if wanted is None:
        return Place(config.run_dir, False, [])
    if wanted == "auto":
        if config.run_dir is None:
            raise UserError("trainer.resume=auto needs run_dir=…, to know which run to go on with")
        return Place(config.run_dir, True, [], again=True)
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


def before_typed(overrides: list[str]) -> list[str]:
    """Return the settings of the run to resume, as overrides to put before those typed now, without its paths."""
    check_lengths(overrides)
    typed = typed_value(overrides, "trainer.resume")
    if typed in (None, "auto", "null"):
        return []
    if typed_value(overrides, "trainer.init_from") not in (None, "null"):
        raise UserError(f"trainer.resume={typed} and trainer.init_from: leave one of them out")
    path, (meta, _), _ = locate.read_wanted(str(typed), checkpoint.read_meta)
    was = to_dict(checkpoint.config(path, meta))
    if "path" in was["dataset"] and typed_value(overrides, "dataset.path") is None:
        typed = f"dataset.path was '{was['dataset']['path']}' in this run"
        raise UserError(f"{typed}; a path in a file is not followed by itself: type dataset.path=…")
    was["dataset"].pop("path", None)
    was["trainer"]["init_from"] = None  # done long ago
    if typed_value(overrides, "trainer.max_steps"):
        was["trainer"]["max_epochs"] = None  # two ways to say one thing: the typed one counts
    new = ("run_dir", "overwrite", "data_root", *(key for key in was if typed_value(overrides, key)))
    return as_overrides({key: value for key, value in was.items() if key not in new})


def check_lengths(overrides: list[str]) -> None:
    """Raises UserError where the length of a training is typed twice."""
    lengths = [typed_value(overrides, f"trainer.{key}") for key in ("max_epochs", "max_steps")]
    if None not in lengths and "null" not in lengths:
        raise UserError("trainer.max_epochs and trainer.max_steps both say how long to train: give one")


def check_batch(trainer: Trainer, processes: int = 1) -> None:
    """Check that each part of a batch has an image; not of stored configs. Raises UserError."""
    batch, parts = trainer.batch_size, trainer.accumulate
    if batch < processes * parts and processes > 1:
        shared = f"it is shared by {processes} processes with trainer.accumulate={parts}"
        raise UserError(f"trainer.batch_size={batch}: {shared}: must be at least {processes * parts}")
    if batch < parts:
        raise UserError(f"trainer.accumulate={parts}: must be at most trainer.batch_size={batch}")
