"""YAML and JSON beside a run, written by hand or with intent: every reader refuses it in one line or reads it.

Files are made from a grammar: valid ones, in which keys and values are replaced, doubled, nested and left out, and
then spelled in the ways that YAML and JSON have.
"""

import copy
import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ddpm.cli import study_run
from ddpm.config.choices import choices
from ddpm.errors import UserError
from ddpm.evaluate import record, table
from ddpm.report import plot, runs, sampler_study, sampler_study_plot
from ddpm.report import table as report_table
from ddpm.runs import run_dir
from ddpm.sample import sampler_file
from ddpm.train import metrics_file, plots
from tests.faults import mutations
from tests.faults.cases import Case
from tests.faults.mutations import Target

SECOND = 1.0  # of this process, which a trial without a picture may take
MEMORY = 100 << 20  # bytes
RUN = Path(__file__).parents[1] / "compatibility" / "made" / "finished"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "mnist_cpu" / "0"


class Raw(str):
    """A value as it is spelled, in JSON or YAML."""


NUMBERS = (
    "0",
    "-0.0",
    "-1",
    "1e300",
    "-1e299",
    "1e-320",
    "1e999",
    "NaN",
    "-Infinity",
    "9" * 19,
    "9" * 20,
    "9" * 5000,
)
TEXTS = (
    "",
    "=1+1",
    "\x1b[31m",
    "\ud800",
    "漢 字",
    "x" * 5000,
    "null",
    "true",
    "1",
    "${oc.env:HOME}",
    "../../etc",
)
OTHERS = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [1, "a", None],
    {"a": 1},
    {"": {"": {}}},
    [0] * 3000,
    2**53,
    -(2**63),
    0.5,
)
OF_JSON = (
    *NUMBERS,
    "[" * 60_000,
    "[" * 500 + "]" * 500,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "'a'",
    "tru",
    "\0",
)
OF_YAML = (
    *(
        "0x" + "f" * 40_000,
        "0b_",
        "0x_",
        "0_",
        "+",
        "1:" * 200 + "1",
        "190:20:30.15",
        "." + "_" * 70,
        "-.inf",
        ".NaN",
    ),
    *(
        "9" * 60_000,
        "1e5",
        "1e-3",
        "1_000",
        "2001-12-14t21:59:43.10-05:00",
        "2024-02-31",
        "0000-00-00",
        "=",
        "<<",
    ),
    *(
        "!!python/name:os.system",
        "!!int x",
        "!!float ''",
        "!!timestamp 1",
        "!!binary =",
        "!!set {a, b}",
        "!!omap [a: 1]",
    ),
    *(
        "!!bool maybe",
        "!!null x",
        "!a!b c",
        "! x",
        "&a 1",
        "*a",
        "&a [*a]",
        "&b {x: *b}",
        "{<<: {a: 1}}",
        "[" * 30_000,
    ),
    *(
        "{a: " * 50 + "}" * 50,
        "? [a]\n: b",
        "|\n  a\n  b",
        '"\\UFFFFFFFF"',
        '"\\x00"',
        "'",
        '"',
        "%",
        "@",
        "`",
        "---",
        "...",
    ),
    *("- - - - - - - - - - a", "yes", "~", "", "{1: 2, 1: 3}", "\t", "\ufeff", "a: b: c", "# " + "x" * 1000),
)


def change(
    spell: Callable[[Any], str], raw: tuple[str, ...], good: bytes, other: bytes, draw: random.Random
) -> bytes:
    """Change one to three of a file's values or keys; sometimes bytes of it as well."""
    tree = yaml.safe_load(good) if spell is as_yaml else json.loads(good)
    for _ in range(draw.choice((1, 1, 2, 3))):
        tree = _edited(tree, raw, draw)
    data = spell(tree).encode(errors="surrogatepass")
    return mutations.mutate(data, other, draw) if draw.random() < 0.1 else data


def change_lines(good: bytes, other: bytes, draw: random.Random) -> bytes:
    """Change one to three lines of JSON."""
    lines = good.splitlines(keepends=True)
    for at in draw.sample(range(len(lines)), draw.choice((1, 1, 2, 3))):
        lines[at] = change(as_json, OF_JSON, lines[at], other, draw) + draw.choice(
            (b"\n", b"\n", b"\n", b"\r\n", b"")
        )
    return b"".join(lines)


