"""ddpm-eval: draw images from a checkpoint, or take others, and say how good they are."""

import re
import sys
from dataclasses import dataclass

from ddpm.cli import app as hydra_app
from ddpm.cli import default_sampler
from ddpm.config.schema import Choice, choices
from ddpm.errors import UserError
from ddpm.runtime.world import world


@dataclass(frozen=True)
class EvalConfig:
    ckpt: str | None
    samples: str | None
    compare: list[str] | None
    dataset: Choice | None  # None: that of the checkpoint
    n: int
    seed: int
    batch_size: int
    device: str
    precision: str
    ema: bool
    guidance_scale: float
    sampler: Choice
    data_root: str
    measure: list[str]
    out: str | None


def main() -> None:
    sys.argv[1:] = [_with_paths(argument) for argument in sys.argv[1:]]
    hydra_app.run("eval", EvalConfig, evaluate, sweep=_study, defaults=before_typed)


def _study(typed: list[str]) -> None:
    from ddpm.cli import study

    study.study(typed)


def _with_paths(argument: str) -> str:
    """compare=[a,b], whose items are paths, each in quotes."""
    key, _, value = argument.partition("=")
    if key != "compare" or not value or value == "null":
        return argument
    items = value[1:-1].split(",") if value[:1] == "[" and value[-1:] == "]" else [value]
    return f"compare=[{','.join(hydra_app.quoted(item.strip(' ' + chr(39) + chr(34))) for item in items if item)}]"


def before_typed(typed: list[str]) -> list[str]:
    """Of a checkpoint its sampler and the size of its images; the dataset that `samples` names."""
    from ddpm.checkpoint import file as checkpoint

    ckpt, samples, dataset = (hydra_app.typed_value(typed, key) for key in ("ckpt", "samples", "dataset"))
    if ckpt not in (None, "null") and samples not in (None, "null"):
        raise UserError("ckpt and samples: leave one of them out")
    parameters = [override for override in typed if override.lstrip("+").startswith("dataset.")]
    named = re.match(r"(\w+):", samples or "")
    if named and dataset is None and named[1] in choices("dataset"):
        return [f"dataset={named[1]}"]
    if parameters and dataset is None:
        raise UserError(f"{parameters[0]}: name the dataset, too (dataset=… {parameters[0]})")
    found = default_sampler.overrides("eval", EvalConfig, typed)
    sized = "image_size" in choices("dataset").get(dataset or "", {})
    if ckpt not in (None, "null") and sized and not any("dataset.image_size" in each for each in parameters):
        path, _ = checkpoint.newest_good(checkpoint.find(ckpt), check=checkpoint.read_meta)
        found.append(f"dataset.image_size={checkpoint.read_meta(path)[0].facts['image_size']}")
    return found


def evaluate(config: EvalConfig) -> None:
    """The whole command for one checked config.

    Of several processes (torchrun) each draws its share of the images and asks the model about its share of the real
    ones; rank 0 measures the rest, and writes.
    """
    check_keys(config)
    if config.compare is not None:
        from ddpm.evaluate import record, table

        print(table.table(record.read_all(config.compare)))
        return
    from ddpm import build
    from ddpm.evaluate import run as judging
    from ddpm.runtime import memory
    from ddpm.runtime.distributed import joined

    own = world()
    memory.keep_freed()
    device = build.device(config.device, own)
    with joined(own, device):
        (judging.of_images if config.ckpt is None else judging.of_model)(config, own, device)


def check_keys(config: EvalConfig) -> None:
    """Raises UserError for keys that do not go together."""
    given = [key for key in ("ckpt", "samples", "compare") if getattr(config, key) is not None]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given)}: leave all but one out"
            if given
            else "ckpt is needed: ckpt=… (or samples=…, for images of any other tool, or compare=[…])"
        )
    if not config.measure:
        raise UserError("measure=[]: must name at least one")
    if config.compare is not None and not config.compare:
        raise UserError("compare=[]: must name at least one evaluation.json")
    if config.samples is not None and config.dataset is None:
        raise UserError(f"samples={config.samples}: name the dataset they are to be like: dataset=mnist")
    if config.samples is not None and config.guidance_scale != 1:
        raise UserError(
            f"guidance_scale={config.guidance_scale:g}: samples={config.samples} are drawn already; must be 1"
        )
