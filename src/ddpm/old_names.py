"""Forward imports of modules and names that have moved since 0.1.0, so that plug-ins written for it still work."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Where the names of an old module are now; the first of several modules that has the name counts.
MODULES = {
    "ddpm.card": "ddpm.export.model_card",
    "ddpm.checks": "ddpm.errors",
    "ddpm.compiling": "ddpm.train.compile",
    "ddpm.contact": "ddpm.report.contact_sheet",
    "ddpm.crosscheck": "ddpm.export.crosscheck",
    "ddpm.datasets": "ddpm.data.datasets ddpm.data.dataset ddpm.data.info",
    "ddpm.datasets.batches": "ddpm.data.batches",
    "ddpm.datasets.cache": "ddpm.io.cache",
    "ddpm.datasets.digits": "ddpm.data.digits",
    "ddpm.datasets.folder": "ddpm.data.folder",
    "ddpm.datasets.hoda": "ddpm.data.hoda",
    "ddpm.datasets.mat": "ddpm.data.mat",
    "ddpm.datasets.mnist": "ddpm.data.mnist",
    "ddpm.datasets.persian": "ddpm.data.persian",
    "ddpm.datasets.pictures": "ddpm.io.pictures",
    "ddpm.datasets.reading": "ddpm.io.files",
    "ddpm.datasets.types": "ddpm.data.dataset ddpm.data.info",
    "ddpm.distributed": "ddpm.runtime.distributed",
    "ddpm.evaluation": "ddpm.evaluate",
    "ddpm.evaluation.bound": "ddpm.evaluate.metrics.vlb",
    "ddpm.evaluation.classify": "ddpm.evaluate.metrics.cas",
    "ddpm.evaluation.draws": "ddpm.evaluate.metrics.monte_carlo",
    "ddpm.evaluation.feature_network": "ddpm.evaluate.features.network",
    "ddpm.evaluation.feature_training": "ddpm.evaluate.features.training",
    "ddpm.evaluation.features": "ddpm.evaluate.features.extractor ddpm.evaluate.features.pixels",
    "ddpm.evaluation.figures": "ddpm.evaluate.reference ddpm.evaluate.metrics.distance",
    "ddpm.evaluation.frechet": "ddpm.evaluate.metrics.frechet",
    "ddpm.evaluation.inception": "ddpm.evaluate.features.inception",
    "ddpm.evaluation.intervals": "ddpm.evaluate.metrics.frechet",
    "ddpm.evaluation.judge": "ddpm.evaluate.evaluator ddpm.evaluate.reference",
    "ddpm.evaluation.likelihood": "ddpm.evaluate.metrics.likelihood",
    "ddpm.evaluation.memorization": "ddpm.evaluate.metrics.memorization",
    "ddpm.evaluation.neighbours": "ddpm.evaluate.metrics.prdc",
    "ddpm.evaluation.npz": "ddpm.io.npz",
    "ddpm.evaluation.picture": "ddpm.evaluate.page",
    "ddpm.evaluation.protocol": "ddpm.evaluate.provenance",
    "ddpm.evaluation.record": "ddpm.evaluate.record",
    "ddpm.evaluation.source": "ddpm.evaluate.samples",
    "ddpm.evaluation.study": "ddpm.report.sampler_study",
    "ddpm.evaluation.study_picture": "ddpm.report.sampler_study_plot",
    "ddpm.evaluation.table": "ddpm.evaluate.table",
    "ddpm.files": "ddpm.io.files",
    "ddpm.guidance": "ddpm.diffusion.denoiser",
    "ddpm.images": "ddpm.io.images",
    "ddpm.inputs": "ddpm.sample.user_images",
    "ddpm.library": "ddpm.api",
    "ddpm.limits": "ddpm.config.limits",
    "ddpm.memory": "ddpm.runtime.memory",
    "ddpm.meta": "ddpm.checkpoint.header ddpm.data.info",
    "ddpm.metrics": "ddpm.train.metrics_file",
    "ddpm.networks.diffusers_map": "ddpm.export.diffusers_map",
    "ddpm.networks.group_norm": "ddpm.networks.kernels.group_norm",
    "ddpm.networks.native": "ddpm.networks.kernels.native",
    "ddpm.optimizers": "ddpm.train.optimizers ddpm.checkpoint.verify",
    "ddpm.plots": "ddpm.train.plots",
    "ddpm.plugins": "ddpm.register",
    "ddpm.randomness": "ddpm.runtime.randomness",
    "ddpm.report_pictures": "ddpm.report.plot",
    "ddpm.report_table": "ddpm.report.table",
    "ddpm.sampler_file": "ddpm.sample.sampler_file",
    "ddpm.samplers": "ddpm.diffusion.samplers",
    "ddpm.sampling": "ddpm.sample.model ddpm.sample.sampling",
    "ddpm.schedules": "ddpm.diffusion.schedules",
    "ddpm.spacings": "ddpm.diffusion.spacings",
    "ddpm.tasks": "ddpm.diffusion.editing",
    "ddpm.timesteps": "ddpm.diffusion.timesteps",
    "ddpm.training": "ddpm.train.loop ddpm.train.step",
    "ddpm.validation": "ddpm.train.validation",
    "ddpm.values": "ddpm.config.limits",
    "ddpm.world": "ddpm.runtime.world",
    "ddpm.yaml_files": "ddpm.config.choices",
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
    "ddpm.export": {
        "ddpm.export.formats": "FORMATS Files PREDICTION_TYPES WRITTEN_FOR ddim_as_exported ddim_steps"
        " diffusers_files public_config safetensors_files scheduler_config trained_betas unet_config",
    },
    "ddpm.report": {
        "ddpm.config.schema": "settings_of",
        "ddpm.report.runs": "FIGURES MAX_DEPTH MAX_RUNS MAX_TEXT Point RunRow brief find ranked read read_all",
        "ddpm.runs.run_dir": "FAILED",
    },
    "ddpm.runs": {
        "ddpm.runtime.device": "precision slow_in_bf16",
        "ddpm.train.checkpointing": "LISTED init_from restore save",
        "ddpm.train.environment": "DECIDES_BITS environment",
        "ddpm.train.state": "Run join prepare",
    },
    "ddpm.sampling": {"ddpm.api": "Model"},
}

RENAMED = {  # old name: what it is called today
    "ADDED_LATER": "DEFAULTS_FOR_OLD_CHECKPOINTS",
    "CIRCUMSTANCES": "NOT_PART_OF_THE_EXPERIMENT",
    "Choice": "Component",
    "DECIDES_BITS": "BITWISE_FACTORS",
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


class OldModules(MetaPathFinder, Loader):
    """Import a module of MODULES as an empty one that forwards its attributes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        vars(module)["__getattr__"] = _getattr(old, _homes(old), MODULES[old].split())
