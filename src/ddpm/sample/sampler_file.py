"""Read and write sampler.yaml beside a checkpoint: the default sampler, as chosen by a sampler study.

The file is not trusted: it is read as plain data, and checked like a typed config.
"""

import errno
import os
from pathlib import Path
from typing import Any

import yaml

from ddpm.config.choices import Component, check_choice
from ddpm.config.schema import TrainConfig
from ddpm.errors import UserError, printable
from ddpm.io.files import read_regular, reason, write_atomically
from ddpm.io.plain_data import parse_yaml

NAME = "sampler.yaml"
NO_GUIDANCE = {"guidance_scale": 1.0, "guidance_rescale": 0.0, "guidance_interval": None}
MAX_BYTES = 64 * 2**10  # a list of 4,096 times needs 40 thousand


def default(config: TrainConfig, folder: Path | None) -> tuple[Component, Path | None]:
    """Return the default sampler and its file: `folder`'s sampler.yaml, else the training's and None.

    Raises UserError with one line that names a file that cannot be used.
    """
    if folder is None or (found := read(folder / NAME)) is None:
        return trained_sampler(config), None
    steps, most = found.params["num_steps"], config.schedule.params["num_timesteps"]
    if steps is not None and steps > most:
        raise _wrong(folder / NAME, f"sampler.num_steps={steps}: the model has {most} timesteps")
    return found, folder / NAME


def read(path: Path) -> Component | None:
    """Read the sampler in a file, None if there is no file. Raises UserError."""
    try:
        data = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _wrong(path, f"it cannot be read: {reason(error)}") from None
    try:
        if b"${" in data:
            raise UserError("it holds '${', and only plain values are read")
        return check_choice("sampler", parse_yaml(data))
    except UserError as error:
        raise _wrong(path, reason(error)) from None


def write(path: Path, sampler: Component, comment: list[str]) -> None:
    """Write a sampler and, as comments, where it comes from. Raises OSError, also where another file is there."""
    if os.path.lexists(path) and not read_regular(path, MAX_BYTES).startswith(b"# written by ddpm"):
        raise FileExistsError(errno.EEXIST, "it was not written by a study, and is kept")
    head = "".join(f"# {printable(line)}\n" for line in comment)
    body = yaml.safe_dump(sampler.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomically(path, (head + body).encode())


def _wrong(path: Path, why: str) -> UserError:
    return UserError(f"{path} cannot be used: {why}; delete the file, or name another sampler (sampler=…)")


def recommended_guidance(config: TrainConfig) -> dict[str, Any]:
    """Return the guidance that a training config recommends, by key.

    It is off for a model that does not know images with and without labels.
    """
    can = config.model.params["conditional"] and config.objective.label_dropout > 0
    return {key: getattr(config, key) if can else off for key, off in NO_GUIDANCE.items()}


def trained_sampler(config: TrainConfig) -> Component:
    """Return the sampler of the training config, with at most as many steps as the model has timesteps."""
    params = dict(config.sampler.params)
    if params["num_steps"] is not None:  # written for many timesteps; this model may have few
        params["num_steps"] = min(params["num_steps"], config.schedule.params["num_timesteps"])
    return Component(config.sampler.name, params)
