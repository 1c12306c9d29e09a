"""`ddpm-eval -m`: one checkpoint under many settings of its sampler, in one process that loads everything once.

The seed is the same for all, so that what differs is what the sampler does. Each setting's evaluation.json is kept in
the study's folder as soon as it is measured; a repeat skips what is there.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm import __version__
from ddpm.cli import eval_keys
from ddpm.config import hydra
from ddpm.config.schema import EvalConfig, check
from ddpm.errors import UserError, printable
from ddpm.io.files import reason, write_atomically
from ddpm.runs import output_dirs
from ddpm.runtime import signals
from ddpm.runtime.console import tell
from ddpm.runtime.world import ALONE, world
from ddpm.sample import sampler_file

if TYPE_CHECKING:
    from ddpm.checkpoint.header import Meta
    from ddpm.data.dataset import Dataset
    from ddpm.evaluate.record import Evaluation
    from ddpm.evaluate.reference import Reference
    from ddpm.sample.model import Model

SWEPT = ("sampler", "guidance_scale")  # and the sampler's keys: what a setting may change
MEASURED = ["measure=[distance,neighbours]"]  # where `measure` is not typed
MAX_SETTINGS = 1000
FEWEST = 1000  # images for a sampler that is taken from then on
FILES = ("study.md", "study.json", "study.png")


@dataclass(frozen=True)
class Plan:
    """settings: checked configs that differ only in the sampler and the guidance; varied: the keys that do."""

    settings: list[EvalConfig]
    varied: list[str]

    @property
    def common(self) -> EvalConfig:
        return self.settings[0]


def study(typed: list[str]) -> None:
    """The whole of a multirun. Raises UserError before anything is drawn where one setting is wrong."""
    plan = _planned(typed)
    from ddpm.checkpoint import locate, verify
    from ddpm.runtime import device as runtime_device
    from ddpm.runtime import memory
    from ddpm.runtime.device import slow_in_bf16
    from ddpm.sample.model import load

    memory.keep_freed()
    runtime_device.set_up_cuda()
    ckpt, device = plan.common.ckpt, runtime_device.device(plan.common.device)
    assert ckpt is not None
    path, notes = locate.newest_good(locate.find(ckpt), check=verify.examine)
    out = Path(plan.common.out) if plan.common.out else output_dirs.of_run(path) / "evaluations" / "study"
    output_dirs.check_results(str(out), out)
    if slow := slow_in_bf16("precision", plan.common.precision, device):
        notes.append(slow)
    for note in notes:
        tell(printable(note))
    model, meta = load(path, device, plan.common.ema, plan.common.precision)
    for setting in plan.settings:
        _try(setting, model)
    tell(printable(f"{len(plan.settings)} settings, {plan.common.n:,} images each; kept in {out}"))
    try:
        _conclude(plan, path, out, _all_measured(plan, path, out, model, meta))
    except signals.Stopped as stopped:
        tell(printable(f"stopped; what was finished is in {out}, and the same command goes on"))
        raise signals.Stopped(stopped.number, said=True) from None
    except OSError as error:
        raise UserError(f"cannot write to {out}: {reason(error)}; out=… names another folder") from None


def _planned(typed: list[str]) -> Plan:
    """Every setting, composed and checked. Raises UserError."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if world().size > 1:  # by whatever launcher
        raise UserError("-m measures one setting after the other in one process: leave torchrun out")
    for override in typed:
        if override.lstrip("+~").startswith("hydra"):
            raise UserError(
                f"{override}: a study loads model and data once and takes one setting after the other, without a "
                "launcher or sweeper; leave it out"
            )
    if hydra.typed_value(typed, "ckpt") is None:
        raise UserError("ckpt is needed: -m compares settings of one checkpoint's sampler (ckpt=…)")
    with hydra.parsed("eval", typed) as parsed:
        swept = [
            override.get_key_element().lstrip("+") for override in parsed if override.is_sweep_override()
        ]
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    for key in swept:
        if key not in SWEPT and not key.startswith("sampler."):
            raise UserError(
                f"{key}: -m varies the sampler (sampler=…, sampler.num_steps=…) and guidance_scale of one checkpoint; "
                "compare=[…] puts other evaluations side by side"
            )
    if len(jobs) > MAX_SETTINGS:
        raise UserError(f"{len(jobs)} settings; allowed: {MAX_SETTINGS}")
    before = MEASURED + eval_keys.before_typed(jobs[0])  # what is not swept, and so the same for all
    settings: list[EvalConfig] = []
    for job in jobs:
        config: EvalConfig = check(EvalConfig, hydra.compose("eval", before + job))
        eval_keys.check_keys(config)
        if config in settings:
            raise UserError(f"two settings are the same: {', '.join(o for o in job if _key(o) in swept)}")
        settings.append(config)
    measure = settings[0].measure
    if "distance" not in measure or "likelihood" in measure:
        raise UserError(
            f"measure=[{','.join(measure)}]: -m compares by distance, which must be named; likelihood knows "
            "of no sampler"
        )
    return Plan(settings, swept)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _try(setting: EvalConfig, model: "Model") -> None:
    """One step of one image, so that what does not fit this model is said first. Raises UserError."""
    import torch

    from ddpm.sample import sampling
    from ddpm.sample.model import Guidance, denoiser, labels

    index, guidance = torch.zeros(1, dtype=torch.int64), Guidance(setting.guidance_scale)
    with torch.inference_mode():
        y = labels(model, None, index, guidance)
        denoise = denoiser(model, setting.sampler, None if y is None else y.to(model.device), guidance)
        next(sampling.draw(model, setting.sampler, denoise, index.to(model.device), setting.seed))


