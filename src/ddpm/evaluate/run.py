"""Run ddpm-eval for one checked config: load, draw, measure, write, print."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ddpm import build
from ddpm.checkpoint.header import Meta
from ddpm.config.choices import choices
from ddpm.config.schema import EvalConfig
from ddpm.data.dataset import Dataset, in_order_of
from ddpm.data.info import listed
from ddpm.errors import UserError, printable
from ddpm.evaluate import evaluator, page, record, samples, table
from ddpm.evaluate.metrics.registry import METRICS
from ddpm.evaluate.provenance import Clock
from ddpm.evaluate.reference import Found, Reference, Samples
from ddpm.io.files import try_to_draw
from ddpm.runs import output_dirs
from ddpm.runtime import device as runtime_device
from ddpm.runtime import memory
from ddpm.runtime.console import of_steps, tell
from ddpm.runtime.distributed import process_group, raise_on_all_ranks, rank_zero_first
from ddpm.runtime.world import ALONE, World, world
from ddpm.sample.model import Model, guidance, levels, load_newest

Evaluated = tuple[record.Evaluation, evaluator.Gallery]


class Opened(NamedTuple):
    """A checkpoint, and the dataset that its images are compared with."""

    path: Path
    model: Model
    meta: Meta
    data: Dataset


def evaluate(config: EvalConfig) -> None:
    """Evaluate a checkpoint (`ckpt`) or given images (`samples`). Raises UserError.

    Under torchrun each process draws its share of the images and computes its share of the likelihood; rank 0
    measures the rest, and writes.
    """
    own, device = world(), start(config)
    with process_group(own, device):
        if config.ckpt is None:
            _evaluate_images(config, own, device)
        else:
            _evaluate_model(config, own, device)


def start(config: EvalConfig) -> torch.device:
    """Set up memory and CUDA, and return the device. Raises UserError."""
    memory.keep_freed()
    runtime_device.set_up_cuda()
    return runtime_device.device(config.device, world())


def _evaluate_model(config: EvalConfig, own: World, device: torch.device) -> None:
    opened, clock = open_model(config, own, device), Clock()
    with raise_on_all_ranks(own), shown_parts(own, clock):
        reference = make_reference(config, opened.data, config.n, device, clock, own)
    drawn = draw(config, own, opened.model, clock)
    guided = config.guidance_scale != 1
    plain = (
        draw(replace(config, guidance_scale=1.0), own, opened.model, clock, "unguided") if guided else None
    )
    with shown_parts(own, clock):
        found = evaluator.compute(_samples(config, opened, reference, drawn, own), clock, on_all_ranks=True)
        with raise_on_all_ranks(own):
            if own.first:
                unguided = plain and _samples(config, opened, reference, plain, ALONE)
                evaluated = measure(config, opened, reference, drawn, clock, unguided, on_all_ranks=found)
                _finish(config, evaluated, _stem(opened.path))


def _evaluate_images(config: EvalConfig, own: World, device: torch.device) -> None:
    """Evaluate given images, all on rank 0, as nothing is drawn."""
    assert config.samples is not None and config.dataset is not None
    stem, clock = Path("outputs") / "evaluations" / "eval", Clock()
    with raise_on_all_ranks(own), shown_parts(own, clock):
        if not own.first:
            return
        output_dirs.check_results(config.out, stem)
        data = build.dataset(config.dataset, config.data_root)
        say(own, data.notice)
        found = samples.read(config.samples, data, config.dataset, config.n, config.seed, config.data_root)
        reference = make_reference(config, data, len(found.images), device, clock)
        evaluated = evaluator.measure(
            Samples(found.images, found.labels, reference, config.seed),
            subject=config.samples,
            about={"samples": config.samples, "seed": config.seed},
            notes=found.notes,
            clock=clock,
        )
        _finish(config, evaluated, stem)


def open_model(config: EvalConfig, own: World, device: torch.device) -> Opened:
    """Load the newest whole checkpoint and its dataset, and check that results can be written. Raises UserError."""
    assert config.ckpt is not None
    path, model, meta, notes = load_newest(config.ckpt, own, device, config.ema, config.precision)
    with raise_on_all_ranks(own):
        if own.first:
            output_dirs.check_results(config.out, _stem(path))
    data = rank_zero_first(own, lambda: dataset_of(config, model))
    slow = runtime_device.slow_in_bf16("precision", config.precision, device)
    say(own, *notes, data.notice, slow)
    return Opened(path, model, meta, data)


def draw(
    config: EvalConfig, own: World, model: Model, clock: Clock, part: str = "sampling"
) -> evaluator.Drawn:
    """Draw this process's share of the images, with a bar on a terminal; their seconds are those of `part`."""
    num_steps, share = len(levels(model, config.sampler)) - 1, own.share(config.n)
    clock.begin = lambda part: None
    with (
        of_steps(own, num_steps, share.stop - share.start, config.batch_size, leave=False) as (bar, smaller),
        clock(part),
    ):
        return evaluator.draw(
            model,
            config.sampler,
            n=config.n,
            seed=config.seed,
            guidance=guidance(config),
            batch_size=config.batch_size,
            world=own,
            watch=lambda places, step: bar.update(),
            halved=smaller,
        )


