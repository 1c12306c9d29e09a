"""What ddpm-eval does once its keys are checked: load, draw, measure, write, print."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ddpm import build
from ddpm.checkpoint import locate, verify
from ddpm.checkpoint.header import Meta
from ddpm.config.choices import choices
from ddpm.config.schema import EvalConfig
from ddpm.data.dataset import Dataset
from ddpm.errors import UserError, printable
from ddpm.evaluate import evaluator, page, record, samples, table
from ddpm.evaluate.metrics.registry import METRICS, OF_MODEL
from ddpm.evaluate.provenance import Clock
from ddpm.evaluate.reference import Reference
from ddpm.runs import output_dirs
from ddpm.runtime.console import of_steps, tell
from ddpm.runtime.device import slow_in_bf16
from ddpm.runtime.distributed import broadcast_object, raise_on_all_ranks, rank_zero_first
from ddpm.runtime.world import ALONE, World
from ddpm.sample.model import Model, levels, load


def of_model(config: EvalConfig, own: World, device: torch.device) -> None:
    assert config.ckpt is not None
    path, notes, clock = Path(), list[str](), Clock()
    with raise_on_all_ranks(own):
        if own.first:
            path, notes = locate.newest_good(locate.find(config.ckpt), check=verify.examine)
            output_dirs.check_results(config.out, _stem(path))
    path = broadcast_object(own, path)
    with raise_on_all_ranks(own):
        model, meta = load(path, device, config.ema, config.precision)
    data = rank_zero_first(own, lambda: dataset_of(config, model))
    say(own, *notes, data.notice, slow_in_bf16("precision", config.precision, device))
    with raise_on_all_ranks(own), shown_parts(config, own, clock):
        bench = make_bench(config, data, config.n, device, clock) if own.first else None
    with shown_steps(config, own, model, clock) as watched:
        drawn = evaluator.draw(
            model,
            config.sampler,
            n=config.n,
            seed=config.seed,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
            world=own,
            **watched,
        )
    with shown_parts(config, own, clock):
        of_model = evaluator.ask_model(
            model,
            data,
            config.measure,
            n=config.n,
            seed=config.seed,
            batch_size=config.batch_size,
            world=own,
            clock=clock,
        )
        with raise_on_all_ranks(own):
            if bench is None:
                return
            judged = evaluator.measure(
                bench,
                drawn.images,
                drawn.labels,
                subject=subject(path),
                seed=config.seed,
                of_model=of_model,
                about=origin(config, drawn, path, meta),
                clock=clock,
            )
            _finish(config, judged, _stem(path))


def of_images(config: EvalConfig, own: World, device: torch.device) -> None:
    """All of it on rank 0: nothing is drawn."""
    assert config.samples is not None and config.dataset is not None
    stem, clock = Path("outputs") / "evaluations" / "eval", Clock()
    with raise_on_all_ranks(own), shown_parts(config, own, clock):
        if not own.first:
            return
        output_dirs.check_results(config.out, stem)
        data = build.dataset(config.dataset, config.data_root)
        say(own, data.notice)
        found = samples.read(config.samples, data, config.dataset, config.n, config.seed, config.data_root)
        bench = make_bench(config, data, len(found.images), device, clock)
        about = {"samples": config.samples, "seed": config.seed}
        judged = evaluator.measure(
            bench,
            found.images,
            found.labels,
            subject=config.samples,
            seed=config.seed,
            about=about,
            notes=found.notes,
            clock=clock,
        )
        _finish(config, judged, stem)


def subject(checkpoint_file: Path) -> str:
    """What an evaluation calls a model: its run, or a file that is of none."""
    of_run = checkpoint_file.parent.name == "checkpoints"
    return str(output_dirs.of_run(checkpoint_file) if of_run else checkpoint_file)


def _stem(checkpoint_file: Path) -> Path:
    return output_dirs.of_run(checkpoint_file) / "evaluations" / "eval"


def dataset_of(config: EvalConfig, model: Model) -> Dataset:
    """The typed one, or that of the training. Raises UserError where its images are not as the model's."""
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
    data = build.dataset(choice, config.data_root)
    size, channels = data.facts.image_size, data.facts.channels
    if (size, channels) != (model.facts.image_size, model.facts.channels):
        raise UserError(
            f"dataset={data.facts.name}: its images are {size}×{size}×{channels}, those of this model "
            f"{model.facts.image_size}×{model.facts.image_size}×{model.facts.channels}"
        )
    if model.conditional and data.facts.class_names != model.facts.class_names:
        raise UserError(
            f"dataset={data.facts.name}: its classes are not those of {model.facts.name}, which this model was "
            "trained on and is asked for"
        )
    return data


def make_bench(config: EvalConfig, data: Dataset, n: int, device: torch.device, clock: Clock) -> Reference:
    parts = tuple(name for name in (*METRICS, *OF_MODEL) if name in config.measure)
    return evaluator.prepare(
        data, n=n, parts=parts, device=device, say=lambda text: say(ALONE, text), clock=clock
    )


def origin(config: EvalConfig, drawn: evaluator.Drawn, path: Path, meta: Meta) -> dict[str, Any]:
    return {
        "checkpoint": str(path),
        "checkpoint_sha256": meta.sha256,
        "step": meta.step,
        "ema": config.ema,
        "precision": config.precision,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "guidance_scale": config.guidance_scale,
        "sampler": config.sampler.to_dict(),
        "num_steps": drawn.num_steps,
        "evaluations_per_image": drawn.evaluations,
    }


def _finish(config: EvalConfig, judged: tuple[record.Evaluation, evaluator.Gallery], stem: Path) -> None:
    evaluation, gallery = judged
    with output_dirs.results(config.out, stem) as out:
        page.draw(evaluation, gallery, out / record.PICTURE)
        record.write(out / record.FILE, evaluation)
    print(table.table([evaluation]))
    for file in (record.FILE, record.PICTURE):
        print(printable(str(out / file)))


def say(own: World, *lines: str) -> None:
    """Above a bar, if there is one."""
    for line in lines if own.first else []:
        if line:
            tell(printable(line))


@contextmanager
def shown_parts(config: EvalConfig, own: World, clock: Clock) -> Iterator[None]:
    """On a terminal: which part is being measured, and for how long already."""
    hidden = not (own.first and sys.stderr.isatty())
    with tqdm(disable=hidden, bar_format="{desc} ({elapsed})", leave=False) as bar:
        clock.begin = lambda part: bar.set_description_str(f"measuring: {part}")
        yield


@contextmanager
def shown_steps(config: EvalConfig, own: World, model: Model, clock: Clock) -> Iterator[dict[str, Any]]:
    """A bar on a terminal, and what `judge.draw` tells it."""
    num_steps, share = len(levels(model, config.sampler)) - 1, own.share(config.n)
    clock.begin = lambda part: None
    with (
        of_steps(own, num_steps, share.stop - share.start, config.batch_size, leave=False) as (bar, smaller),
        clock("sampling"),
    ):
        yield {"watch": lambda places, step: bar.update(), "halved": smaller}