def _all_measured(plan: Plan, path: Path, out: Path, model: "Model", meta: "Meta") -> "list[Evaluation]":
    """One evaluation for each setting: read where it is there, else made and written."""
    from ddpm.evaluate import run as judging
    from ddpm.evaluate.provenance import Clock

    data, clock = judging.dataset_of(plan.common, model), Clock()
    kept = [_kept(out, _identity(setting, meta, data)) for setting in plan.settings]
    if None not in kept and len({_features(each) for each in kept}) == 1:
        tell("all of them are there already")
        return [each for each in kept if each is not None]
    judging.say(ALONE, data.notice)
    with judging.shown_parts(plan.common, ALONE, clock):
        bench = judging.make_bench(plan.common, data, plan.common.n, model.device, clock)
    assert bench.embedder is not None  # as distances are measured
    done = []
    for number, (setting, found) in enumerate(zip(plan.settings, kept, strict=True), start=1):
        there = found is not None and _features(found) == bench.embedder.features.sha256
        evaluation = found if there and found else _measured(setting, path, out, model, meta, bench)
        done.append(evaluation)
        tell(f"{number}/{len(kept)}: {_line(evaluation, plan)}{', as it was there' if there else ''}")
    return done


def _line(evaluation: "Evaluation", plan: Plan) -> str:
    from ddpm.report import sampler_study as study

    one = study.gather([evaluation], plan.varied)
    (row,) = one.rows
    return (
        f"{study.name(row, one.varied)}: {row.evaluations:g} evaluations, Fréchet excess {row.excess or '–'}"
    )


def _measured(
    setting: EvalConfig, path: Path, out: Path, model: "Model", meta: "Meta", bench: "Reference"
) -> "Evaluation":
    """Drawn, measured and written."""
    from ddpm.evaluate import evaluator, record
    from ddpm.evaluate import run as judging
    from ddpm.evaluate.provenance import Clock

    clock, identity = Clock(), _identity(setting, meta, bench.data)
    with judging.shown_steps(setting, ALONE, model, clock) as watched:
        drawn = evaluator.draw(
            model,
            setting.sampler,
            n=setting.n,
            seed=setting.seed,
            guidance_scale=setting.guidance_scale,
            batch_size=setting.batch_size,
            **watched,
        )
    with judging.shown_parts(setting, ALONE, clock):
        evaluation, _ = evaluator.measure(
            bench,
            drawn.images,
            drawn.labels,
            subject=judging.subject(path),
            seed=setting.seed,
            about={**judging.origin(setting, drawn, path, meta), "setting": _digest(identity)},
            clock=clock,
        )
    folder = out / _name(identity)
    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder / record.FILE, evaluation)
    return evaluation


