"""Keys of ddpm-eval that depend on each other."""

import re

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.cli import default_sampler
from ddpm.config.choices import choices
from ddpm.config.overrides import typed_value
from ddpm.config.schema import EvalConfig
from ddpm.errors import UserError


def before_typed(typed: list[str]) -> list[str]:
    """Of a checkpoint its sampler and the size of its images; the dataset that `samples` names."""
    ckpt, samples, dataset = (typed_value(typed, key) for key in ("ckpt", "samples", "dataset"))
    if ckpt not in (None, "null") and samples not in (None, "null"):
        raise UserError("ckpt and samples: leave one of them out")
    parameters = [override for override in typed if override.lstrip("+").startswith("dataset.")]
    named = re.match(r"(\w+):", samples or "")
    if named and dataset is None and named[1] in choices("dataset"):
        return [f"dataset={named[1]}"]
    if parameters and dataset is None:
        raise UserError(f"{parameters[0]}: name the dataset, too (dataset=… {parameters[0]})")
    found = default_sampler.overrides("eval", typed)
    sized = "image_size" in choices("dataset").get(dataset or "", {})
    if ckpt not in (None, "null") and sized and not any("dataset.image_size" in each for each in parameters):
        _, (meta, _), _ = locate.read_wanted(ckpt, checkpoint.read_meta)
        found.append(f"dataset.image_size={meta.facts['image_size']}")
    return found


def check_keys(config: EvalConfig) -> None:
    """Raises UserError for keys that do not go together."""
    given = [key for key in ("ckpt", "samples", "compare") if getattr(config, key) is not None]
    if not given:
        raise UserError("ckpt is needed: ckpt=… (or samples=…, for images of any other tool, or compare=[…])")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: leave all but one out")
    if not config.measure:
        raise UserError("measure=[]: must name at least one")
    if config.features == "dinov2" and config.features_path is None:
        raise UserError("features=dinov2: name the folder of its weights: features_path=…")
    if config.compare is not None and not config.compare:
        raise UserError("compare=[]: must name at least one evaluation.json")
    if config.samples is not None and config.dataset is None:
        raise UserError(f"samples={config.samples}: name the dataset they are to be like: dataset=mnist")
    if config.samples is not None and config.guidance_scale != 1:
        raise UserError(f"guidance_scale={config.guidance_scale:g}: samples are drawn already; must be 1")