def _edited(tree: Any, raw: tuple[str, ...], draw: random.Random) -> Any:
    if isinstance(tree, dict | list) and tree and draw.random() < 0.9:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        match draw.choice(("value", "value", "value", "value", "key", "gone", "more", "nested")):
            case "value":
                tree[key] = _edited(tree[key], raw, draw)
            case "gone":
                tree.pop(key)
            case "nested":
                tree[key] = draw.choice(([tree[key]], {"a": tree[key]}))
            case "key" if isinstance(tree, dict):
                tree[draw.choice((*TEXTS, key.upper(), key + " "))] = tree.pop(key)
            case _ if isinstance(tree, dict):
                tree[draw.choice(TEXTS)] = _value(raw, draw)
            case _:
                tree += [tree[key]] * draw.choice((1, 300))
        return tree
    return _value(raw, draw)


def _value(raw: tuple[str, ...], draw: random.Random) -> Any:
    return draw.choice(
        (Raw(draw.choice(raw)), Raw(draw.choice(raw)), draw.choice(TEXTS), copy.deepcopy(draw.choice(OTHERS)))
    )


def as_json(tree: Any) -> str:
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {as_json(value)}" for key, value in tree.items()) + "}"
    return f"[{', '.join(map(as_json, tree))}]" if isinstance(tree, list) else json.dumps(tree)


def as_yaml(tree: Any, indent: str = "") -> str:
    if not isinstance(tree, dict) or not tree:
        return tree if isinstance(tree, Raw) else as_json(tree)
    return "\n" * bool(indent) + "".join(
        f"{indent}{key if key.isalnum() or '_' in key else json.dumps(key)}: {as_yaml(value, indent + '  ')}\n"
        for key, value in tree.items()
    )


# Readers: each writes the file where it belongs and reads it as the commands do


def in_time(read: mutations.Read) -> mutations.Read:
    def timed(data: bytes, folder: Path) -> None:
        began = time.process_time()
        try:
            read(data, folder)
        finally:
            took = time.process_time() - began
            assert took < SECOND, f"{took:.2f} s"

    return timed


def reported(run: Path) -> runs.RunRow:
    """Report a run beside a good one. Returns its row; a reason counts as a refusal."""
    good = run.with_name("good")
    if not good.exists():
        shutil.copytree(RUN, good)
    rows = {row.name: row for row in runs.read_all([run.parent], run_dir.is_running)}
    assert rows.keys() == {"good", run.name} and rows["good"].reason == "" and rows["good"].status == "done"
    printed = report_table.table(rows.values(), "val_eps_mse").splitlines()
    written = report_table.csv_text(rows.values(), "val_eps_mse")
    assert max(map(len, printed)) < 1000 and len(written.splitlines()) == len(printed) == len(rows) + 1
    row = rows[run.name]
    assert not row.reason.startswith("cannot be read"), row.reason  # by what nobody thought of
    if row.reason:
        raise UserError(row.reason)
    return row


