"""Missing evidence, strangers' files, and commands that were a mistake: nothing is lost, and nothing is left."""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm.cli import train as command
from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check
from ddpm.errors import UserError
from ddpm.runs import resume, run_dir
from ddpm.runs.output_dirs import check_results, results
from ddpm.runs.run_dir import RUN_FILES
from ddpm.train import loop, metrics_file

pytestmark = pytest.mark.xdist_group("lost")  # one worker, which makes its fixtures once
TINY = [
    "model=mlp",
    "model.hidden=8",
    "model.num_layers=1",
    "schedule.num_timesteps=10",
    "trainer.batch_size=64",
    "trainer.max_steps=4",
    *(f"trainer.{each}_every=2" for each in ("checkpoint", "validate", "sample")),
    "device=cpu",
]
SEED = 20


def composed(*typed: str) -> TrainConfig:
    overrides = hydra.read_overrides(list(typed))
    whole = resume.before_typed(overrides) + overrides
    return check(TrainConfig, hydra.compose("train", whole))  # type: ignore[no-any-return]


def train(*typed: str) -> None:
    """What ddpm-train does once it has read its command line."""
    command.train(composed(*typed))


def tree(folder: Path) -> dict[str, bytes | str]:
    """Return all that lies in a folder: the bytes of files, where links lead, and "" for folders."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(*TINY, f"run_dir={folder}")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _link(path: Path, target: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# what happens to a run's checkpoints, and whether overwrite=true may still replace the run
LOST: dict[str, tuple[Callable[[Path], None], bool]] = {
    "a link to a disk that is not mounted": (lambda run: _link(run / "checkpoints", "/mnt/no/disk"), False),
    "a link to a file": (lambda run: _link(run / "checkpoints", "config.yaml"), False),
    "a mount point without its disk": (lambda run: _empty(run / "checkpoints"), True),
    "gone": (lambda run: shutil.rmtree(run / "checkpoints"), True),
    "set aside": (lambda run: _set_aside(run / "checkpoints"), True),
    "another folder is gone": (
        lambda run: (_empty(run / "checkpoints"), _link(run / "samples", "/mnt/no"))[1],
        False,
    ),
}


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _set_aside(folder: Path) -> None:
    folder.rename(folder.with_name("set_aside"))
    folder.mkdir()
    folder.with_name("set_aside").rename(folder / "set_aside")


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("kept", ["all", "no result", "metrics alone"])
def test_a_run_without_its_checkpoints_is_not_begun_anew(run: Path, lost: str, kept: str) -> None:
    damage, may_replace = LOST[lost]
    damage(run)
    for name in {"all": [], "no result": ["result.json"], "metrics alone": run_dir.ENDED}[kept]:
        (run / name).unlink()
    before = tree(run)
    with pytest.raises(UserError, match=r"nothing to go on with|is its disk mounted|cannot write to"):
        train(*TINY, "trainer.resume=auto", f"run_dir={run}")
    assert tree(run) == before
    if not may_replace:
        with pytest.raises(UserError, match=r"is its disk mounted|cannot write to"):
            train(*TINY, "overwrite=true", f"run_dir={run}")
        assert tree(run) == before


def test_nothing_is_replaced_in_folders_that_cannot_be_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(dir: Path) -> None:
        if dir.name == "samples":
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    real, before = run_dir.TemporaryFile, tree(run)
    monkeypatch.setattr(run_dir, "TemporaryFile", forbidden)
    for typed in (["overwrite=true"], ["trainer.resume=auto", "trainer.max_steps=6"]):
        with pytest.raises(UserError, match=r"cannot write to .*samples: Permission denied"):
            train(*TINY, *typed, f"run_dir={run}")
        assert tree(run) == before
    monkeypatch.undo()
    (run / "train.log").rename(run / "moved.log")
    (run / "train.log").symlink_to("moved.log")  # is not written through
    before = tree(run)
    with pytest.raises(UserError, match=r"cannot write to .*train\.log"):
        train(*TINY, "trainer.resume=auto", "trainer.max_steps=6", f"run_dir={run}")
    assert tree(run) == before


def test_history_is_set_aside(run: Path) -> None:
    """Going on from an earlier step, or once more from the beginning, keeps the figures that were there."""
    metrics, result = (run / "metrics.jsonl").read_bytes(), (run / "result.json").read_bytes()
    train(f"trainer.resume={run}/checkpoints/step_0000002.safetensors", "trainer.max_steps=6")
    assert (run / "set_aside" / "metrics.jsonl").read_bytes() == metrics
    assert (run / "set_aside" / "result.json").read_bytes() == result
    assert [line["step"] for line in metrics_file.read(run / "metrics.jsonl")] == [2, 4, 6]
    train(f"trainer.resume={run}/checkpoints/step_0000002.safetensors", "trainer.max_steps=4")
    aside = {path.name for path in (run / "set_aside").iterdir()}
    assert aside == {"metrics.jsonl", "metrics-2.jsonl", "result.json", "result-2.json"}


def test_a_run_killed_before_its_first_checkpoint_begins_anew(run: Path) -> None:
    _empty(run / "checkpoints")
    for name in run_dir.ENDED:
        (run / name).unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    log = (run / "train.log").read_bytes()
    train(*TINY, "trainer.resume=auto", f"run_dir={run}")
    assert (run / "set_aside" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    assert (run / "set_aside" / "train.log").read_bytes() == log
    assert {path.name for path in (run / "samples" / "set_aside").iterdir()} == {
        "step_0000002.png",
        "step_0000004.png",
    }
    assert run_dir.read_result(run) is not None and "begun before" in (run / "train.log").read_text()
    train(*TINY, "trainer.resume=auto", f"run_dir={run}")  # done already


def test_a_kill_between_checkpoint_and_figures_loses_neither(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`best` is written first, so that figures without a checkpoint are those of a checkpoint that is gone."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.metrics_file, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*TINY, f"run_dir={tmp_path / 'killed'}")
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "metrics.jsonl").read_bytes()
    train(*TINY, "trainer.resume=auto", f"run_dir={tmp_path / 'killed'}")
    mine, theirs = (list(metrics_file.read(each / "metrics.jsonl")) for each in (tmp_path / "killed", run))
    for line in (*mine, *theirs):
        del line["images_per_second"]
    assert mine == theirs and [list(line) for line in mine] == [list(line) for line in theirs]


def test_a_replaced_run_leaves_no_results_among_the_new_ones(run: Path) -> None:
    for made in ("evaluations/eval-1/evaluation.json", "samples/drawn-1/grid.png"):
        (run / made).parent.mkdir(parents=True)
        (run / made).write_text("of the run before")
    (run / "notes.txt").write_text("mine")
    train(*TINY, "overwrite=true", "seed=1", f"run_dir={run}")
    assert {path.name for path in (run / "set_aside").iterdir()} == {"evaluations", "drawn-1"}
    assert not (run / "evaluations").exists() and not list((run / "samples").glob("drawn*"))
    assert (run / "notes.txt").read_text() == "mine"


FOREIGN = (  # what other tools write under these names
    b"",
    b"{}",
    b"[]",
    b"\x00\xff\xfe",
    b'{"accuracy": 0.9, "step": 3}',
    b"step,loss\n1,0.5\n",
    b"2024-01-01 12:00:00 INFO epoch 1\n",
    b"model: resnet\ntrainer:\n  max_epochs: 3\nseed: 1\n",
    b'{"epoch": 1, "train_loss": 0.25}\n{"epoch": 2, "train_loss": 0.2}\n',
    b"dataset: cifar\nmodel:\n  name: vit\nseed: 1\noptimizer: adam\ntrainer: {max_steps: 5}\n",
)
MODES = (
    ["trainer.resume=auto"],
    ["overwrite=true"],
    [],
    ["overwrite=true", "trainer.resume=auto"],
)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_files_are_known_by_their_content(
    finished: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of a stranger, or a run with a stranger's file in it, is refused and stays as it is. Fixed seeds."""
    monkeypatch.setattr(command, "train", None)  # never gets so far
    content_matters = ("config.yaml", "environment.json", "metrics.jsonl", "result.json")
    for seed in range(count):
        chosen = random.Random(SEED + seed)
        folder = tmp_path / str(seed)
        in_a_run, typed = chosen.random() < 0.3, chosen.choice(MODES)
        auto = "trainer.resume=auto" in typed
        if in_a_run:
            shutil.copytree(finished, folder)
        folder.mkdir(exist_ok=True)
        names = content_matters if in_a_run else RUN_FILES
        if in_a_run and auto:  # there it is set aside
            names = [name for name in names if name != "metrics.jsonl"]
        for name in chosen.sample(names, chosen.randint(1, 3)):
            (folder / name).unlink(missing_ok=True)
            text = chosen.choice(FOREIGN[1:])
            match chosen.randrange(6):
                case 0:
                    (folder / name).mkdir()
                case 1:
                    (folder / name).symlink_to(chosen.choice(["/etc/hostname", "nowhere", "."]))
                case 2:
                    (folder / name).write_bytes(chosen.randbytes(chosen.randint(1, 99)))
                case _:
                    (folder / name).write_bytes(text)
        before = tree(folder)
        with pytest.raises(UserError) as caught:
            run_dir.claim(str(folder), "overwrite=true" in typed, fresh=not auto)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value), seed
        assert tree(folder) == before, f"{seed}: {typed}"
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "typed",
    [
        ["dataset=folder", "dataset.path=nowhere"],
        ["dataset=folder", "dataset.path=nowhere", "trainer.resume=auto"],
        ["trainer.init_from=nowhere"],
        ["trainer.accumulate=65"],
        ["device=cuda:99"],
    ],
    ids=lambda typed: typed[-1],
)
def test_a_mistake_leaves_no_folder_and_no_lock(
    typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for place in (
        ["run_dir=new/deep/run"],
        ["run_dir=empty"],
        [] if "trainer.resume=auto" not in typed else ["run_dir=a"],
    ):
        with pytest.raises(UserError):
            train(*TINY, *typed, *place)
        assert tree(tmp_path) == {"empty": ""}


def test_a_folder_that_cannot_be_made_leaves_none_above_it(tmp_path: Path) -> None:
    for name in ("new/" + "x" * 300, "new/../file/b"):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError):
            run_dir.claim(str(tmp_path / name), False, fresh=True)
        assert tree(tmp_path) == {"file": b""}
    (tmp_path / "link").symlink_to("/mnt/no/disk")
    for fresh in (True, False):
        with pytest.raises(UserError, match=r"link: is a link to /mnt/no/disk, which is not there"):
            run_dir.claim(str(tmp_path / "link"), False, fresh)
    for out in (None, str(tmp_path / "link" / "out")):  # before hours of work
        with pytest.raises(UserError, match=r"link: it is no folder"):
            check_results(out, tmp_path / "link" / "eval")


