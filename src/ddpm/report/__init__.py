"""Compare runs, and settings of one sampler: tables, plots, contact sheet."""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:
    from ddpm.old_names import names_of

    __getattr__ = names_of(__name__)
