"""The file that holds a run: its header, reading and writing, where it lies, whether it fits."""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:
    from ddpm.old_names import names_of

    __getattr__ = names_of(__name__)