def test_parts_of_a_batch_hold_an_image_each() -> None:
    with pytest.raises(UserError, match=r"trainer\.accumulate=65: must be at most trainer\.batch_size=64"):
        resume.check_batch(composed(*TINY, "trainer.accumulate=65").trainer)
    resume.check_batch(composed(*TINY, "trainer.accumulate=64").trainer)


def test_results_go_into_a_new_or_empty_folder_all_or_none(tmp_path: Path) -> None:
    stem, out = tmp_path / "run" / "evaluations" / "eval", tmp_path / "new" / "deep"
    for typed, names in (
        (None, ["run/evaluations/eval-1", "run/evaluations/eval-2"]),
        (str(out), ["new/deep"]),
    ):
        with pytest.raises(UserError, match="No space left"), results(typed, stem) as (folder, final):
            (folder / "half.png").write_text("")
            raise OSError(28, "No space left on device")
        assert tree(tmp_path) == {}
        for name in names:
            check_results(typed, stem)
            with results(typed, stem) as (folder, final):
                (folder / "images").mkdir()
                (folder / "images" / "0.png").write_text(name)
            assert final == tmp_path / name and tree(final) == {"images": "", "images/0.png": name.encode()}
        before = tree(tmp_path)
        if typed:
            with pytest.raises(UserError, match="exists already, and is no empty folder"):
                check_results(typed, stem)
            with pytest.raises(UserError, match="exists already"), results(typed, stem):
                raise AssertionError
        assert tree(tmp_path) == before
        shutil.rmtree(final.parent if typed else tmp_path / "run")
    out.mkdir(parents=True)
    (out / ".ddpm-killed").mkdir()  # of a process that was killed
    with results(str(out), stem) as (folder, _):
        (folder / "a").write_text("a")
    assert tree(out) == {".ddpm-killed": "", "a": b"a"}


