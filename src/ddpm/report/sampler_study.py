"""A study of samplers: cost and quality of each setting, and the cheapest of the good ones. Needs no torch.

One row for each evaluation of the same checkpoint, seed and number of images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddpm.errors import printable
from ddpm.evaluate.record import Evaluation, Metric
from ddpm.evaluate.table import aligned
from ddpm.io.files import write_atomically

FORMAT_VERSION = 1
QUALITY = "fd_excess"  # the figure that decides; less is better
SHOWN = {key: key for key in ("precision", "recall", "coverage")} | {"confident": "classifier confidence"}
COMMON = ["checkpoint", "checkpoint_sha256", "step", "n", "seed"]
COMMON += ["dataset", "split_images", "feature_network", "feature_sha256"]


class Span(NamedTuple):
    """A figure and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """One setting. evaluations: of the network for an image; seconds: for 1,000 images."""

    sampler: Mapping[str, Any]  # its name and all keys
    guidance_scale: float
    num_steps: int
    evaluations: float
    seconds: float
    figures: Mapping[str, Metric]

    @property
    def excess(self) -> Span | None:
        return _excess(self.figures.get(QUALITY))

    @property
    def cost(self) -> tuple[float, float]:
        return self.evaluations, self.seconds


@dataclass(frozen=True)
class Study:
    """All rows, and what they have in common (`about`): subject, checkpoint_sha256, n, seed, dataset, machine, …"""

    rows: tuple[Row, ...]
    varied: tuple[str, ...]  # keys that differ among the rows, beside the sampler and its steps
    real: Mapping[str, Metric]  # of training images
    about: Mapping[str, Any]


def gather(evaluations: Sequence[Evaluation], varied: Sequence[str]) -> Study:
    """Make a study of evaluations of one checkpoint, one for each setting."""
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
    return Row(about["sampler"], about["guidance_scale"], *costs, figures)


def _excess(figure: Metric | None) -> Span | None:
    if figure is None:
        return None
    low, high = (figure.value if end is None else end for end in (figure.low, figure.high))
    return Span(figure.value, low, high)


def best(study: Study) -> Row | None:
    """The row of the lowest excess, or None where no row has one."""
    rows = [(row.excess.value, row.cost, row) for row in study.rows if row.excess]
    return min(rows, key=lambda each: each[:2])[2] if rows else None


def cheapest(study: Study) -> Row | None:
    """Of the rows whose excess lies within the interval of the best's: fewest evaluations, then fewest seconds."""
    top = best(study)
    if top is None or top.excess is None:
        return None
    good = [row for row in study.rows if row.excess and row.excess.value <= top.excess.high]
    return min(good, key=lambda row: row.cost)


def name(row: Row, varied: Sequence[str] = (), steps: bool = True) -> str:
    """Such as `ddim, 10 steps, eta 0.5`."""
    more = [f"{key.rpartition('.')[2]} {setting(row, key)}" for key in varied]
    return ", ".join([row.sampler["name"], *([f"{row.num_steps} steps"] if steps else []), *more])


def setting(row: Row, key: str) -> str:
    """The value of a key, in text."""
    value = row.sampler.get(key.removeprefix("sampler."), "–")
    value = row.guidance_scale if key == "guidance_scale" else value
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def verdict(study: Study) -> str:
    """The cheapest setting within the interval of the best, in one line."""
    top, chosen = best(study), cheapest(study)
    if top is None or chosen is None:
        return f"no setting has a {QUALITY}: {study.about['n']:,} images are too few, so none is named"
    text = f"cheapest within the interval of the best: {name(chosen, study.varied)}"
    if chosen is top:
        return f"{text}, the best itself ({top.excess})"
    return f"{text} ({chosen.excess}); best: {name(top, study.varied)} ({top.excess})"


def cells(study: Study) -> list[list[str]]:
    """A head and a line for each row, in the order they were typed; the last is what real images reach."""
    shown = [key for key in SHOWN if any(key in row.figures for row in study.rows)]

    def measured(figures: Mapping[str, Metric], prefix: str = "") -> list[str]:
        found = [figures.get(prefix + key) for key in shown]
        excess = str(_excess(figures.get(prefix + QUALITY)) or "–")
        return [excess, *("–" if figure is None else f"{figure.value:.3f}" for figure in found)]

    head = ["sampler", "steps", *(key.rpartition(".")[2] for key in study.varied)]
    head += ["evaluations", "s / 1,000 images"]
    lines = [[*head, "Fréchet excess", *(SHOWN[key] for key in shown)]]
    for row in study.rows:
        settings = [row.sampler["name"], str(row.num_steps), *(setting(row, key) for key in study.varied)]
        lines.append([*settings, f"{row.evaluations:g}", f"{row.seconds:.3g}", *measured(row.figures)])
    if f"real_{QUALITY}" in study.real:
        lines.append(["real images", *["–"] * (len(head) - 1), *measured(study.real, "real_")])
    return lines


def table(study: Study) -> str:
    """For a terminal."""
    lines = [line.rstrip() for line in aligned(cells(study))]
    return "\n".join([*lines, described(study), verdict(study)])


def described(study: Study) -> str:
    """What the figures are of."""
    about = study.about
    return printable(
        f"{about['n']:,} images of each from {about['subject']} (step {about['step']:,}), seed {about['seed']}, "
        f"against {about['split_images']:,} test images of {about['dataset']}; features {about['feature_network']}; "
        f"on {about['machine']}"
    )


def markdown(study: Study) -> str:
    """The table for a page, with what it is of."""
    head, *lines = cells(study)
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)]
    sentence = verdict(study)
    return "\n".join([*rows, "", f"{described(study)}.", "", f"{sentence[0].upper()}{sentence[1:]}."])


def write(path: Path, study: Study) -> None:
    """Write study.json. Raises OSError."""
    chosen = cheapest(study)
    content = {
        "format_version": FORMAT_VERSION,
        **vars(study),
        "rows": [{**vars(row), "figures": _plain(row.figures)} for row in study.rows],
        "real": _plain(study.real),
        **({} if chosen is None else {"cheapest": study.rows.index(chosen)}),
    }
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False).encode())


def read(path: Path) -> Study:
    """Read a study.json of one's own. Raises OSError, ValueError, KeyError, TypeError."""
    raw = json.loads(path.read_text())
    rows = tuple(Row(**{**row, "figures": _figures(row["figures"])}) for row in raw["rows"])
    return Study(rows, tuple(raw["varied"]), _figures(raw["real"]), raw["about"])


def _plain(figures: Mapping[str, Metric]) -> dict[str, Any]:
    return {key: figure.to_dict() for key, figure in figures.items()}


def _figures(raw: Mapping[str, Any]) -> dict[str, Metric]:
    return {key: Metric(**figure) for key, figure in raw.items()}
