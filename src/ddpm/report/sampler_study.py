"""Compare settings of one sampler by cost and quality. Needs no torch.

One row for each evaluation of the same checkpoint, seed and number of images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.errors import DataError, printable
from ddpm.evaluate import record
from ddpm.evaluate.record import Evaluation, Metric
from ddpm.evaluate.table import aligned
from ddpm.io.files import read_bounded, write_atomically
from ddpm.io.plain_data import parse_json

FORMAT_VERSION = 1
MAX_BYTES = 1 << 23  # a setting has about 5 thousand
QUALITY = "fd_excess"  # the figure that decides; less is better
SHOWN = {"class_fd_excess": "within classes"} | {key: key for key in ("precision", "recall", "coverage")}
SHOWN |= {"confident": "classifier confidence", "right_class": "agreement with the label"}
COMMON = ["checkpoint", "checkpoint_sha256", "step", "n", "seed"]
COMMON += ["dataset", "split_images", "feature_network", "feature_sha256"]


@dataclass(frozen=True)
class Row:
    """One setting. `evaluations` are network evaluations for an image, `seconds` those for 1,000 images."""

    sampler: Mapping[str, Any]  # its name and all keys
    guidance_scale: float
    num_steps: int
    evaluations: float
    seconds: float
    figures: Mapping[str, Metric]
    guidance_rescale: float = 0.0
    guidance_interval: list[float] | None = None  # None: everywhere

    @property
    def excess(self) -> tuple[float, ...]:
        return _excess(self.figures)

    @property
    def guidance(self) -> tuple[float, float, list[float] | None]:
        return self.guidance_scale, self.guidance_rescale, self.guidance_interval

    @property
    def cost(self) -> tuple[float, float]:
        return self.evaluations, self.seconds


def _excess(figures: Mapping[str, Metric]) -> tuple[float, ...]:
    """Return the value of QUALITY and the ends of its interval; empty where it was not measured."""
    if (found := figures.get(QUALITY)) is None:
        return ()
    return (found.value, *(found.value if end is None else end for end in (found.low, found.high)))


@dataclass(frozen=True)
class Study:
    """Rows, and the protocol they have in common (`about`): subject, checkpoint_sha256, n, seed, dataset, machine, …"""

    rows: tuple[Row, ...]
    varied: tuple[str, ...]  # keys that differ among the rows, beside the sampler and its steps
    real: Mapping[str, Metric]  # of training images
    about: Mapping[str, Any]


def gather(evaluations: Sequence[Evaluation], varied: Sequence[str]) -> Study:
    """Collect evaluations of one checkpoint, one for each setting, into a study."""
    first = evaluations[0]
    real = {name: figure for name, figure in first.figures.items() if name.startswith("real_")}
    about = {"subject": first.subject, **{key: first.protocol[key] for key in COMMON}}
    about["precision"] = first.protocol.get("precision", "fp32")
    machines = dict.fromkeys(str(evaluation.protocol["machine"]) for evaluation in evaluations)
    about["machine"] = " and ".join(machines) + ", whose seconds do not compare" * (len(machines) > 1)
    others = tuple(key for key in varied if key not in ("sampler", "sampler.num_steps"))
    return Study(tuple(map(_row, evaluations)), others, real, about)


def _row(evaluation: Evaluation) -> Row:
    about = evaluation.protocol
    seconds = 1000 * about["seconds"]["sampling"] / about["n"]
    figures = {name: figure for name, figure in evaluation.figures.items() if not name.startswith("real_")}
    costs = (about["num_steps"], about["evaluations_per_image"], seconds)
    more = {key: about[key] for key in ("guidance_rescale", "guidance_interval") if key in about}
    return Row(about["sampler"], about["guidance_scale"], *costs, figures, **more)


def best(study: Study) -> Row | None:
    """Return the row of the lowest excess, the cheaper of equals; None where no row has one."""
    measured = [row for row in study.rows if row.excess]
    return min(measured, key=lambda row: (row.excess[0], row.cost), default=None)


def cheapest(study: Study) -> Row | None:
    """Return the cheapest row, by evaluations then seconds, whose excess lies within the interval of the best."""
    top = best(study)
    good = [row for row in study.rows if top and row.excess and row.excess[0] <= top.excess[2]]
    return min(good, key=lambda row: row.cost, default=None)


def name(row: Row, varied: Sequence[str] = (), steps: bool = True) -> str:
    """Name a row, such as `ddim, 10 steps, eta 0.5`."""
    more = [f"{key.rpartition('.')[2]} {setting(row, key)}" for key in varied]
    return ", ".join([row.sampler["name"], *([f"{row.num_steps} steps"] if steps else []), *more])


def setting(row: Row, key: str) -> str:
    """Return the value of a key, in text."""
    known = {**row.sampler, **{key: value for key, value in vars(row).items() if key.startswith("guidance_")}}
    value = known.get(key.removeprefix("sampler."), "–")
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def interval(excess: tuple[float, ...]) -> str:
    """Format an excess, such as `0.400 [0.300, 0.500]`; a dash for none."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*excess) if excess else "–"