def test_two_commands_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="is no longer empty"),
        results(str(tmp_path / "out"), tmp_path) as (mine, _),
    ):
        (mine / "sample.json").write_text("mine")
        with results(str(tmp_path / "out"), tmp_path) as (theirs, _):
            (theirs / "sample.json").write_text("theirs")
    assert tree(tmp_path) == {"out": "", "out/sample.json": b"theirs"}


def test_of_two_commands_that_end_at_once_one_fills_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def write(name: str) -> None:
        try:
            with results(str(tmp_path / "out"), tmp_path) as (folder, _):
                (folder / name).write_text(name)
                ready.wait(60)
        except UserError as error:
            said.append(str(error))

    def slowly(path: Path, to: Path) -> None:
        time.sleep(0.1)
        move(path, to)

    move, ready, names = shutil.move, threading.Barrier(3), ["a", "b", "c"]
    monkeypatch.setattr(shutil, "move", slowly)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, names))
    assert len(said) == 2 and all("is no longer empty" in text for text in said)
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_the_lines_that_are_checked_are_those_of_a_run(finished: Path) -> None:
    """What a run writes is known as a run's, file by file."""
    there = {name for name in RUN_FILES if (finished / name).exists()}
    assert there == {*RUN_FILES} - {run_dir.FAILED} and run_dir._not_of_a_run(finished) == []
    assert json.loads((finished / "result.json").read_text())["step"] == 4
