"""ddpm-report on a half-finished sweep of real runs, and on folders made to hurt it."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from ddpm.checkpoint import locate
from ddpm.cli import report as command
from ddpm.cli import train as train_command
from ddpm.cli.report import _with_folders, report
from ddpm.config import hydra
from ddpm.config.choices import Component, choices
from ddpm.config.schema import ReportConfig, TrainConfig, check
from ddpm.errors import UserError
from ddpm.io import figures
from ddpm.report import contact_sheet, plot, runs
from ddpm.report import table as report_table
from ddpm.report.runs import Point, RunRow
from ddpm.runs import run_dir
from ddpm.sample.model import load
from ddpm.train import metrics_file, plots
from tests.conftest import Command, run_script

pytestmark = pytest.mark.xdist_group("report")  # one worker, which makes its fixtures once
QUICK = [
    "model.channels=[16,32]",
    "trainer.batch_size=16",
    "trainer.log_every=2",
    "trainer.validate_every=4",
    "trainer.checkpoint_every=4",
    "trainer.sample_every=0",
]


def train(folder: Path, *overrides: str) -> None:
    """What ddpm-train does once it has read its command line."""
    typed = hydra.read_overrides([*QUICK, *overrides, f"run_dir={folder}"])
    train_command.train(check(TrainConfig, hydra.compose("train", typed)))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """linear and cosine done; of folder's, in colour, too; stopped, failed, broken, running, and one only begun."""
    home = tmp_path_factory.mktemp("home")
    pictures, sweep = home / "pictures", home / "sweep"
    pictures.mkdir()
    noise = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
    of_folder = ["dataset=folder", f"dataset.path={pictures}", "dataset.image_size=16", "trainer.max_steps=4"]
    cosine = ["schedule=cosine", "schedule.s=0.02", "optimizer.lr=1e-2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm.train.validation.EVALUATIONS", 34)
        train(sweep / "linear", "trainer.max_steps=8", "optimizer.lr=1e-3")
        train(sweep / "cosine", "trainer.max_steps=8", *cosine)
        train(sweep / "deeper" / "colour", *of_folder, "model=unet_tiny")
    stopped = shutil.copytree(sweep / "linear", sweep / "stopped")
    (stopped / "result.json").unlink()
    (stopped / "checkpoints" / "step_0000008.safetensors").unlink()
    (stopped / "checkpoints" / "best.safetensors").unlink()
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text(
        "".join(lines[:3]) + '{"step": 8, "lo'
    )  # the line is being written
    broken = shutil.copytree(stopped, sweep / "broken")
    for file in (broken / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    (broken / "metrics.jsonl").write_text("".join(lines[:2]) + "junk\n" + "".join(lines[2:]))
    (sweep / "failed").mkdir()
    (sweep / "failed" / "failed.txt").write_text("schedule=x: it \x1b[31mhurts\nand more\n")
    running = shutil.copytree(stopped, sweep / "running")
    with FileLock(running / ".lock"):
        yield sweep


def rows_of(sweep: Path) -> dict[str, RunRow]:
    return {row.name: row for row in runs.read_all([sweep], run_dir.is_running)}


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line[-1] == "}"]


def test_every_run_is_found_and_said_what_it_is(sweep: Path) -> None:
    rows = rows_of(sweep)
    assert {name: (row.status, row.step) for name, row in rows.items()} == {
        "linear": ("done", 8),
        "cosine": ("done", 8),
        "deeper/colour": ("done", 4),
        "stopped": ("stopped", 6),
        "broken": ("broken", 4),
        "failed": ("failed", 0),
        "running": ("running", 6),
    }
    assert rows["failed"].reason == "schedule=x: it \\x1b[31mhurts"
    assert "step_0000004.safetensors is broken" in rows["broken"].reason
    assert "line 3 makes no sense" in rows["broken"].reason and len(rows["broken"].loss) == 2
    assert rows["broken"].settings["schedule"] == "linear"  # from config.yaml
    assert rows["linear"].max_steps == 8 and rows["linear"].reason == rows["stopped"].reason == ""


