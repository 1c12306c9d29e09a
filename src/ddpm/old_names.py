"""Forward imports of modules and names that have moved since 0.1.0, so that plug-ins written for it still work."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Where the names of an old module are now; the first of several modules that has the name counts.
MODULES = {
    "ddpm.datasets": "ddpm.data.datasets ddpm.data.dataset ddpm.data.info",
    "ddpm.datasets.batches": "ddpm.data.batches",
    "ddpm.datasets.digits": "ddpm.data.digits",
    "ddpm.datasets.folder": "ddpm.data.folder",
    "ddpm.datasets.mnist": "ddpm.data.mnist",
    "ddpm.datasets.persian": "ddpm.data.persian",
    "ddpm.datasets.reading": "ddpm.io.files",
    "ddpm.datasets.types": "ddpm.data.dataset ddpm.data.info",
    "ddpm.guidance": "ddpm.diffusion.denoiser",
    "ddpm.images": "ddpm.io.images",
    "ddpm.library": "ddpm.api",
    "ddpm.limits": "ddpm.config.limits",
    "ddpm.optimizers": "ddpm.train.optimizers ddpm.checkpoint.verify",
    "ddpm.plugins": "ddpm.register",
    "ddpm.randomness": "ddpm.runtime.randomness",
    "ddpm.samplers": "ddpm.diffusion.samplers",
    "ddpm.sampling": "ddpm.sample.model ddpm.sample.sampling",
    "ddpm.schedules": "ddpm.diffusion.schedules",
    "ddpm.spacings": "ddpm.diffusion.spacings",
    "ddpm.tasks": "ddpm.diffusion.editing",
    "ddpm.timesteps": "ddpm.diffusion.timesteps",
    "ddpm.training": "ddpm.train.loop ddpm.train.step",
}


# An old module that is a package today, or has lost names to another: where these names are now.
NAMES = {
    "ddpm.build": {
        "ddpm.checkpoint.verify": "check_tensors examine load_weights outline",
        "ddpm.data.info": "facts",
        "ddpm.runtime.device": "device",
    },
    "ddpm.checkpoint": {
        "ddpm.checkpoint.file": "CHUNK config digest load part read_meta save",
        "ddpm.checkpoint.locate": "PICKLED find newest_good of_run saved_steps step_of",
    },
    "ddpm.config": {
        "ddpm.config.choices": "ADDED CONFIG_DIR Choice add_choice check_choice choose_sampler plugin_hint",
        "ddpm.config.schema": "CIRCUMSTANCES DrawConfig ExportConfig InfoConfig Objective Optimizer"
        " SampleConfig Several TrainConfig Trainer check to_dict",
        "ddpm.sample.sampler_file": "trained_sampler",
    },
    "ddpm.diffusion": {
        "ddpm.diffusion.denoiser": "CLIPS Denoiser Estimate",
        "ddpm.diffusion.objective": "Objective WEIGHTS losses make_objective min_snr p2 sigmoid uniform"
        " vlb_terms",
        "ddpm.diffusion.process": "PREDICTIONS Posterior Scale add_noise invert posterior split target",
    },
    "ddpm.sampling": {"ddpm.api": "Model"},
}

RENAMED = {  # old name: what it is called today
    "ADDED_LATER": "DEFAULTS_FOR_OLD_CHECKPOINTS",
    "CIRCUMSTANCES": "NOT_PART_OF_THE_EXPERIMENT",
    "Choice": "Component",
    "Facts": "DatasetInfo",
    "Figure": "Metric",
    "Run": "TrainState",
}

_warned = False


def names_of(old: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that an old module has become."""
    return _getattr(old, _homes(old))


def _homes(old: str) -> dict[str, list[str]]:
    return {name: [new] for new, names in NAMES.get(old, {}).items() for name in names.split()}


def _getattr(
    old: str, homes: Mapping[str, Sequence[str]], default: Sequence[str] = ()
) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        for home in () if name.startswith("__") else homes.get(name, default):
            module, new = import_module(home), RENAMED.get(name, name)
            if hasattr(module, new):
                _warn(f"{old}.{name} is now {home}.{new}; old names will go in a later version")
                return getattr(module, new)
        raise AttributeError(f"module '{old}' has no attribute '{name}'")

    return find


def _warn(text: str) -> None:
    """Warn of the first old name in this process, and of no other."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(text, FutureWarning, stacklevel=3)


class OldModules:
    """Import a module of MODULES as an empty one that forwards its attributes.

    A finder and loader of importlib, whose base classes would take 10 ms of every start.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        loader: Any = self
        return ModuleSpec(name, loader, is_package=True) if name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to importlib."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        vars(module)["__getattr__"] = _getattr(old, _homes(old), MODULES[old].split())
