"""Replay a record of the speedrun: train it anew with three seeds, measure, and refuse what cannot be repeated.

    python benchmarks/speedrun/replay.py benchmarks/speedrun/records/NAME.yaml      trains, measures, writes the table
    python benchmarks/speedrun/replay.py --table                                    writes the table alone

The rules are in README.md, beside this file. A record that is repeated gets a NAME.json with all that was measured; one
that is not ends this with status 1, one line of reasons, and nothing written. Data: $DDPM_DATA.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ddpm
from ddpm import build
from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check
from ddpm.errors import UserError
from ddpm.evaluate import record as evaluation_record
from ddpm.evaluate.features.extractor import SHIPPED
from ddpm.evaluate.metrics.likelihood import eps_loss
from ddpm.io.plain_data import parse_yaml

HOME = Path(__file__).parent
PAGE = HOME / "README.md"
BEGIN, END = "<!-- table: written by replay.py -->\n", "<!-- end of table -->\n"
DATASET = "mnist"
TRACKS = {"cpu": "2 CPU cores", "gpu": "one GPU"}
CORES = 2
N, DRAWS = 10_000, 40_000  # images that are judged; network evaluations for a loss
MOST_EVALUATIONS = 40  # of the network for an image
STUDENT = {3: 2.920, 4: 2.353, 5: 2.132}  # 95 % quantile of Student's t for so many seeds, one-sided
MACHINES = 1.05  # by how much machines of one class may differ
FIXED = ("seed", "run_dir", "overwrite", "device", "gpus", "jobs_per_gpu", "data_root", "plugins", "dataset")
FIXED += ("trainer.resume", "trainer.init_from")
FREE_TO_SAMPLE = ("sampler", "guidance_", "precision", "batch_size")


class Limit(NamedTuple):
    """What a figure's mean over all training seeds must keep to, with the bound of its confidence interval."""

    figure: str
    value: float
    sign: int  # 1: at most; -1: at least

    def bound(self, values: Sequence[float]) -> float:
        """The worse end of the one-sided 95 % interval of the mean, by Student's t over the seeds."""
        half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        return statistics.mean(values) + self.sign * half

    def holds(self, values: Sequence[float]) -> bool:
        return self.sign * (self.bound(values) - self.value) <= 0


TARGETS = {
    "loss": (Limit("eps_loss", 0.0258, 1),),
    "digits": (Limit("fd_excess", 0.30, 1), Limit("confident", 0.95, -1)),
}


@dataclass(frozen=True)
class Record:
    """What a YAML file under records/ says."""

    track: str  # of TRACKS
    target: str  # of TARGETS
    train: list[str]  # overrides of ddpm-train
    sample: list[str]  # overrides of ddpm-eval: the sampler and its guidance; none for the loss
    seconds: float  # claimed: the mean over seeds
    who: str
    date: str
    commit: str  # of this repository, that the record is of
    extrapolated: str = ""  # how, where a run was never finished: part of the history, no record