def test_numbers_are_those_in_the_files(sweep: Path) -> None:
    row, lines = rows_of(sweep)["linear"], records(sweep / "linear")
    validated = [line for line in lines if "val_eps_mse" in line]
    best = min(validated, key=lambda line: line["val_eps_mse"])
    assert row.best("val_eps_mse") == Point(int(best["step"]), best["val_eps_mse"], best["val_eps_mse_error"])
    last = row.last("val_loss")
    assert last is not None and last.value == validated[-1]["val_loss"] and len(validated) == 2
    assert row.images_per_second == pytest.approx(np.median([line["images_per_second"] for line in lines]))
    assert row.loss == [(line["step"], line["loss"]) for line in lines]
    assert row.seconds == json.loads((sweep / "linear" / "result.json").read_text())["seconds"]


def test_only_settings_that_say_something_are_columns(sweep: Path) -> None:
    """schedule.s is cosine's alone, and linear's schedule.beta_end is but the other side of schedule=linear."""
    rows = rows_of(sweep)
    digits = [rows[name] for name in ("linear", "cosine", "stopped")]
    assert report_table.varying(digits) == ["schedule", "optimizer.lr"]
    other = dataclasses.replace(
        rows["cosine"], settings={**rows["cosine"].settings, "schedule.s": 0.03, "schedule.num_timesteps": 7}
    )
    assert report_table.varying([*digits, other])[:3] == ["schedule", "schedule.num_timesteps", "schedule.s"]
    assert report_table.varying([rows["linear"]]) == []


def test_report_writes_table_csv_and_pictures(sweep: Path, tmp_path: Path) -> None:
    result = run_script("report", str(sweep), "n=3", "out=made", "device=cpu", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("made/")] == [
        f"made/{name}" for name in ("report.csv", "report.png", "contact.png")
    ]
    assert lines[-2].endswith("and are only in table and CSV")
    assert lines[-1] == f"best: ddpm-sample ckpt={sweep / 'cosine'}"
    assert "\x1b" not in result.stdout and "schedule=x: it \\x1b[31mhurts" in result.stdout
    assert any("no images of broken: step_0000004.safetensors" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "contact.png",
        "report.csv",
        "report.png",
    ]

    with open(tmp_path / "made" / "report.csv", newline="") as file:
        table = list(csv.DictReader(file))
    figures = [float(line["val_eps_mse_best"] or "inf") for line in table]
    assert figures == sorted(figures) and len(table) == 7
    by_name = {line["run"]: line for line in table}
    assert by_name["cosine"]["schedule"] == "cosine" and by_name["cosine"]["optimizer.lr"] == "0.01"
    best = min(line["val_eps_mse"] for line in records(sweep / "cosine") if "val_eps_mse" in line)
    assert float(by_name["cosine"]["val_eps_mse_best"]) == best
    assert float(by_name["cosine"]["val_loss_last"]) == records(sweep / "cosine")[-1]["val_loss"]
    assert by_name["failed"]["status"] == "failed" and by_name["failed"]["val_eps_mse_best"] == ""
    assert (by_name["stopped"]["step"], by_name["stopped"]["max_steps"]) == ("6", "8")
    assert int(by_name["linear"]["parameters"]) > 10_000
    assert by_name["linear"]["path"] == str(sweep / "linear")

    with Image.open(tmp_path / "made" / "report.png") as picture:
        assert 1000 < picture.width < 1600 and 600 < picture.height < 1600
    check_contact(sweep, tmp_path, [line["run"] for line in table if line["run"] not in ("failed", "broken")])


