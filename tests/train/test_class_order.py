"""Checkpoints keep the numbers of their classes; what a run says of its classes; data that changed."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.cli import info, train
from ddpm.config import hydra
from ddpm.config.schema import EvalConfig, InfoConfig, TrainConfig, check
from ddpm.errors import CheckpointError, UserError
from ddpm.evaluate.run import dataset_of
from ddpm.runs import resume
from ddpm.sample.model import Guidance, labels, load

TINY = [
    "model=unet_tiny",
    "model.channels=[8,16]",
    "model.head_dim=8",
    "trainer.batch_size=8",
    "trainer.sample_every=0",
]
DATA = ["dataset=folder", "dataset.path=data", "dataset.image_size=8", "model.conditional=true"]
OLD = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, …: the order of folders in older versions
NEW = list(map(str, range(12)))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data of twelve classes, and quick validations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm.train.validation.EVALUATIONS", 34)
    for k in range(12):
        for i in range(3):
            file = tmp_path / "data" / str(k) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 20 * k).save(file)
    return tmp_path


def go(*overrides: str) -> None:
    given = hydra.read_overrides([*overrides, "device=cpu"])
    train.train(check(TrainConfig, hydra.compose("train", resume.before_typed(given) + given)))


def names(run: str) -> list[str]:
    return list(checkpoint.read_meta(locate.of_run(Path(run))[0])[0].facts["class_names"])


@pytest.mark.slow
def test_an_older_run_keeps_its_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as then:
        then.setattr("ddpm.data.folder.natural", lambda name: name)
        go(*TINY, *DATA, "run_dir=whole", "trainer.max_steps=4", "optimizer.decay=constant")
        go(*TINY, *DATA, "run_dir=old", "trainer.max_steps=2", "optimizer.decay=constant")
    assert names("old") == OLD
    capsys.readouterr()
    go("trainer.resume=old", "dataset.path=data", "trainer.max_steps=4")
    said = capsys.readouterr().out
    assert "12 classes: 0 '0', 1 '1', 2 '10', 3 '11', 4 '2'" in said and "not bit by bit" not in said
    assert names("old") == OLD
    whole, old = (checkpoint.read_meta(locate.of_run(Path(run))[0])[0] for run in ("whole", "old"))
    assert (old.step, old.sha256) == (4, whole.sha256)
    go(*TINY, *DATA, "run_dir=begun", "trainer.max_steps=1", "trainer.init_from=old")
    assert names("begun") == OLD, "the weights know these numbers"
    go(*TINY, *DATA, "run_dir=new", "trainer.max_steps=1")
    assert names("new") == NEW
    model = load(locate.of_run(Path("old"))[0], torch.device("cpu"))[0]
    typed = ["ckpt=old", "dataset=folder", "dataset.path=data", "dataset.image_size=8"]
    data = dataset_of(check(EvalConfig, hydra.compose("eval", typed)), model)
    assert list(data.facts.class_names) == OLD and data.test.labels is not None
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert int(image[0, 0, 0]) == 20 * int(OLD[label])


def test_numbers_and_names_are_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(*TINY, *DATA, "run_dir=run", "trainer.max_steps=1")
    said, listed = capsys.readouterr().out, ", ".join(f"{k} '{k}'" for k in range(12))
    for text in (said, (home / "run" / "train.log").read_text()):
        assert f"12 classes: {listed}" in text and "data: 36 images taken in 12 sub-folders" in text
    info.info(check(InfoConfig, hydra.compose("info", ["ckpt=run"])))
    assert f"folder, 8×8×1, 12 classes: {listed}" in capsys.readouterr().out
    model = load(locate.of_run(Path("run"))[0], torch.device("cpu"))[0]
    with pytest.raises(UserError, match="label=12: folder has the labels 0 to 11"):
        labels(model, [12], torch.arange(1), Guidance())


@pytest.mark.parametrize(
    ("change", "message"),
    [("colour", "channels was 1, is 3"), ("class", "num_classes was 12, is 13"), ("gone", "class_names was .*'11'")],
)  # fmt: skip
def test_data_that_changed_is_named(home: Path, change: str, message: str) -> None:
    go(*TINY, *DATA, "run_dir=run", "trainer.max_steps=1")
    if change == "colour":
        Image.new("RGB", (8, 8), (1, 2, 3)).save(home / "data" / "5" / "0.png")
    elif change == "class":
        (home / "data" / "more").mkdir()
        Image.new("L", (8, 8)).save(home / "data" / "more" / "0.png")
    else:
        (home / "data" / "11").rename(home / "data" / "eleven")
    with pytest.raises(CheckpointError, match=rf"was trained on other data: .*{message}"):
        go("trainer.resume=run", "dataset.path=data", "trainer.max_steps=2")