def read(file: Path) -> Record:
    """Read and check a record. Raises UserError."""
    raw = parse_yaml(file.read_bytes())
    try:
        found = Record(**{**raw, "date": str(raw["date"]), "commit": str(raw["commit"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: is no record: {error}") from None
    for key, known in (("track", TRACKS), ("target", TARGETS)):
        if getattr(found, key) not in known:
            raise UserError(f"{file}: {key}={getattr(found, key)}: must be one of {', '.join(known)}")
    for override in found.train:
        if override.partition("=")[0].lstrip("+~") in FIXED or override.lstrip("+~").startswith("dataset."):
            raise UserError(f"{file}: train: {override}: is the same for all records; leave it out")
    for override in found.sample:
        if not override.startswith(FREE_TO_SAMPLE):
            raise UserError(f"{file}: sample: {override}: must be of {', '.join(FREE_TO_SAMPLE)}")
    config = check(TrainConfig, hydra.compose("train", [f"dataset={DATASET}", *found.train]))
    if config.dataset.name != DATASET:
        raise UserError(f"{file}: trains on dataset={config.dataset.name}; all records are of {DATASET}")
    linear = check(TrainConfig, hydra.compose("train", ["schedule=linear"])).schedule
    if found.target == "loss" and config.schedule != linear:
        raise UserError(f"{file}: target: loss needs schedule=linear with its default settings")
    return found


def run(*command: str) -> float:
    """Run one of our commands to its end. Returns its seconds. Raises UserError with what it said."""
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stdout[-500:]} {done.stderr[-500:]}")
    return time.perf_counter() - begun


def measure(record: Record, folder: Path, device: str) -> dict[str, float]:
    """Measure the figures of the record's target for a trained run. Raises UserError."""
    if record.target == "loss":
        model = ddpm.load(folder, device=device)
        data = build.dataset(model.config.dataset, os.environ.get("DDPM_DATA", "data"))
        loss = eps_loss(model, data.test, n=min(DRAWS, len(data.test)), n_draws=DRAWS, seed=0, labelled=False)
        return {"eps_loss": loss.mean}
    out = folder.with_name(f"{folder.name}-judged")
    about = (f"ckpt={folder}", f"n={N}", "measure=[distance]", f"device={device}", f"out={out}")
    run("ddpm-eval", *about, *record.sample)
    found = evaluation_record.read(str(out))
    evaluations, sha256 = found.protocol["evaluations_per_image"], found.protocol["feature_sha256"]
    pinned = SHIPPED.get((DATASET, found.protocol["image_size"]))
    if evaluations > MOST_EVALUATIONS:
        raise UserError(f"{evaluations:g} network evaluations an image; allowed: {MOST_EVALUATIONS}")
    if sha256 != pinned:
        raise UserError(f"feature network: its SHA-256 is {sha256}; must be {pinned}, the one ddpm ships")
    return {limit.figure: found.figures[limit.figure].value for limit in TARGETS["digits"]}


def replay(file: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Train and measure a record for each seed. Returns all of it; raises UserError where it is not repeated."""
    record, device = read(file), "cuda" if read(file).track == "gpu" else "cpu"
    if record.extrapolated:
        raise UserError(f"{file}: is of the history, extrapolated: {record.extrapolated}")
    if len(seeds) not in STUDENT or len({*seeds}) < len(seeds):
        raise UserError(f"--seeds: must be {min(STUDENT)} to {max(STUDENT)} different ones")
    hold_to_the_track(device)
    seconds, figures, environment = list[float](), list[dict[str, float]](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as place:
        for seed in seeds:
            folder = Path(place) / str(seed)
            same = (
                f"dataset={DATASET}",
                *record.train,
                f"seed={seed}",
                f"run_dir={folder}",
                f"device={device}",
            )
            seconds.append(run("ddpm-train", *same))
            figures.append(measure(record, folder, device))
            environment = json.loads((folder / "environment.json").read_text())
            shown = ", ".join(f"{key} {value:.5g}" for key, value in figures[-1].items())
            print(f"seed {seed}: {seconds[-1]:.1f} s, {shown}", flush=True)
    reasons = list[str]()
    for limit in TARGETS[record.target]:
        values = [each[limit.figure] for each in figures]
        if not limit.holds(values):
            want = f"{'at most' if limit.sign > 0 else 'at least'} {limit.value:g}"
            mean, bound = statistics.mean(values), limit.bound(values)
            reasons.append(
                f"{limit.figure} is {mean:.5g} on average, with a 95 % bound of {bound:.5g}; needs {want}"
            )
    least = Limit("seconds", 0, -1).bound(seconds)
    if least > MACHINES * record.seconds:
        mean = statistics.mean(seconds)
        reasons.append(
            f"{mean:.1f} s on average, at least {least:.1f} with 95 %; claimed are {record.seconds:g}"
        )
    if reasons:
        raise UserError(f"{file.stem} is not repeated: {'; '.join(reasons)}")
    machine = {key: environment[key] for key in ("device", "torch", "precision") if key in environment}
    return {
        "seeds": list(seeds),
        "seconds": [round(each, 2) for each in seconds],
        "figures": {key: [each[key] for each in figures] for key in figures[0]},
        "machine": {**machine, "platform": f"{platform.system()} {platform.machine()}"},
        "replayed": date.today().isoformat(),
    }


def hold_to_the_track(device: str) -> None:
    """Keep this process and its children to the track's hardware. Raises UserError where it is not there."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("this track needs a GPU")
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    elif hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    os.environ.setdefault("OMP_NUM_THREADS", str(CORES))


def table(records: Path) -> str:
    """The history: a row for each record that was repeated, by track and target, oldest first."""
    rows = list[tuple[tuple[str, str, str], str]]()
    for file in sorted(records.glob("*.yaml")):
        record, kept = read(file), file.with_suffix(".json")
        if not record.extrapolated and not kept.exists():
            continue
        found = (
            json.loads(kept.read_text()) if kept.exists() else {"seconds": [record.seconds], "figures": {}}
        )
        seconds = found["seconds"]
        spread = "extrapolated" if record.extrapolated else f"{min(seconds):,.0f} … {max(seconds):,.0f}"
        figures = [
            f"{limit.figure} {statistics.mean(values):.4g} (bound {limit.bound(values):.4g})"
            for limit in TARGETS[record.target]
            if (values := found["figures"].get(limit.figure))
        ]
        cells = (
            TRACKS[record.track], record.target, f"**{statistics.mean(seconds):,.0f}** ({spread})",
            "; ".join(figures) or "–", f"[{file.stem}]({records.name}/{file.name})", record.who, record.date,
            record.commit, found.get("machine", {}).get("device", "–"),
        )  # fmt: skip
        rows.append(((record.track, record.target, record.date), f"| {' | '.join(cells)} |"))
    head = [
        "track",
        "target",
        "seconds",
        "figures, mean of the seeds",
        "record",
        "who",
        "date",
        "commit",
        "machine",
    ]
    lines = [
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * len(head))} |",
        *(row for _, row in sorted(rows)),
    ]
    return "\n".join(lines) + "\n"


def write_table(page: Path, records: Path) -> None:
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + "\n" + table(records) + "\n" + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    try:
        if arguments.record is not None:
            found = replay(arguments.record, arguments.seeds)
            arguments.record.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        elif not arguments.table:
            parser.error("name a record, or --table")
        write_table(PAGE, HOME / "records")
    except (UserError, OSError) as error:
        sys.exit(f"replay: {error}")
    print(PAGE)


if __name__ == "__main__":
    main()
