"""One opened run: its folder, locked for this process, and the checkpoint that it goes on from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm.checkpoint import locate
from ddpm.config.schema import TrainConfig
from ddpm.errors import UserError
from ddpm.io.files import reason
from ddpm.runs import elastic, resume, run_dir
from ddpm.runtime.console import tell
from ddpm.runtime.distributed import broadcast_object, raise_on_all_ranks
from ddpm.runtime.world import World
from ddpm.train.state import TrainState


class OpenRun:
    """The folder of a run and what it goes on from, as rank 0 sees it; the other processes are told the path alone.

    `path` is the current folder until `settle`, which makes a new one where none was named.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.world, self.path = world, Path()
        self.source: resume.Source | None = None
        self.claim: run_dir.Claim | None = None
        self.place = resume.Place(None, False, [])
        if not world.first:
            return
        self.place = elastic.again(config) or resume.place(config)
        if self.place.folder is not None:
            self.claim = run_dir.claim(self.place.folder, config.overwrite, fresh=not self.place.in_place)
        try:
            self.source = resume.choose(self.place, config)
            if self.claim is not None and self.place.in_place and self.source is None:
                run_dir.check_begun(self.claim.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the folder, and remove it if it was made here and nothing was written."""
        if self.claim is not None:
            self.claim.release()

    def settle(self, state: TrainState) -> float | None:
        """Return the val_eps_mse of a run that is over; else have a folder, in `path`, and return None.

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
        """With auto, a run that is over is fine; a checkpoint that is named was meant to go on."""
        if self.source is None or state.step < state.max_steps:
            return None
        place, source = self.place, self.source.path
        result = run_dir.read_result(source.parent.parent) if place.in_place else None
        if place.in_place and (result is None or result["step"] != state.step):
            return None  # the end is written once more
        if not (place.again or state.config.trainer.resume == "auto") or result is None:
            key = "max_epochs" if state.config.trainer.max_epochs is not None else "max_steps"
            raise UserError(
                f"{source} has done its {state.step} steps already: give trainer.{key} a larger number"
            )
        figure = result["val_eps_mse"]
        tell(f"{source.parent.parent}: done already, {state.step:,} steps, val_eps_mse {figure:.4f}")
        return figure

    def clear(self) -> None:
        """Remove what the run will write anew, and what a killed process left. Raises OSError."""
        if self.source is None or not self.place.in_place:
            run_dir.clear(self.path)
        run_dir.sweep(self.path)
        for ended in ("result.json", run_dir.FAILED):  # what they say is of a shorter run
            (self.path / ended).unlink(missing_ok=True)

    def set_aside(self, step: int) -> list[str]:
        """Move checkpoints of later steps out of the way of a run that goes on here. Returns a line about each."""
        return run_dir.set_aside(self.path, step) if self.source and self.place.in_place else []

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
    """Choose and lock the run's folder and the checkpoint to go on from. Raises UserError in all processes."""
    with raise_on_all_ranks(world):
        run = OpenRun(config, world)
    try:
        yield run
    finally:
        run.close()