def _identity(setting: EvalConfig, meta: "Meta", data: "Dataset") -> dict[str, Any]:
    """All that decides an evaluation's figures, beside the features."""
    from ddpm.evaluate import provenance

    return {
        "ddpm": __version__,
        "checkpoint_sha256": meta.sha256,
        "ema": setting.ema,
        "precision": setting.precision,
        "n": setting.n,
        "seed": setting.seed,
        "guidance_scale": setting.guidance_scale,
        "sampler": setting.sampler.to_dict(),
        "dataset": data.facts.name,
        "test_sha256": provenance.sha256(data.test.images),
        "measure": sorted(setting.measure),
    }


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _name(identity: dict[str, Any]) -> str:
    sampler = identity["sampler"]
    return f"{sampler['name']}-{sampler['num_steps'] or 'all'}-{_digest(identity)[:8]}"


def _kept(out: Path, identity: dict[str, Any]) -> "Evaluation | None":
    """What an earlier start has measured. None where it is not there, or is not what one writes."""
    from ddpm.evaluate import record
    from ddpm.report import sampler_study as study

    try:
        found = record.read(str(out / _name(identity) / record.FILE))
        study.table(study.gather([found], []))
    except (UserError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None
    about = found.protocol
    same = about.get("setting") == _digest(identity) and about["sampler"] == identity["sampler"]
    return found if same else None


def _features(evaluation: "Evaluation | None") -> object:
    return None if evaluation is None else evaluation.protocol.get("feature_sha256")


def _conclude(plan: Plan, path: Path, out: Path, evaluations: "list[Evaluation]") -> None:
    """Table, files and, where one setting is to be preferred, sampler.yaml beside the checkpoint."""
    from ddpm.report import sampler_study as study
    from ddpm.report import sampler_study_plot

    result = study.gather(evaluations, plan.varied)
    study.write(out / "study.json", result)
    sampler_study_plot.draw(result, out / "study.png")
    write_atomically(out / "study.md", f"{study.markdown(result)}\n\n![study](study.png)\n".encode())
    print(study.table(result))
    for name in FILES:
        print(printable(str(out / name)))
    plain = replace(result, rows=tuple(row for row in result.rows if row.guidance_scale == 1))
    chosen, about, file = study.cheapest(plain), result.about, path.parent / sampler_file.NAME
    why = _unfit(plan, sum(row.excess is not None for row in plain.rows))
    if chosen is None or why:
        print(printable(f"{file} is not written: {why}"))
        return
    setting = plan.settings[result.rows.index(chosen)]
    lines = [
        f"written by ddpm-eval -m, {date.today()}: of {len(plain.rows)} settings, {study.verdict(plain)}",
        f"checkpoint: step {about['step']}, SHA-256 {about['checkpoint_sha256']}; {about['n']} images, seed "
        f"{about['seed']}, guidance_scale 1",
        "ddpm-sample and ddpm-eval take this sampler unless sampler=… is typed; deleting the file is safe",
    ]
    try:
        sampler_file.write(file, setting.sampler, lines)
    except OSError as error:
        print(printable(f"cannot write {file}: {reason(error)}; {study.name(chosen)} is not the default"))
    else:
        print(printable(f"{file}: what ddpm-sample now takes; sampler=… takes another"))


def _unfit(plan: Plan, comparable: int) -> str:
    """Why no setting is to be taken from now on, if so: ddpm-sample draws with averaged weights at guidance 1."""
    if not plan.common.ema:
        return "with ema=false these are not the weights that ddpm-sample takes"
    if plan.common.n < FEWEST:
        return f"n={plan.common.n} is too few to choose by; {FEWEST:,} at least"
    if comparable < 2:
        return f"{comparable} of the settings at guidance_scale=1 can be compared; 2 at least"
    return ""