def _placed(data: bytes, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def read_config(data: bytes, folder: Path) -> None:
    reported(_placed(data, folder / "configs" / "run" / "config.yaml").parent)


def read_result(data: bytes, folder: Path) -> None:
    run = _placed(data, folder / "results" / "run" / "result.json").parent
    shutil.copyfile(RUN / "config.yaml", run / "config.yaml")
    run_dir.read_json(run / "result.json").get("launch")
    if reported(run).status != "done":
        raise UserError("stopped: a result that makes no sense counts as none")


def read_failed(data: bytes, folder: Path) -> None:
    with suppress(UserError):  # it is the reason itself
        reported(_placed(data, folder / "failed" / "run" / "failed.txt").parent)


def read_metrics(data: bytes, folder: Path) -> None:
    """What is left when a run goes on is what the report shows and what can be plotted."""
    run = _placed(data, folder / "metrics" / "run" / "metrics.jsonl").parent
    whole = list[dict[str, float]]()
    with suppress(ValueError):
        whole.extend(metrics_file.read(run / "metrics.jsonl"))
    metrics_file.lowest(run / "metrics.jsonl", "val_loss")
    shutil.copyfile(run / "metrics.jsonl", folder / "cut.jsonl")
    metrics_file.cut(folder / "cut.jsonl", 10**12)
    assert list(metrics_file.read(folder / "cut.jsonl"))[: len(whole)] == whole
    reported(run)


def read_sampler(data: bytes, folder: Path) -> None:
    found = sampler_file.read(_placed(data, folder / sampler_file.NAME))
    assert found is not None and found.name


def read_evaluation(data: bytes, folder: Path) -> None:
    kept = json.loads((RESULTS / "evaluation.json").read_text())["protocol"]
    identity = {"sampler": kept["sampler"]}
    _placed(data, study_run.evaluation_file(folder, identity))
    study_run.read_kept(folder, identity)
    found = record.read(str(_placed(data, folder / record.FILE)))
    printed = table.table([found, record.read(str(RESULTS))]).splitlines()
    assert max(map(len, printed)) < 10_000


def read_study(data: bytes, folder: Path) -> None:
    found = sampler_study.read(_placed(data, folder / "study.json"))
    assert len(sampler_study.markdown(found)) < 1_000_000


# Pictures take longer


def draw_metrics(data: bytes, folder: Path) -> None:
    file = _placed(data, folder / "drawn" / "run" / "metrics.jsonl")
    metrics_file.cut(file, 10**12)
    plots.plot_loss(file, folder / "loss.png")
    rows = runs.read_all([file.parents[1]], run_dir.is_running)
    plot.draw(rows, "val_eps_mse", folder / "report.png")


def draw_config(data: bytes, folder: Path) -> None:
    run = _placed(data, folder / "drawn_configs" / "run" / "config.yaml").parent
    shutil.copyfile(RUN / "metrics.jsonl", run / "metrics.jsonl")
    reported(run)
    plot.draw(runs.read_all([run.parent], run_dir.is_running), "val_eps_mse", folder / "report.png")


def draw_study(data: bytes, folder: Path) -> None:
    found = sampler_study.read(_placed(data, folder / "study.json"))
    sampler_study_plot.draw(found, folder / "study.png")


def yaml_targets() -> list[Target]:
    edited = partial(change, as_yaml, OF_YAML)
    samplers = [yaml.safe_dump(content).encode() for content in choices("sampler").values()]
    config = [(RUN / "config.yaml").read_bytes()]
    return [
        Target(samplers, in_time(read_sampler), change=edited),
        Target(config, in_time(read_config), change=edited),
        Target(samplers, in_time(read_sampler)),
    ]


def json_targets() -> list[Target]:
    edited = partial(change, as_json, OF_JSON)

    def valid(file: Path) -> list[bytes]:
        return [file.read_bytes()]

    return [
        Target(valid(RESULTS / "evaluation.json"), in_time(read_evaluation), change=edited),
        Target(valid(RESULTS / "study.json"), in_time(read_study), change=edited),
        Target(valid(RUN / "metrics.jsonl"), in_time(read_metrics), change=change_lines),
        Target(valid(RUN / "result.json"), in_time(read_result), change=edited),
        Target(valid(RUN / "result.json"), in_time(read_failed)),
    ]


def drawn_targets() -> list[Target]:
    metrics = (RUN / "metrics.jsonl").read_bytes()
    return [
        Target([metrics], draw_metrics, change=change_lines),
        Target([(RUN / "config.yaml").read_bytes()], draw_config, change=partial(change, as_yaml, OF_YAML)),
        Target([(RESULTS / "study.json").read_bytes()], draw_study, change=partial(change, as_json, OF_JSON)),
    ]


def _case(form: str, make_targets: Callable[[], list[Target]], short: int, long: int) -> Case:
    return Case(
        name=f"{form} beside a run",
        promise=f"{form} beside a run from anywhere is refused in one line or read; no crash, no hang, little memory.",
        short=short,
        long=long,
        run=partial(mutations.try_all, make_targets, memory=MEMORY),
    )


CASES = (
    _case("YAML", yaml_targets, 300, 6_000),
    _case("JSON", json_targets, 300, 6_000),
    _case("JSON and YAML drawn", drawn_targets, 12, 600),
)
