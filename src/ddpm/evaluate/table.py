"""Evaluations as text, side by side, and beside them what real images reach. Needs no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ddpm.errors import printable
from ddpm.evaluate.record import Evaluation, Metric

REAL, UNGUIDED = "real images", "without guidance"
MAX_HEAD = 34  # characters of a subject's name
NOTES = 12  # at most
# What must be the same for metrics to be comparable.
SAME = ("dataset", "image_size", "split", "split_images", "feature_sha256", "n")

# Said where it is not so.
USUAL = {
    "guidance_scale": 1,
    "guidance_rescale": 0,
    "guidance_interval": None,
    "ema": True,
    "precision": "fp32",
}


class Row(NamedTuple):
    """How a metric is shown. better: -1 less, 1 more, 0 as close to real images as possible."""

    name: str
    title: str
    show: Callable[[Metric], str]
    better: int = 0


def _number(metric: Metric) -> str:
    """Format a value with its interval or error."""
    if metric.low is not None and metric.high is not None:
        return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
    if metric.error is not None:
        return f"{metric.value:.4f} ± {metric.error:.4f}"
    return f"{metric.value:.3f}"


def _with_floor(metric: Metric) -> str:
    return f"{metric.value:.3f}" + (f" (floor {metric.floor:.3f})" if metric.floor is not None else "")


def _share(metric: Metric) -> str:
    error = f" ± {100 * metric.error:.1f}" if metric.error is not None else ""
    return f"{100 * metric.value:.1f}{error} %"


def _named_share(metric: Metric) -> str:
    return _share(metric) + (f" ({_short(metric.text)})" if metric.text else "")


ROWS = (
    Row("fd", "Fréchet distance", _with_floor, -1),
    Row("fd_excess", "  less its bias", _number, -1),
    Row("class_fd_excess", "  within classes", _number, -1),
    Row("pixel_fd_excess", "  on pixels", _number, -1),
    Row("kid", "KID", _number, -1),
    Row("precision", "precision", _number, 1),
    Row("recall", "recall", _number, 1),
    Row("density", "density", _number),
    Row("coverage", "coverage", _number, 1),
    Row("confident", "classifier confidence", _share, 1),
    Row("right_class", "agreement with the label", _share, 1),
    Row("rarest_class", "rarest class", _named_share),
    Row("most_frequent_class", "most frequent class", _named_share),
    Row("cas", "classification accuracy score", _share, 1),
    Row("memorized", "memorized", _named_share, -1),
    Row("memorized_relative", "  relative to neighbours", _share, -1),
    Row("bits_per_dim", "bits per dimension", _number, -1),
    Row("eps_loss", "error in eps, test", _number, -1),
    Row("eps_loss_train", "error in eps, training", _number, -1),
)
ONLY_STORED = ("pixel_fd",)


def rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Return a head and a row for each metric that one of them has; real images last, where all have the same.

    Beside guided images stand those without guidance.
    """
    columns = list[tuple[str, Mapping[str, Metric]]]()
    for evaluation in evaluations:
        columns.append((_head(evaluation.subject), evaluation.figures))
        columns += [(UNGUIDED, evaluation.unguided)] if evaluation.unguided else []
    if not differing(evaluations):
        real = {name[5:]: each for name, each in evaluations[0].figures.items() if name.startswith("real_")}
        columns += [(REAL, real)] if real else []
    lines = [["", *(head for head, _ in columns)]]
    names = {name: None for each in evaluations for name in each.figures if not name.startswith("real_")}
    known = {*(row.name for row in ROWS), *ONLY_STORED}
    users = [Row(name, _short(name), _number) for name in names if name not in known]
    for row in (*ROWS, *users):
        cells = [row.show(figures[row.name]) if row.name in figures else "–" for _, figures in columns]
        if set(cells) != {"–"}:
            mark = {-1: " ↓", 0: "", 1: " ↑"}[row.better]
            lines.append([row.title + mark, *cells])
    return lines


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Format rows of cells as lines of text: the columns `left` to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def table(evaluations: Sequence[Evaluation]) -> str:
    """Format evaluations for a terminal: metrics in rows, evaluations in columns, then protocols and notes."""
    text = aligned(rows(evaluations))
    for key, values in differing(evaluations).items():
        text.append(f"not to be compared: {key} differs ({', '.join(values)})")
    for evaluation in evaluations:
        before = f"{_head(evaluation.subject)}: " if len(evaluations) > 1 else ""
        text.append(before + protocol(evaluation))
        notes = list(evaluation.notes)
        text += [f"{before}note: {note}" for note in notes[:NOTES]]
        text += [f"{before}and {len(notes) - NOTES} more notes"] if len(notes) > NOTES else []
    return "\n".join(printable(line).rstrip() for line in text)


def differing(evaluations: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Return the keys of SAME that differ, with their values."""
    found = {}
    for key in SAME:
        values = list(dict.fromkeys(_short(evaluation.protocol.get(key, "?")) for evaluation in evaluations))
        if len(values) > 1:
            found[key] = values
    return found


def protocol(evaluation: Evaluation) -> str:
    """Describe in one line what the metrics are of, and what they cost."""
    about: Mapping[str, object] = evaluation.protocol
    size, sampler, seconds = _short(about.get("image_size")), about.get("sampler"), about.get("seconds")
    text = f"{_count(about.get('n'))} images"
    if isinstance(sampler, dict):
        text += f" of {evaluation.subject} (step {_short(about.get('step'))})"
        text += f" by {_short(sampler.get('name'))}, {_short(about.get('num_steps'))} steps"
        text += f" ({_short(about.get('evaluations_per_image'))} evaluations each)"
        unusual = [
            f"{key}={_short(about[key])}"
            for key, usual in USUAL.items()
            if key in about and about[key] != usual
        ]
        text += "".join(f", {each.lower()}" for each in unusual)
    text += f", seed {_short(about.get('seed', '?'))}"
    text += f"; against {_count(about.get('split_images'))} test images of {_short(about.get('dataset'))} {size}×{size}"
    if "feature_network" in about:
        text += f"; features {_short(about['feature_network'])}, d = {_short(about.get('feature_dim'))}"
    if isinstance(seconds, dict):
        shown = [
            f"{part} {_short(seconds[part])} s"
            for part in ("sampling", "measuring", "likelihood", "cas", "unguided")
            if part in seconds
        ]
        text += f"; {', '.join(shown)} on {_short(about.get('machine'))}"
    return text


def _head(subject: str) -> str:
    subject = printable(subject)
    return subject if len(subject) <= MAX_HEAD else f"…{subject[1 - MAX_HEAD :]}"


def _count(value: object) -> str:
    return _short(f"{value:,}" if isinstance(value, int) else value)


def _short(value: object) -> str:
    """Shorten a value from a file that anybody may have written."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"
