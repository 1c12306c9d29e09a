"""What torchrun says of this start, so that one that it repeats finds the folder of the first."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from ddpm.checkpoint import locate
from ddpm.config.schema import TrainConfig
from ddpm.io.files import read_regular
from ddpm.runs import resume

KEY = "launch"  # in environment.json
MAX_BYTES = 1 << 16  # of that file
UNNAMED = ("", "none")  # what torchrun calls a run that was given no --rdzv-id


def run_id() -> str | None:
    """What is the same for all starts of one run; None where torchrun did not start it.

    Without --rdzv-id only the one torchrun that is still alive can know: it is the parent of this process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    if name in UNNAMED:
        return f"agent:{socket.gethostname()}:{os.getppid()}"
    return f"torchrun:{name}"


def restarts() -> int:
    """How often torchrun has started this run anew."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() and len(count) < 10 else 0


def recorded() -> dict[str, str]:
    """For environment.json."""
    name = run_id()
    return {} if name is None else {KEY: name}


def again(config: TrainConfig) -> "resume.Place | None":
    """The folder that an earlier start of this very run has made, to go on there; None for the first start.

    A number of a process may come again, so an id made of one is believed only where torchrun says that it restarts;
    and what is typed in trainer.resume and overwrite counts at the first start.
    """
    name, typed = run_id(), config.trainer.resume
    told = typed or config.overwrite
    if name is None or typed == "auto" or (restarts() == 0 and (told or name.startswith("agent:"))):
        return None
    asked = resume.place(config)
    folder = _of_launch(name) if asked.folder is None else Path(asked.folder)
    if folder is None or _launch_of(folder) != name:
        return None
    return resume.Place(str(folder), True, locate.of_run(folder) or asked.files, again=True)


def _of_launch(name: str) -> Path | None:
    """The newest folder under outputs/train that this run has made."""
    files = sorted(Path("outputs/train").glob("*/*/environment.json"), reverse=True)
    return next((file.parent for file in files if _launch_of(file.parent) == name), None)


def _launch_of(folder: Path) -> str | None:
    """None where the file is absent or somebody else's."""
    with suppress(OSError, ValueError, RecursionError):
        about = json.loads(read_regular(folder / "environment.json", MAX_BYTES))
        return about.get(KEY) if isinstance(about, dict) else None
    return None
