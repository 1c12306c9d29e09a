"""Loggers: what gets a run's figures and previews beside metrics.jsonl and samples/, which every run has.

To add one, write a class with `log` and `close` and put it into LOGGERS.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image

from ddpm.errors import UserError
from ddpm.train import metrics_file


class Logger(Protocol):
    """Gets each line of metrics.jsonl when it has been written. `log` and `close` may raise OSError."""

    def log(self, metrics: Mapping[str, float], images: np.ndarray[Any, Any] | None, step: int) -> None:
        """Take the figures of a step by name and, if a preview was drawn, its uint8 pixels (H, W) or (H, W, 3)."""

    def close(self) -> None:
        """Write what is left. Called once, also after an error."""


class Files:
    """Write nothing more."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], step: int, max_steps: int) -> None: ...

    def log(self, metrics: Mapping[str, float], images: np.ndarray[Any, Any] | None, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Write event files under `tensorboard/`, with the run's settings for the HPARAMS page.

    Event files count from the step that the run goes on from, also its line, which may not have come here before the
    checkpoint was left. Where a run began without event files, all lines of metrics.jsonl are written first.
    """

    package = "tensorboard"

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], step: int, max_steps: int) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,  # an optional package, which takes a second to import
        )
        from torch.utils.tensorboard.summary import hparams

        folder, self.max_steps, self.last = run_dir / "tensorboard", max_steps, -1
        begun = step if any(folder.glob("events.out.tfevents.*")) else 0
        self.writer = cast(Any, SummaryWriter(str(folder), purge_step=begun or None))
        # Without the first part, which lists the settings of this run: TensorBoard would take one run's list for all
        # of a sweep, where it otherwise finds every setting of every run, and which of them differ.
        plain = {
            key: value if type(value) in (int, float, str) else json.dumps(value)
            for key, value in settings.items()
        }
        _, start, self.end = hparams(plain, {})  # type: ignore[no-untyped-call]
        try:
            if not begun:
                self.writer.file_writer.add_summary(start)
            with suppress(
                FileNotFoundError, ValueError
            ):  # the training goes on from the lines that make sense
                for record in metrics_file.read(run_dir / "metrics.jsonl"):
                    if begun <= record["step"] <= step:
                        log_record(self, run_dir, record)
        except BaseException:
            self.close()
            raise

    def log(self, metrics: Mapping[str, float], images: np.ndarray[Any, Any] | None, step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        if images is not None:
            self.writer.add_image("samples", images, step, dataformats="HW" if images.ndim == 2 else "HWC")
        self.writer.flush()  # as soon as a line of metrics.jsonl: a killed process loses nothing
        self.last = step

    def close(self) -> None:
        if self.last >= self.max_steps:
            self.writer.file_writer.add_summary(self.end)
        self.writer.close()


# `logger=`: each is called with the run's folder, all settings by key, the step it goes on from, and its last one
LOGGERS: dict[str, Callable[[Path, Mapping[str, Any], int, int], Logger]] = {
    "files": Files,
    "tensorboard": TensorBoard,
}


def check(name: str) -> None:
    """Raises UserError where a logger needs a package that is absent."""
    package = getattr(LOGGERS.get(name), "package", None)
    if package is not None and find_spec(package) is None:
        raise UserError(f'logger={name} needs: pip install -e ".[{package}]"')


def log_record(logger: Logger, run_dir: Path, record: Mapping[str, float]) -> None:
    """Log a line of metrics.jsonl, and the preview of that step if there is one."""
    step = int(record["step"])
    picture, images = run_dir / "samples" / f"step_{step:07d}.png", None
    if picture.exists():
        with Image.open(picture) as image:
            images = np.asarray(image)
    logger.log({name: value for name, value in record.items() if name != "step"}, images, step)
