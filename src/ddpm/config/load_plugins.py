"""`plugins=[my_package]`: a user's own modules, imported because the user typed them, for no other reason."""

import importlib
import os
import sys
import traceback

from ddpm.errors import UserError


def load_plugins(arguments: list[str]) -> list[str]:
    """Import what `plugins=…` names. Returns the other arguments. Raises UserError.

    Only sys.argv may be given here: nothing is imported by a name from a config or a checkpoint.
    """
    typed = [argument for argument in arguments if argument.startswith("plugins=")]
    names = [name.strip(" '\"") for a in typed for name in a.removeprefix("plugins=").strip("[] ").split(",")]
    if any(names):
        sys.path.append(os.getcwd())  # after all else, so that a random.py there hides nothing
    for name in filter(None, names):
        _import(name)
    return [argument for argument in arguments if argument not in typed]


def _import(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"plugins={name}: must be the name of a module, as in `import my_package.my_module`")
    try:
        importlib.import_module(name)
    except UserError as error:  # of ddpm.register
        raise UserError(f"plugins={name}: {error}") from None
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if missing:
            raise UserError(f"plugins={name}: not found, neither installed nor in {os.getcwd()}") from None
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        raise UserError(f"plugins={name}: {type(error).__name__}: {error} ({where})") from None
