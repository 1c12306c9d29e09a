"""Restarts by torchrun: find the folder that an earlier start of the same run made."""

import os
import socket
from pathlib import Path

from ddpm.checkpoint import locate
from ddpm.config.schema import TrainConfig
from ddpm.runs import resume
from ddpm.runs.run_dir import read_json

KEY = "launch"  # in environment.json
UNNAMED = ("", "none")  # what torchrun calls a run that was given no --rdzv-id


def run_id() -> str | None:
    """Return what is the same for all starts of one run; None where torchrun did not start it.

    Without --rdzv-id it is the process id of torchrun, this process's parent, which stays alive through restarts.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return f"agent:{socket.gethostname()}:{os.getppid()}" if name in UNNAMED else f"torchrun:{name}"


def recorded() -> dict[str, str]:
    """Return the run's id for environment.json."""
    name = run_id()
    return {} if name is None else {KEY: name}


def again(config: TrainConfig) -> resume.Place | None:
    """Return the folder that an earlier start of this run made, to resume there; None at the first start.

    A process id may come again, so it counts only where torchrun says that it restarts; trainer.resume and overwrite
    count at the first start.
    """
    name, typed = run_id(), config.trainer.resume
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if (
        name is None
        or typed == "auto"
        or (first and (typed or config.overwrite or name.startswith("agent:")))
    ):
        return None
    asked = resume.place(config)
    if asked.folder is None:  # the newest that this run has made
        files = sorted(Path("outputs/train").glob("*/*/environment.json"), reverse=True)
        folders = [file.parent for file in files]
    else:
        folders = [Path(asked.folder)]
    for folder in folders:
        if read_json(folder / "environment.json").get(KEY) == name:
            return resume.Place(str(folder), True, locate.of_run(folder) or asked.files, again=True)
    return None
