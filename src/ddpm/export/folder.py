"""Write a checkpoint as a folder that other tools load."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ddpm.config.schema import ExportConfig
from ddpm.errors import UserError
from ddpm.export import crosscheck, model_card
from ddpm.export.formats import FORMATS
from ddpm.io.files import reason, write_atomically
from ddpm.runtime.world import ALONE
from ddpm.sample.model import load_newest


def write(config: ExportConfig) -> list[str]:
    """Write the folder of one checked config, and check one of diffusers. Returns lines for the user.

    Raises UserError, and then leaves nothing behind.
    """
    _, model, meta, lines = load_newest(config.ckpt, ALONE, torch.device("cpu"), config.ema)
    files = FORMATS[config.format](model)
    files["README.md"] = model_card.card(model, config.format, config.ema, meta.sha256).encode()
    with new_folder(Path(config.out)) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomically(folder / name, data)
        checked = [crosscheck.check(model, folder)] if config.format == "diffusers" else []
    return [*lines, *(str(Path(config.out) / name) for name in files), *checked]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files move to `out`, new or empty, unless there is an error. Raises UserError."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"out={out}: exists already, and is no empty folder; choose another name")
        place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        temporary = TemporaryDirectory(prefix=".ddpm-export-", dir=place)
    except OSError as error:
        raise UserError(f"cannot make out={out}: {reason(error)}") from None
    try:
        with temporary as folder:
            yield Path(folder)
            out.mkdir(parents=True, exist_ok=True)
            for path in Path(folder).iterdir():
                shutil.move(path, out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {reason(error)}") from None