def _samples(
    config: EvalConfig, opened: Opened, reference: Reference, drawn: evaluator.Drawn, own: World
) -> Samples:
    return Samples(
        drawn.images,
        drawn.labels,
        reference,
        config.seed,
        opened.model,
        config.batch_size,
        own,
    )


def measure(
    config: EvalConfig,
    opened: Opened,
    reference: Reference,
    drawn: evaluator.Drawn,
    clock: Clock,
    unguided: Samples | None = None,
    *,
    on_all_ranks: Sequence[Found] | None = None,
    **more: Any,
) -> Evaluated:
    """Measure a model's images, on rank 0. `more` goes into the evaluation's protocol."""
    of_run = opened.path.parent.name == "checkpoints"
    about = {
        "checkpoint": str(opened.path),
        "checkpoint_sha256": opened.meta.sha256,
        "step": opened.meta.step,
        "ema": config.ema,
        "precision": opened.model.precision_name,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "guidance_scale": config.guidance_scale,
        "guidance_rescale": config.guidance_rescale,
        "guidance_interval": config.guidance_interval,
        "sampler": config.sampler.to_dict(),
        "num_steps": drawn.num_steps,
        "evaluations_per_image": drawn.evaluations,
    }
    return evaluator.measure(
        _samples(config, opened, reference, drawn, ALONE),
        subject=str(output_dirs.of_run(opened.path) if of_run else opened.path),
        unguided=unguided,
        on_all_ranks=on_all_ranks,
        about={**about, **more},
        clock=clock,
    )


def _stem(checkpoint_file: Path) -> Path:
    return output_dirs.of_run(checkpoint_file) / "evaluations" / "eval"


def dataset_of(config: EvalConfig, model: Model) -> Dataset:
    """Load the typed dataset, or that of the training. Raises UserError where its images do not fit the model."""
    choice = config.dataset or model.config.dataset
    if config.dataset is None and any(
        content.get("path") == "???"
        for content in choices("dataset").values()
        if content["name"] == choice.name
    ):
        raise UserError(
            f"this model was trained on dataset={choice.name}: name its folder, as a path in a checkpoint is not "
            f"followed (dataset={choice.name} dataset.path=… dataset.image_size={model.facts.image_size})"
        )
    data = in_order_of(build.dataset(choice, config.data_root), model.facts.class_names)
    size, channels = data.facts.image_size, data.facts.channels
    if (size, channels) != (model.facts.image_size, model.facts.channels):
        raise UserError(
            f"dataset={data.facts.name}: its images are {size}×{size}×{channels}, those of this model "
            f"{model.facts.image_size}×{model.facts.image_size}×{model.facts.channels}"
        )
    if model.conditional and data.facts.class_names != model.facts.class_names:
        raise UserError(
            f"dataset={data.facts.name}: its classes ({listed(data.facts.class_names)}) are not those of "
            f"{model.facts.name}, which this model was trained on ({listed(model.facts.class_names)})"
        )
    return data


def make_reference(
    config: EvalConfig, data: Dataset, n: int, device: torch.device, clock: Clock, own: World = ALONE
) -> Reference:
    """Prepare, on rank 0, the reference images for any number of measurements."""
    parts = tuple(name for name in METRICS if name in config.measure)
    reference = Reference(
        data, parts, n, device, lambda text: say(own, text), (config.features, config.features_path)
    )
    if own.first:
        evaluator.prepare(reference, clock)
    return reference


def _finish(config: EvalConfig, evaluated: Evaluated, stem: Path) -> None:
    evaluation, gallery = evaluated
    with output_dirs.results(config.out, stem) as (folder, out):
        record.write(folder / record.FILE, evaluation)
        failed = try_to_draw(page.draw, evaluation, gallery, folder / record.PICTURE)
    print(table.table([evaluation]))
    for line in (
        out / record.FILE,
        *([w.replace(str(folder), str(out)) for w in failed] or [str(out / record.PICTURE)]),
    ):
        print(printable(str(line)))


def say(own: World, *lines: str) -> None:
    """Print lines on rank 0, above a bar if there is one."""
    for line in "\n".join(filter(None, lines if own.first else [])).splitlines():
        tell(printable(line))


@contextmanager
def shown_parts(own: World, clock: Clock) -> Iterator[None]:
    """Show on a terminal which part is being measured, and for how long already."""
    hidden = not (own.first and sys.stderr.isatty())
    with tqdm(disable=hidden, bar_format="{desc} ({elapsed})", leave=False) as bar:
        clock.begin = lambda part: bar.set_description_str(f"measuring: {part}")
        yield