def verdict(study: Study) -> str:
    """Name the cheapest setting within the interval of the best, in one line."""
    top, chosen = best(study), cheapest(study)
    if top is None or chosen is None:
        return f"no setting has a {QUALITY}: {study.about['n']:,} images are too few, so none is named"
    text = f"cheapest within the interval of the best: {name(chosen, study.varied)}"
    if chosen is top:
        return f"{text}, the best itself ({interval(top.excess)})"
    return f"{text} ({interval(chosen.excess)}); best: {name(top, study.varied)} ({interval(top.excess)})"


def cells(study: Study) -> list[list[str]]:
    """Return a head and a line for each row, in the order they were typed; last, what real images reach."""
    shown = [key for key in SHOWN if any(key in row.figures for row in study.rows)]
    head = ["sampler", "steps", *(key.rpartition(".")[2] for key in study.varied)]
    head += ["evaluations", "s / 1,000 images"]
    lines = [[*head, "Fréchet excess", *(SHOWN[key] for key in shown)]]

    def add(costs: list[str], figures: Mapping[str, Metric]) -> None:
        others = [f"{figures[key].value:.3f}" if key in figures else "–" for key in shown]
        lines.append([*costs, interval(_excess(figures)), *others])

    for row in study.rows:
        settings = [row.sampler["name"], str(row.num_steps), *(setting(row, key) for key in study.varied)]
        add([*settings, f"{row.evaluations:g}", f"{row.seconds:.3g}"], row.figures)
    real = {key.removeprefix("real_"): figure for key, figure in study.real.items()}
    if QUALITY in real:
        add(["real images", *["–"] * (len(head) - 1)], real)
    return lines


def table(study: Study) -> str:
    """Format a study for a terminal."""
    lines = [line.rstrip() for line in aligned(cells(study))]
    return "\n".join([*lines, described(study), verdict(study)])


def markdown(study: Study) -> str:
    """Format a study for a page."""
    head, *lines = cells(study)
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)]
    sentence = verdict(study)
    return "\n".join([*rows, "", f"{described(study)}.", "", f"{sentence[0].upper()}{sentence[1:]}."])


def described(study: Study) -> str:
    """Say what was measured."""
    about = study.about
    return printable(
        f"{about['n']:,} images of each from {about['subject']} (step {about['step']:,}), seed {about['seed']}, "
        f"against {about['split_images']:,} test images of {about['dataset']}; features {about['feature_network']}; "
        f"on {about['machine']}"
    )


def write(path: Path, study: Study) -> None:
    """Write study.json. Raises OSError."""
    chosen = cheapest(study)
    content = {
        "format_version": FORMAT_VERSION,
        **vars(study),
        "rows": [{**vars(row), "figures": record.plain(row.figures)} for row in study.rows],
        "real": record.plain(study.real),
        **({} if chosen is None else {"cheapest": study.rows.index(chosen)}),
    }
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False).encode())


def read(path: Path) -> Study:
    """Read a study.json and check it. Raises UserError."""
    data = read_bounded(path, MAX_BYTES)
    try:
        raw = parse_json(data)
        about = raw["about"]
        record.check_protocol({**about, **{key: about[key] for key in (*COMMON, "subject", "machine")}})
        rows, varied = tuple(map(_checked, raw["rows"])), tuple(map(str, raw["varied"]))
        return Study(rows, varied, record.metrics(raw["real"]), about)
    except (DataError, ValueError, TypeError, KeyError):
        raise DataError(f"{path}: is no study.json of ddpm-eval -m (format {FORMAT_VERSION})") from None


def _checked(raw: dict[str, Any]) -> Row:
    """Check a row of a file. Raises ValueError, TypeError, KeyError."""
    costs = {"evaluations_per_image": raw["evaluations"], "seconds": {"sampling": raw["seconds"]}}
    record.check_protocol({**raw, **costs})
    return Row(**{**raw, "figures": record.metrics(raw["figures"])})
