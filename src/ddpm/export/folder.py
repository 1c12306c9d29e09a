"""Write a checkpoint as a folder that other tools load."""

from pathlib import Path

import torch

from ddpm.config.schema import ExportConfig
from ddpm.export import crosscheck, model_card
from ddpm.export.formats import FORMATS
from ddpm.io.files import write_atomically
from ddpm.io.folders import new_folder
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
