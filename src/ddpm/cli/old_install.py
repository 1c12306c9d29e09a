"""Find an older installation of this toolkit beside the present one, from when its distribution was named `ddpm`."""

import glob
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ddpm.errors import install_hint


def advice(folders: Sequence[str] = sys.path) -> str:
    """Return a line that advises its removal, or "". Looks for file names alone, as importlib.metadata is slow.

    Another project has that name now: only what installs the commands of this one is meant.
    """
    folders = [folder for folder in folders if folder]
    if not any(glob.glob("ddpm_toolkit-*.dist-info", root_dir=folder) for folder in folders):
        return ""
    for folder in folders:
        for name in glob.glob("ddpm-*.dist-info", root_dir=folder):
            file = Path(folder, name, "entry_points.txt")
            with suppress(OSError):
                if b"ddpm.cli." in file.read_bytes():
                    return (
                        f"warning: an older installation of this toolkit, then named ddpm, is in {folder}; remove it: "
                        f"pip uninstall ddpm && {install_hint()} --force-reinstall --no-deps"
                    )
    return ""
