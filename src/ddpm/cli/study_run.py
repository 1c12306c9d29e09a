"""Measure one checkpoint under many settings of its sampler, in one process that loads everything once.

The seed is the same for all, so that only the sampler differs. Each setting's evaluation.json is written as soon as it
is measured; a repeated study skips those that are there.
"""

import hashlib
import itertools
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ddpm import __version__
from ddpm.config.schema import EvalConfig
from ddpm.errors import UserError, printable
from ddpm.evaluate import provenance, record
from ddpm.evaluate import run as evaluation_run
from ddpm.evaluate.provenance import Clock
from ddpm.evaluate.record import Evaluation
from ddpm.evaluate.reference import Reference
from ddpm.evaluate.run import Opened
from ddpm.io.files import leftovers, reason, try_to_draw, write_atomically
from ddpm.io.folders import check_can_be_made
from ddpm.report import sampler_study, sampler_study_plot
from ddpm.runs import output_dirs, run_dir
from ddpm.runtime import signals
from ddpm.runtime.console import tell
from ddpm.runtime.world import ALONE
from ddpm.sample import sampler_file, sampling
from ddpm.sample.model import Model, denoiser, guidance, labels

FILES = ("study.json", "study.png", "study.md")  # written in this order
MAX_STUDY = 1 << 24  # bytes of study.json
FEWEST = 1000  # images for a sampler to become the default
Identity = dict[str, Any]  # all that decides an evaluation's figures, beside the features


def run(settings: list[EvalConfig], varied: list[str]) -> None:
    """Measure checked configs that differ in the keys `varied` alone. Raises UserError before the first image."""
    first = settings[0]
    anywhere = replace(first, out=None)
    opened = evaluation_run.open_model(anywhere, ALONE, evaluation_run.start(first))
    out = _folder(first.out, opened, {_name(_identity(setting, opened)) for setting in settings})
    for setting in settings:
        _try(setting, opened.model)
    tell(printable(f"{len(settings)} settings, {first.n:,} images each; kept in {out}"))
    try:
        evaluations = _evaluations(settings, varied, opened, out)
        recommended = tuple(sampler_file.recommended_guidance(opened.model.config).values())
        conclude(settings, varied, opened.path, out, evaluations, recommended)
    except signals.Stopped as stopped:
        tell(printable(f"stopped; what was finished is in {out}, and the same command goes on"))
        raise signals.Stopped(stopped.number, said=True) from None
    except OSError as error:
        raise UserError(f"cannot write to {out}: {reason(error)}; out=… names another folder") from None


def _folder(out: str | None, opened: Opened, names: set[str]) -> Path:
    """Return the folder of a study of this checkpoint: `out`, else the run's first that can be. Raises UserError."""
    if out is not None:
        check_can_be_made(Path(out))
        if other := _not_of_the_study(Path(out), opened, names):
            raise UserError(f"out={out}: holds {other}, which is not of a study of this checkpoint")
        return Path(out)
    stem = output_dirs.of_run(opened.path) / "evaluations" / "study"
    folders = itertools.chain([stem], (stem.with_name(f"{stem.name}-{i}") for i in itertools.count(2)))
    return next(folder for folder in folders if not _not_of_the_study(folder, opened, names))


def _not_of_the_study(folder: Path, opened: Opened, names: set[str]) -> str:
    """Return the name of something in a folder that no study of this checkpoint has written; "" if there is none."""
    about = run_dir.read_json(folder / FILES[0], MAX_STUDY).get("about")
    is_study = isinstance(about, dict) and about.get("checkpoint_sha256") == opened.meta.sha256
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not (path.name in names or (is_study and path.name in FILES) or path in leftovers(folder)):
            try:
                about = record.read(str(path / record.FILE)).protocol
            except UserError:
                return path.name
            if "setting" not in about or about.get("checkpoint_sha256") != opened.meta.sha256:
                return path.name
    return ""


def _try(setting: EvalConfig, model: Model) -> None:
    """Draw one step of one image. Raises UserError where a setting does not fit the model."""
    index, guided = torch.zeros(1, dtype=torch.int64, device=model.device), guidance(setting)
    with torch.inference_mode():
        denoise = denoiser(model, setting.sampler, labels(model, None, index, guided), guided)
        next(sampling.draw(model, setting.sampler, denoise, index, setting.seed))


def _evaluations(
    settings: list[EvalConfig], varied: list[str], opened: Opened, out: Path
) -> list[Evaluation]:
    """Read the evaluation of each setting where it is there, else measure and write it."""
    identities = [_identity(setting, opened) for setting in settings]
    kept = [read_kept(out, identity) for identity in identities]
    whole = [evaluation for evaluation in kept if evaluation is not None]
    if len(whole) == len(settings) and len(set(map(_features, whole))) == 1:
        tell("all of them are there already")
        return whole
    clock, done = Clock(), list[Evaluation]()
    with evaluation_run.shown_parts(ALONE, clock):
        common = (settings[0].n, opened.model.device, clock)
        reference = evaluation_run.make_reference(settings[0], opened.data, *common)
    for setting, identity, evaluation in zip(settings, identities, kept, strict=True):
        note = ", as it was there"
        if evaluation is None or _features(evaluation) != reference.embedder.features.sha256:
            evaluation, note = _measure(setting, identity, opened, reference), ""
            file = evaluation_file(out, identity)
            file.parent.mkdir(parents=True, exist_ok=True)
            record.write(file, evaluation)
        done.append(evaluation)
        one = sampler_study.gather([evaluation], varied)
        row, name = one.rows[0], sampler_study.name(one.rows[0], one.varied)
        costs = f"{row.evaluations:g} evaluations, Fréchet excess {sampler_study.interval(row.excess)}"
        tell(f"{len(done)}/{len(settings)}: {name}: {costs}{note}")
    return done


