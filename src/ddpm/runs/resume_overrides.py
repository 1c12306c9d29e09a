"""Overrides of a run: where it is resumed its own config first, then what is typed."""

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config.overrides import as_overrides, typed_value
from ddpm.config.schema import to_dict
from ddpm.config.training import Trainer
from ddpm.errors import UserError


def before_typed(overrides: list[str]) -> list[str]:
    """Return the settings of the run to resume, as overrides to put before those typed now, without its paths."""
    check_lengths(overrides)
    typed = typed_value(overrides, "trainer.resume")
    if typed in (None, "auto", "null"):
        return []
    if typed_value(overrides, "trainer.init_from") not in (None, "null"):
        raise UserError(
            f"trainer.resume={typed} goes on with the weights of that run; trainer.init_from begins a new one: "
            "leave one of them out"
        )
    path, (meta, _), _ = locate.read_wanted(str(typed), checkpoint.read_meta)
    was = to_dict(checkpoint.config(path, meta))
    if "path" in was["dataset"] and typed_value(overrides, "dataset.path") is None:
        raise UserError(
            f"dataset.path was '{was['dataset'].pop('path')}' in this run; a path in a file is not followed by "
            "itself: type dataset.path=…"
        )
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
        raise UserError(
            "trainer.max_epochs and trainer.max_steps both say how long to train: give one of them"
        )


def check_batch(trainer: Trainer, processes: int = 1) -> None:
    """Check that each part of a batch has an image; not of stored configs. Raises UserError."""
    batch, parts = trainer.batch_size, trainer.accumulate
    if batch < processes * parts and processes > 1:
        raise UserError(
            f"trainer.batch_size={batch}: it is shared by {processes} processes with trainer.accumulate={parts} parts "
            f"each, and must be at least {processes * parts}"
        )
    if batch < parts:
        raise UserError(f"trainer.accumulate={parts}: must be at most trainer.batch_size={batch}")
