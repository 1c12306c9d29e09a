"""One opened run: its folder, locked for this process, and the checkpoint that it goes on from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate, verify
from ddpm.checkpoint.header import Meta
from ddpm.config.schema import TrainConfig
from ddpm.errors import CheckpointError, UserError
from ddpm.io.files import reason
from ddpm.runs import resume, run_dir
from ddpm.runs.resume import Place
from ddpm.runtime.console import tell
from ddpm.runtime.distributed import broadcast_object, raise_on_all_ranks
from ddpm.runtime.world import World
from ddpm.train import metrics_file
from ddpm.train.environment import BITWISE_FACTORS
from ddpm.train.state import TrainState

MUST_MATCH = ("dataset", "model", "schedule", "objective", "seed")  # between a run and its resumption
BEFORE_THESE_WERE_STORED = {"processes": "1", "group_norm": "torch", "weight": "1"}


class Source(NamedTuple):
    """A whole checkpoint to go on from."""

    path: Path
    meta: Meta
    config: TrainConfig
    notes: list[str]  # for the user: about others that are not whole


class OpenRun:
    """The folder of a run and what it goes on from. Only rank 0 knows; the other processes are sent the path.

    `path` is the current folder until `settle`, which makes a new one where none was named.
    """

    def __init__(self, world: World) -> None:
        self.world, self.path = world, Path()
        self.source: Source | None = None
        self.claim: run_dir.Claim | None = None
        self.place = Place(None, False, [])
        # in the order of the weights that the run begins with; sent to all processes
        self.class_names: list[str] = []

    def choose(self, config: TrainConfig) -> None:
        """Lock the folder that the config names, and choose the checkpoint to go on from. Raises UserError."""
        self.place = resume.place(config)
        folder, in_place = self.place.folder, self.place.in_place
        if folder is not None:
            self.claim = run_dir.claim(folder, config.overwrite, fresh=not in_place)
        self.source = choose(self.place, config)
        fresh = in_place and self.source is None
        if fresh and (found := run_dir.more_than_begun(Path(str(folder)))):
            anew = "is its disk mounted? overwrite=true without trainer.resume begins anew"
            raise UserError(f"{folder} holds no checkpoint, but {found}: nothing to go on with ({anew})")
        if self.source:
            self.class_names = self.source.meta.facts["class_names"]
        elif (ckpt := config.trainer.init_from) is not None:
            path, _ = locate.newest_good(locate.find(ckpt), check=checkpoint.read_meta)
            self.class_names = checkpoint.read_meta(path)[0].facts["class_names"]

    def settle(self, state: TrainState) -> float | None:
        """Return the val_eps_mse of a finished run; else set `path`, to a new folder if need be, and return None.

        Every process calls it. Raises UserError where a named checkpoint has no steps left, or no folder can be made.
        """
        figure = None
        with raise_on_all_ranks(self.world):
            if self.world.first:
                figure = self._last_figure(state)
                if figure is None:
                    self.claim = self.claim or run_dir.claim_new()
                    self.path = self.claim.path
        self.path, figure = broadcast_object(self.world, (self.path, figure))
        return figure

    def _last_figure(self, state: TrainState) -> float | None:
        """Return the val_eps_mse of a finished run. Raises UserError where its checkpoint was named."""
        if self.source is None or state.step < state.max_steps:
            return None
        place, source = self.place, self.source.path
        result = run_dir.read_result(source.parent.parent) if place.in_place else None
        if place.in_place and (result is None or result["step"] != state.step):
            return None  # the end is written once more
        if not place.again or result is None:
            key = "max_epochs" if state.config.trainer.max_epochs is not None else "max_steps"
            raise UserError(f"{source} has done its {state.step} steps: give trainer.{key} a larger number")
        figure = result["val_eps_mse"]
        tell(f"{source.parent.parent}: done already, {state.step:,} steps, val_eps_mse {figure:.4f}")
        return figure

    def begin(self, step: int) -> list[str]:
        """Make room for what the run writes from `step` on. Returns a line about each file moved. Raises OSError."""
        run_dir.sweep(self.path)
        if not self.place.in_place:  # new or, with overwrite=true, in the place of another
            return run_dir.clear(self.path)
        if self.source is None:
            return run_dir.set_aside_begun(self.path)
        moved = run_dir.set_aside(self.path, step)
        metrics_file.complete(self.path / "metrics.jsonl", step, self.source.meta.figures)
        return moved

    @contextmanager
    def name_last_checkpoint(self) -> Iterator[None]:
        """Turn OSError into UserError, and let every UserError say which checkpoint is left."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {reason(error)}{self._last_good()}") from None
        except UserError as error:
            raise type(error)(f"{error}{self._last_good()}") from None

    def _last_good(self) -> str:
        files = locate.of_run(self.path)
        return f"; the last checkpoint is {files[0]}" if files else ""


@contextmanager
def open_run(config: TrainConfig, world: World) -> Iterator[OpenRun]:
    """Open a run as rank 0, until the block ends: a folder made here without a file in it is removed then.

    Raises UserError in all processes.
    """
    run = OpenRun(world)
    try:
        with raise_on_all_ranks(world):
            if world.first:
                run.choose(config)
        run.class_names = broadcast_object(world, run.class_names)
        yield run
    finally:
        if run.claim is not None:
            run.claim.release()


def choose(place: Place, config: TrainConfig) -> Source | None:
    """Return the newest whole one of the place's files, or of its folder's, listed only now that it is locked.

    Raises CheckpointError if there is none, or if it was another run's.
    """
    files = place.files or (locate.of_run(Path(str(place.folder))) if place.in_place else [])
    if not files:
        return None
    path, notes = locate.newest_good(files, check=verify.examine)
    meta, _ = checkpoint.read_meta(path)
    stored = checkpoint.config(path, meta)
    changed = resume.changes(stored, config)
    if differ := [line for key, line in changed.items() if key.split(".")[0] in MUST_MATCH]:
        raise CheckpointError(f"cannot resume {path}: {'; '.join(differ)}")
    return Source(path, meta, stored, notes)


def notes(source: Source, state: TrainState) -> list[str]:
    """Say what broke, what was changed, and whether the bits will be those of an unbroken run."""
    lines = [*source.notes, f"going on from step {source.meta.step:,}: {source.path}"]
    lines += [f"changed since: {line}" for line in resume.changes(source.config, state.config).values()]
    decay = state.config.optimizer.decay
    if resume.length(source.config) != resume.length(state.config) and decay != "constant":
        lines.append(f"the learning rate follows optimizer.decay={decay} to step {state.max_steps:,}")
    then, now = BEFORE_THESE_WERE_STORED | source.meta.versions, BEFORE_THESE_WERE_STORED | state.environment
    known = [key for key in BITWISE_FACTORS if key in then]
    other = [f"{key} was {then[key]}, is {now[key]}" for key in known if then[key] != now[key]]
    if now["deterministic"] == "no":
        other.append("on a GPU only trainer.deterministic=true repeats every bit")
    if other:
        lines.append("close to an unbroken run, but not bit by bit: " + "; ".join(other))
    if unknown := [key for key in BITWISE_FACTORS if key not in then]:
        old = f"the checkpoint is too old to say {', '.join(unknown)}"
        lines.append(f"whether it goes on bit by bit is not known: {old}")
    return lines