def _measure(setting: EvalConfig, identity: Identity, opened: Opened, reference: Reference) -> Evaluation:
    """Draw and measure the images of one setting."""
    clock = Clock()
    drawn = evaluation_run.draw(setting, ALONE, opened.model, clock)
    with evaluation_run.shown_parts(ALONE, clock):
        digest = digest_of(identity)
        return evaluation_run.measure(setting, opened, reference, drawn, clock, setting=digest)[0]


def _identity(setting: EvalConfig, opened: Opened) -> Identity:
    # left out where they are off, as evaluations made before these keys have none
    newer: Identity = {key: getattr(setting, key) for key in ("guidance_rescale", "guidance_interval")}
    newer["features"] = [setting.features, setting.features_path] if setting.features != "own" else None
    return {
        **{key: value for key, value in newer.items() if value},
        "ddpm": __version__,
        "checkpoint_sha256": opened.meta.sha256,
        "ema": setting.ema,
        "precision": opened.model.precision_name,
        "n": setting.n,
        "seed": setting.seed,
        "guidance_scale": setting.guidance_scale,
        "sampler": setting.sampler.to_dict(),
        "dataset": opened.data.facts.name,
        "test_sha256": provenance.sha256(opened.data.test.images),
        "measure": sorted(setting.measure),
    }


def digest_of(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def evaluation_file(out: Path, identity: Identity) -> Path:
    return out / _name(identity) / record.FILE


def _name(identity: Identity) -> str:
    sampler = identity["sampler"]
    return f"{sampler['name']}-{sampler['num_steps'] or 'all'}-{digest_of(identity)[:8]}"


def read_kept(out: Path, identity: Identity) -> Evaluation | None:
    """Read what an earlier study measured. Returns None where it is absent or not what a study writes."""
    try:
        found = record.read(str(evaluation_file(out, identity)))
        sampler_study.table(sampler_study.gather([found], []))
    except (UserError, KeyError):
        return None
    about = found.protocol
    same = about.get("setting") == digest_of(identity) and about["sampler"] == identity["sampler"]
    return found if same else None


def _features(evaluation: Evaluation) -> object:
    return evaluation.protocol.get("feature_sha256")


def conclude(
    settings: list[EvalConfig],
    varied: list[str],
    path: Path,
    out: Path,
    evaluations: list[Evaluation],
    recommended: tuple[Any, ...] = (1.0, 0.0, None),
) -> None:
    """Write table, files and, where one setting is preferable, sampler.yaml beside the checkpoint `path`.

    The file names a sampler alone, so it is chosen among the settings of the guidance that the training recommends:
    scale, rescale and interval.
    """
    result = sampler_study.gather(evaluations, varied)
    data, picture, text = (out / name for name in FILES)
    sampler_study.write(data, result)
    write_atomically(text, f"{sampler_study.markdown(result)}\n\n![study](study.png)\n".encode())
    warnings = try_to_draw(sampler_study_plot.draw, result, picture)
    tell(sampler_study.table(result))
    for line in (text, data, *(warnings or [str(picture)])):
        tell(printable(str(line)))
    alike = replace(result, rows=tuple(row for row in result.rows if row.guidance == recommended))
    chosen, about, file = sampler_study.cheapest(alike), result.about, path.parent / sampler_file.NAME
    why = _unfit(settings[0], sum(bool(row.excess) for row in alike.rows), recommended[0])
    if chosen is None or why:
        tell(printable(f"{file} is not written: {why}"))
        return
    lines = [
        f"written by ddpm-eval -m, {date.today()}: of {len(alike.rows)} settings, {sampler_study.verdict(alike)}",
        f"checkpoint: step {about['step']}, SHA-256 {about['checkpoint_sha256']}; {about['n']} images, seed "
        f"{about['seed']}, guidance_scale {recommended[0]:g}",
        "ddpm-sample and ddpm-eval take this sampler unless sampler=… is typed; deleting the file is safe",
    ]
    written = f"{file}: what ddpm-sample now takes; sampler=… takes another"
    try:
        sampler_file.write(file, settings[result.rows.index(chosen)].sampler, lines)
    except OSError as error:
        written = f"cannot write {file}: {reason(error)}; {sampler_study.name(chosen)} is not the default"
    tell(printable(written))


def _unfit(common: EvalConfig, comparable: int, scale: float) -> str:
    """Return why no setting becomes the default: ddpm-sample draws with averaged weights and the guidance `scale`."""
    if not common.ema:
        return "with ema=false these are not the weights that ddpm-sample takes"
    if common.n < FEWEST:
        return f"n={common.n} is too few to choose by; {FEWEST:,} at least"
    if comparable < 2:
        return f"{comparable} of the settings at guidance_scale={scale:g} can be compared; 2 at least"
    return ""
