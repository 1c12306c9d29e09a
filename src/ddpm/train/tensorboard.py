"""logger=tensorboard: what goes to metrics.jsonl and samples/, as event files, too."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.config.schema import TrainConfig
from ddpm.errors import UserError

if TYPE_CHECKING:
    from ddpm.train.state import TrainState

FOLDER = "tensorboard"


def check(config: TrainConfig) -> None:
    """Raises UserError where the package is needed and absent."""
    if config.logger == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError('logger=tensorboard needs: pip install -e ".[tensorboard]"')


@contextmanager
def events(run: "TrainState", run_dir: Path) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Takes the lines of metrics.jsonl as they come. Raises OSError where nothing can be written."""
    if run.config.logger != "tensorboard" or not run.world.first:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    from ddpm.config.schema import settings_of
    from ddpm.train import metrics_file

    folder = run_dir / FOLDER
    # What was written from this step on counts no more. The line of this step may not have come here before its
    # checkpoint was left, and none has where the run began without event files: they are told again.
    begun = run.step if any(folder.glob("events.out.tfevents.*")) else 0
    writer = SummaryWriter(str(folder), purge_step=begun or None)

    def tell(record: Mapping[str, float]) -> None:
        step = int(record["step"])
        for name, value in record.items():
            if name != "step":
                writer.add_scalar(name, value, step)
        _add_preview(writer, run_dir / "samples" / f"step_{step:07d}.png", step)
        writer.flush()  # as soon as a line of metrics.jsonl: a killed process loses nothing

    try:
        # Without the first part, which lists the settings of this run: TensorBoard would take one run's list for all
        # of a sweep, where it otherwise finds every setting of every run, and which of them differ.
        settings = {
            key: value if type(value) in (int, float, str) else json.dumps(value)
            for key, value in settings_of(run.config).items()
        }
        _, start, end = hparams(settings, {})  # type: ignore[no-untyped-call]
        if not begun:
            writer._get_file_writer().add_summary(start)  # type: ignore[no-untyped-call]
        with suppress(FileNotFoundError, ValueError):  # the training goes on from the lines that make sense
            for record in metrics_file.read(run_dir / "metrics.jsonl"):
                if begun <= record["step"] <= run.step:
                    tell(record)
        yield tell
        if run.step >= run.max_steps:
            writer._get_file_writer().add_summary(end)  # type: ignore[no-untyped-call]
    finally:
        writer.close()


def _add_preview(writer: Any, picture: Path, step: int) -> None:
    if not picture.exists():
        return
    import numpy as np
    from PIL import Image

    with Image.open(picture) as image:
        pixels = np.asarray(image)
    writer.add_image("samples", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")
