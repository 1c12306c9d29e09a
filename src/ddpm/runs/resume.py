"""`trainer.resume`: which checkpoint to go on from, in which folder, with what settings, and how equal it will be."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.checkpoint.header import Meta
from ddpm.config.schema import NOT_PART_OF_THE_EXPERIMENT, PATH_KEYS, TrainConfig, to_dict
from ddpm.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from ddpm.train.state import TrainState

MUST_MATCH = ("dataset", "model", "schedule", "objective", "seed")  # between a run and its resumption
# A path is not followed because a file says so: a checkpoint may come from anywhere.
NO_MATTER = {*NOT_PART_OF_THE_EXPERIMENT, *PATH_KEYS, "trainer.max_steps", "trainer.max_epochs"}


@dataclass(frozen=True)
class Place:
    """Where a run is to live, and what it is to go on from."""

    folder: str | None  # None: a new one
    in_place: bool  # go on with the run that is there
    files: list[Path]  # checkpoints to go on from, best first; none in place: those that are there
    again: bool = False  # torchrun started the same run once more; see restarts.py


@dataclass(frozen=True)
class Source:
    """A whole checkpoint."""

    path: Path
    meta: Meta
    config: TrainConfig
    notes: list[str]  # for the user: about others that are not whole


def place(config: TrainConfig) -> Place:
    """Raises UserError where there is nothing to go on from."""
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


def choose(place: Place, config: TrainConfig) -> Source | None:
    """The newest whole one of the files, or of the folder's, listed only now that it is locked.

    Raises CheckpointError if there is none, or if it was another run's.
    """
    from ddpm.checkpoint import verify

    files = place.files
    if place.in_place and not files:
        files = locate.of_run(Path(str(place.folder)))
    if not files:
        return None
    path, notes = locate.newest_good(files, check=verify.examine)
    meta, _ = checkpoint.read_meta(path)
    stored = checkpoint.config(path, meta)
    differ = [
        f"{key} was {_brief(was)}, is {_brief(now)}"
        for key, was, now in _changes(stored, config)
        if key.split(".")[0] in MUST_MATCH
    ]
    if differ:
        why = "; torchrun's run id led here: another --rdzv-id begins a new run" if place.again else ""
        raise CheckpointError(f"cannot resume {path}: " + "; ".join(differ) + why)
    return Source(path, meta, stored, notes)


def same_run(folder: Path, config: TrainConfig) -> bool:
    """Whether the newest checkpoint of a run was made, to its last step, with just these settings."""
    files = locate.saved_steps(folder)
    if not files:
        return False
    try:
        meta, _ = checkpoint.read_meta(files[-1])
        stored = checkpoint.config(files[-1], meta)
    except CheckpointError:
        return False
    lengths = [(c.trainer.max_steps, c.trainer.max_epochs) for c in (stored, config)]
    return lengths[0] == lengths[1] and not any(_changes(stored, config))


def notes(source: Source, run: "TrainState") -> list[str]:
    """What the user should know: what broke, what was changed, and whether the bits will be the same."""
    from ddpm.train.environment import BITWISE_FACTORS

    changed = [
        f"changed since: {key} was {_brief(was)}, is {_brief(now)}"
        for key, was, now in _changes(source.config, run.config)
    ]
    was, is_now = source.config.trainer, run.config.trainer
    longer = (was.max_steps, was.max_epochs) != (is_now.max_steps, is_now.max_epochs)
    if longer and run.config.optimizer.decay != "constant":
        changed.append(
            f"the learning rate follows optimizer.decay={run.config.optimizer.decay} to step {run.max_steps:,}"
        )
    alone = {"processes": "1", "group_norm": "torch", "weight": "1"}  # where these are not written down
    then, now = alone | source.meta.versions, alone | run.environment
    other = [
        f"{key} was {then.get(key, 'unknown')}, is {now[key]}"
        for key in BITWISE_FACTORS
        if then.get(key) != now[key]
    ]
    if now["deterministic"] == "no":
        other.append("on a GPU only trainer.deterministic=true repeats every bit")
    close = ["close to an unbroken run, but not bit by bit: " + "; ".join(other)] if other else []
    return [*source.notes, f"going on from step {source.meta.step:,}: {source.path}", *changed, *close]


def _changes(was: TrainConfig, now: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    for key, a, b in _differences("", to_dict(was), to_dict(now)):
        if key not in NO_MATTER:
            yield key, a, b


def _differences(path: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was | now:
            yield from _differences(f"{path}.{key}" if path else key, was.get(key), now.get(key))
    elif was != now:
        yield path, was, now


def _brief(value: Any) -> str:
    return json.dumps(value) if len(json.dumps(value)) < 60 else "…"
