"""Train, sample and judge denoising diffusion models on small images; `ddpm.api` says what is offered here."""

import sys
from typing import TYPE_CHECKING, Any

from ddpm.errors import UserError
from ddpm.old_names import OldModules
from ddpm.register import register

if TYPE_CHECKING:
    from ddpm.api import Model, load, save_grid, to_uint8

__all__ = ["Model", "UserError", "load", "register", "save_grid", "to_uint8"]
__version__ = "0.1.0"
sys.meta_path.insert(0, OldModules())


def __getattr__(name: str) -> Any:
    """Import a name of `ddpm.api`, which needs torch, at its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'ddpm' has no attribute '{name}'")
    from ddpm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