def check_contact(sweep: Path, tmp_path: Path, order: list[str]) -> None:
    """Every cell is an image that ddpm-sample draws, each of its pixels a square; labels are there and differ."""
    sheet = np.asarray(Image.open(tmp_path / "made" / "contact.png")).astype(int)
    height, width = 4 * contact_sheet.LINE + contact_sheet.GAP, 64 + contact_sheet.GAP
    assert sheet.shape == (
        contact_sheet.LINE + 3 * contact_sheet.GAP + 5 * height,
        contact_sheet.LABEL + 3 * width + contact_sheet.GAP,
        3,
    )
    labels = []
    for name in ("cosine", "deeper/colour"):
        result = run_script(
            "sample", f"ckpt={sweep / name}", "n=3", "save=[npz]", f"out={name}", "device=cpu", cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        drawn = np.load(tmp_path / name / "samples.npz")["images"].astype(int)
        drawn = drawn[..., None].repeat(3, axis=-1) if drawn.ndim == 3 else drawn
        top = contact_sheet.LINE + 3 * contact_sheet.GAP + order.index(name) * height
        for i, image in enumerate(drawn):
            left, factor = contact_sheet.LABEL + i * width, 64 // len(image)
            cell = sheet[top : top + 64, left : left + 64]
            assert abs(cell - image.repeat(factor, axis=0).repeat(factor, axis=1)).max() <= 1
        labels.append(sheet[top : top + 64, : contact_sheet.LABEL])
        assert 200 < (labels[-1].min(axis=2) < 100).sum() < 0.2 * labels[-1][..., 0].size
    assert (labels[0] != labels[1]).any()


@pytest.mark.slow
def test_report_needs_no_torch_for_tables_and_a_sampler_may_be_typed(sweep: Path, tmp_path: Path) -> None:
    result = run_script(
        "report",
        f"folder={sweep}",
        "contact=false",
        "out=made",
        cwd=tmp_path,
        real=True,
        PYTHONPROFILEIMPORTTIME="1",
    )
    assert result.returncode == 0 and "| torch\n" not in result.stderr
    assert not (tmp_path / "made" / "contact.png").exists()
    arguments = [str(sweep / "linear"), str(sweep / "cosine"), "n=2", "sampler=ddim", "sampler.num_steps=3"]
    result = run_script("report", *arguments, "figure=val_loss", "device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (made,) = (tmp_path / "outputs" / "report").glob("*/*")
    assert {path.name for path in made.iterdir()} == {"contact.png", "report.csv", "report.png"}
    assert "val_loss" in result.stdout.splitlines()[0]
    values = [min(r["val_loss"] for r in records(sweep / n) if "val_loss" in r) for n in ("linear", "cosine")]
    first = result.stdout.splitlines()[1].split()
    assert first[0] == ("linear", "cosine")[int(np.argmin(values))]
    assert not (sweep / "linear" / "report.csv").exists()


def test_a_report_is_replaced_as_a_whole_and_nothing_else(sweep: Path, tmp_path: Path) -> None:
    def report(*typed: str) -> None:
        overrides = hydra.read_overrides([f"folder=[{sweep}]", "contact=false", *typed])
        command.report(check(ReportConfig, hydra.compose("report", overrides)))

    out = tmp_path / "out"
    report(f"out={out}")
    (out / "contact.png").write_text("of an earlier report")
    report(f"out={out}")
    assert {path.name for path in out.iterdir()} == {"report.csv", "report.png"}
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt, which is not of a report"):
        report(f"out={out}")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("report.csv", "report.png", "evaluation.json"):
        (theirs / name).write_text("somebody else's")
        with pytest.raises(UserError, match=f"holds {name}"):
            report(f"out={theirs}")
        assert (theirs / name).read_text() == "somebody else's"
        (theirs / name).unlink()
    runs = tmp_path / "runs"
    shutil.copytree(sweep, runs)
    (runs / "report.csv").write_text("my own list")
    with pytest.raises(UserError, match=r"holds report\.csv"):
        report(f"folder=[{runs}]", "out=null")
    assert (runs / "report.csv").read_text() == "my own list"


def test_typed_sampler_is_the_one_that_draws(sweep: Path) -> None:
    params = {key: value for key, value in choices("sampler")["ddim"].items() if key != "name"}
    run = sweep / "linear"
    own, step = contact_sheet.drawn(run, 2, 0, None, torch.device("cpu"))
    few, _ = contact_sheet.drawn(
        run, 2, 0, Component("ddim", {**params, "num_steps": 2}), torch.device("cpu")
    )
    assert step == 8 and own.shape == (2, 8, 8, 1) and (own != few).any()
    model, _ = load(run / "checkpoints" / "step_0000008.safetensors", torch.device("cpu"))
    many = contact_sheet.fitted(
        Component("ddim", {**params, "num_steps": 5000}), model
    )  # ddpm-sample would refuse it
    assert many.params["num_steps"] == 1000
    assert (contact_sheet.drawn(run, 2, 1, None, torch.device("cpu"))[0] != own).any()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name a folder of runs: ddpm-report outputs/multirun/"),
        (["nowhere"], "folder=nowhere: does not exist"),
        (["empty"], "no run in empty: a run's folder holds"),
        (["empty/file"], "folder=empty/file: is not a folder"),
        (["empty", "figure=fid"], "figure=fid: must be one of val_eps_mse, val_loss"),
        (["empty", "n=65"], "n=65: must be a number from 1 to 64"),
        (["empty", "n=0"], "n=0: must be"),
        (["empty", "device=tpu"], "device=tpu: must be auto"),
        (["empty", "sampler.num_steps=5"], "name the sampler, too (sampler=ddim sampler.num_steps=5)"),
        (["empty", "sampler=dimm"], "did you mean 'ddim'?"),
        (["empty", "-m"], "has no multirun"),
        (["empty", "folders=a"], "unknown key 'folders'"),
    ],
)
def test_mistake_is_one_line(command: Command, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    result = command("report", *arguments)
    assert result.returncode == 2 and result.stdout == "" and expected in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("ddpm-report: ")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "file"]


def test_folders_are_typed_bare_or_by_key() -> None:
    assert _with_folders(["a", "n=3", "b/lr=1,schedule=x"]) == ["n=3", "folder=['a','b/lr=1,schedule=x']"]
    assert _with_folders(["folder=[a,b]", "./x=1"]) == ["folder=['a','b','./x=1']"]
    assert _with_folders(["folder=it's"]) == ["folder=['it\\'s']"]
    assert _with_folders(["--help", "n=3"]) == ["--help", "n=3"]
    for typed in (["a'b\\", "c,d e"], ["folder=ü#~(1"]):
        composed = hydra.compose("report", hydra.read_overrides(_with_folders(typed)))
        assert composed["folder"] == [word.removeprefix("folder=") for word in typed]


def test_hostile_folders_are_listed_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "MAX_BYTES", 1 << 20)
    good = '{"step": 1, "loss": 0.5}\n'
    for name, text in {
        "long": good * 60_000,
        "line": '{"step": 1, "loss": ' + "1" * 100_000 + "}\n",
        "deep": "[" * 9999 + "\n",
        "digits": '{"step": 1, "loss": 1' + "0" * 400 + "}\n",
        "nan": '{"step": 1, "loss": NaN}\n',
        "text": '{"step": 1, "loss": "0.5"}\n',
        "half": '{"step": 1, "loss": 0.5, "val_eps_mse": 0.1}\n',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "metrics.jsonl")
    os.mkfifo(tmp_path / "fifo" / ".lock")
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for name, text in {
        "bomb": bomb + "trainer: *i\n",
        "big": "#" * (1 << 17),
        "nested": "[" * 60_000,
        "code": "a: !!python/object/apply:os.system ['touch ran']",
        "keys": "schedule: linear",
        "list": "[1, 2]",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    odd = tmp_path / "a\x1b[31m\nb"
    (odd / "checkpoints").mkdir(parents=True)
    (odd / "checkpoints" / "step_0000001.safetensors").write_bytes(b"\xff" * 99)
    (odd / "samples" / "inner").mkdir(parents=True)
    (odd / "samples" / "inner" / "config.yaml").touch()  # a run's own folders are not searched
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "again").symlink_to(tmp_path)
    (tmp_path / "loop" / "metrics.jsonl").symlink_to("metrics.jsonl")
    (tmp_path / "loop" / "checkpoints").symlink_to("checkpoints")

    rows = rows_of(tmp_path)
    expected = {
        "long": "more than the 1048576 allowed",
        "fifo": "not a regular file",
        "bomb": "tags, anchors, aliases or deep nesting",
        "big": "config.yaml",
        "nested": "config.yaml: it is no YAML",
        "code": "tags, anchors, aliases or deep nesting",
        "keys": "config.yaml: ",
        "list": "it is no set of keys",
        "loop": "metrics.jsonl: Too many levels of symbolic links",
    } | dict.fromkeys(
        ("line", "deep", "digits", "nan", "text", "half"), "metrics.jsonl: line 1 makes no sense"
    )
    assert rows.keys() == {*expected, "a\\x1b[31m\\nb"}
    for name, words in expected.items():
        assert words in rows[name].reason, (name, rows[name].reason)
    assert {row.status for row in rows.values()} == {"stopped", "broken"}
    printed = report_table.table(rows.values(), "val_eps_mse")
    assert len(printed.splitlines()) == len(rows) + 1 and printed.replace("\n", "").isprintable()
    assert len(report_table.csv_text(rows.values(), "val_eps_mse").splitlines()) == len(rows) + 1


def test_a_name_is_no_formula_in_csv(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "+1+1", "-2+3", "@SUM(1)", "-5", "a=1", "\t=1"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    rows = [
        dataclasses.replace(row, settings={"dataset.path": row.name, "schedule.start": -5.5 - number})
        for number, row in enumerate(runs.read_all([tmp_path], run_dir.is_running))
    ]
    lines = list(csv.DictReader(report_table.csv_text(rows, "val_eps_mse").splitlines()))
    expected = {"'=HYPERLINK(1)", "'+1+1", "'-2+3", "'@SUM(1)", "-5", "a=1", "\\t=1"}
    assert {line["run"] for line in lines} == {line["dataset.path"] for line in lines} == expected
    assert sorted(float(line["schedule.start"]) for line in lines)[-1] == -5.5  # a number stays one


def test_what_nobody_thought_of_costs_one_row_or_one_picture(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = runs.read

    def read(path: Path, *others: Any) -> RunRow:
        if path.name == "cosine":
            raise ZeroDivisionError("of a\nstrange kind")
        return original(path, *others)

    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(runs, "read", read)
    monkeypatch.setattr(plot, "draw", fail)
    typed = hydra.read_overrides([f"folder=[{sweep}]", f"out={tmp_path}", "contact=false"])
    report(check(ReportConfig, hydra.compose("report", typed)))
    printed = capsys.readouterr().out
    assert "cosine: cannot be read: ZeroDivisionError: of a strange kind" in printed
    assert f"warning: {tmp_path / 'report.png'} could not be drawn: no font\n" in printed
    assert len((tmp_path / "report.csv").read_text().splitlines()) == 8


def test_pictures_that_fail_cost_a_training_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("latex was not found")

    monkeypatch.setattr(figures, "save", fail)
    monkeypatch.setattr(plots, "save_png", fail)
    train(tmp_path / "run", "trainer.max_steps=2")
    assert run_dir.read_result(tmp_path / "run") is not None
    log = (tmp_path / "run" / "train.log").read_text()
    for name in ("forward", "loss", "schedule"):
        warning = f"warning: {tmp_path / 'run' / name}.png could not be drawn: latex was not found\n"
        assert log.count(warning) == 1 and not (tmp_path / "run" / f"{name}.png").exists()
    assert "done in" in log


def test_results_that_make_no_sense_do_not_count(sweep: Path, tmp_path: Path) -> None:
    run = shutil.copytree(sweep / "linear", tmp_path / "run")
    whole = json.loads((run / "result.json").read_text())
    for change in (
        {"step": 1e999},
        {"seconds": None},
        {"val_loss": "x"},
        {"step": float("nan")},
        {"val_loss": "1.5"},
        {"step": True},
        {"step": 1e299},
        {"step": -1},
        {"seconds": 1e299},
        {"seconds": -1},
    ):
        (run / "result.json").write_text(json.dumps({**whole, **change}))
        assert runs.read(run, "run", run_dir.is_running).status == "stopped", change
    (run / "result.json").write_text(json.dumps(whole))
    (run / "failed.txt").write_text("an earlier try")
    assert runs.read(run, "run", lambda path: True).status == "done"


def test_a_folder_that_cannot_be_read_is_a_row(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        def refused(path: Any) -> Any:
            if Path(path).name == "gone":
                raise FileNotFoundError(2, "No such file or directory", str(path))
            if Path(path).name in ("shut", "checkpoints"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return refused

    shutil.copytree(sweep / "linear", tmp_path / "run")
    (tmp_path / "shut" / "run").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    rows = rows_of(tmp_path)
    assert rows.keys() == {"run", "shut"}
    assert (rows["shut"].status, rows["run"].status) == ("broken", "done")
    assert all("Permission denied" in row.reason for row in rows.values())
    with pytest.raises(PermissionError):  # and is not taken for one without checkpoints
        locate.of_run(tmp_path / "run")


def test_runs_that_change_or_go_while_they_are_read(sweep: Path, tmp_path: Path) -> None:
    run = shutil.copytree(sweep / "linear", tmp_path / "run")
    found = runs.find(tmp_path)
    (run / "checkpoints" / "step_0000008.safetensors").write_bytes(b"")
    row = runs.read(found[0], "run", run_dir.is_running)
    assert row.status == "done" and row.settings["optimizer.lr"] == 1e-3
    assert "step_0000008.safetensors is no checkpoint" in row.reason
    (run / "metrics.jsonl").unlink()
    row = runs.read(found[0], "run", run_dir.is_running)
    assert [point.step for point in row.figures["val_eps_mse"]] == [8]  # from the header of `best`
    shutil.rmtree(run)
    row = runs.read(found[0], "run", run_dir.is_running)
    assert (row.status, row.step, row.settings, row.loss) == ("stopped", 0, {}, [])


def test_asking_whether_a_run_is_running_disturbs_nobody(tmp_path: Path) -> None:
    assert not run_dir.is_running(tmp_path) and list(tmp_path.iterdir()) == []
    held = run_dir.claim(str(tmp_path), overwrite=False, fresh=True)
    assert run_dir.is_running(tmp_path)
    held.release()
    assert not run_dir.is_running(tmp_path)
    (tmp_path / ".lock").touch()  # as a run leaves it
    code = (
        f"import fcntl, time; file = open({str(tmp_path / '.lock')!r}); fcntl.flock(file, fcntl.LOCK_SH)\n"
        "print(flush=True); time.sleep(0.15); fcntl.flock(file, fcntl.LOCK_UN)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as asking:
        assert asking.stdout is not None and asking.stdout.readline()
        assert not run_dir.is_running(tmp_path)  # two who ask are not taken for a training
        run_dir.claim(str(tmp_path), overwrite=False, fresh=True).release()  # which waits for a moment


def made_up(number: int, **settings: object) -> RunRow:
    value = 0.1 + (number * 7 % 11) / 10
    figures = {"val_eps_mse": [Point(step, value + 100 / step, 0.01) for step in range(100, 1001, 100)]}
    losses = [(step, value + 300 / step) for step in range(1, 1001)]
    return RunRow(
        Path(f"r{number}"),
        f"r{number}",
        "done",
        "",
        settings,
        1000,
        1000,
        9.0,
        5,
        3.0,
        losses,
        {**figures, "val_loss": []},
    )


@pytest.mark.parametrize("count", [1, 2, 9, 40, 130])
def test_pictures_of_any_number_of_runs_are_of_a_sane_size(tmp_path: Path, count: int) -> None:
    rows = [
        made_up(
            i, seed=i % 2, schedule=("linear", "a $b$ \\c")[i // 2 % 2], **{"optimizer.lr": 10.0 ** -(i % 5)}
        )
        for i in range(count)
    ]
    plot.draw(runs.ranked(rows, "val_eps_mse"), "val_eps_mse", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] == 1320 and 500 < pixels.shape[0] < 1900 and (pixels < 128).mean() > 0.005
    assert (pixels[0] == 255).all() and (pixels[-1] == 255).all()  # nothing is cut off


def test_pictures_stand_any_number_and_any_letter(tmp_path: Path) -> None:
    """What a file may hold and metrics.read lets through; a warning would be an error here."""
    huge = [(0.1, 0.0), (1e299, 1e299), (-1e299, 0.5), (0.0, -1.0), (1e-299, 0.0)]
    for number, (value, error) in enumerate(huge):
        run = tmp_path / f"ران 漢字 $x^{number}"
        run.mkdir()
        record = {"step": 10**12 - number, "loss": value, **dict.fromkeys(metrics_file.VALIDATED, abs(error))}
        record |= {"val_eps_mse": value, "val_eps_mse_error": error, "images_per_second": value}
        (run / "metrics.jsonl").write_text(
            json.dumps({**record, "step": 0}) + "\n" + json.dumps(record) + "\n"
        )
    rows = runs.ranked(runs.read_all([tmp_path], run_dir.is_running), "val_eps_mse")
    assert [row.last("val_eps_mse") is not None and row.reason == "" for row in rows] == [True] * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.draw(rows, "val_eps_mse", tmp_path / "a.png")
        settings = [
            {"optimizer.lr": lr, "model.channels": [number]} for number, lr in enumerate((0.0, 1e300, 1e-300))
        ]
        rows = [dataclasses.replace(row, settings=s) for row, s in zip(rows[:3], settings, strict=True)]
        plot.draw(rows, "val_eps_mse", tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_long_names_and_values_are_shortened_but_stay_apart() -> None:
    long = {"dataset.path": "/data/" + "x" * 200 + "/last", "model.channels": [16, 32]}
    rows = [made_up(1, **long), made_up(2, **{**long, "dataset.path": "/b", "model.channels": [8, 16]})]
    rows = [dataclasses.replace(row, name="n" * 90 + row.name + "n" * 90) for row in rows]
    printed = report_table.table(rows, "val_eps_mse")
    assert "/data/" in printed and "/last" in printed and "x" * 100 not in printed and "[16,32]" in printed
    names = [line.split()[-1] for line in printed.splitlines()[1:]]
    assert names[0] != names[1] and "nr1n" in printed  # both are 48 alike at either end, so they are whole
    written = report_table.csv_text(rows, "val_eps_mse")
    assert "x" * 200 in written and '"[16, 32]"' in written
    assert report_table.heads(["optimizer.lr", "schedule.s", "a.name", "b.name"]) == {
        "optimizer.lr": "lr",
        "schedule.s": "schedule.s",
        "a.name": "a.name",
        "b.name": "b.name",
    }


def test_sheet_fits_images_of_any_size_and_channels() -> None:
    noise = np.random.default_rng(1)
    shapes = [(8, 1), (28, 1), (32, 3), (5, 2), (9, 4), (300, 3)]
    images = [noise.integers(0, 256, (2, size, size, channels), dtype=np.uint8) for size, channels in shapes]
    many = contact_sheet.Strip("a", "b", "c", np.zeros((64, 32, 32, 1), np.uint8))
    height, width, _ = contact_sheet.sheet("title", [many, many]).shape
    assert width <= 2100 and height > 2 * 3 * 64  # rows of images that are longer wrap
    sheet = contact_sheet.sheet(
        "title", [contact_sheet.Strip("h", "word " * 90, "foot", each) for each in images]
    )
    cell = contact_sheet.LARGEST
    assert sheet.shape[:2] == (
        contact_sheet.LINE + 3 * contact_sheet.GAP + 6 * (cell + contact_sheet.GAP),
        contact_sheet.LABEL + 2 * (cell + contact_sheet.GAP) + contact_sheet.GAP,
    )
    top = (
        contact_sheet.LINE + 3 * contact_sheet.GAP + (cell + contact_sheet.GAP) + (cell - 56) // 2
    )  # 28 enlarged twice, centred
    left = contact_sheet.LABEL + (cell - 56) // 2
    assert (sheet[top : top + 56 : 2, left : left + 56 : 2] == images[1][0]).all()
    with pytest.raises(UserError, match="no checkpoint yet"):
        contact_sheet.drawn(Path("nowhere"), 1, 0, None, torch.device("cpu"))
