"""Checkpoints: the header, reading and writing a file, finding one, and whether it fits its network."""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:
    from ddpm.old_names import names_of

    __getattr__ = names_of(__name__)
