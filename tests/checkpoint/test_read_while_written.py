"""Commands on a run that trains with trainer.keep=1: files go and come while they are read."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpm
from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate, verify
from ddpm.cli import default_sampler, eval_keys
from ddpm.cli.info import info
from ddpm.config import hydra
from ddpm.config.schema import InfoConfig
from ddpm.errors import CheckpointError
from ddpm.report import contact_sheet, runs
from ddpm.runs import resume
from ddpm.sample import model as models

MADE = Path(__file__).parents[1] / "compatibility" / "made"
# What a run does: a new step file, then the older one goes; `best` is replaced by one of another step, and content.
WRITER = """
import itertools, os, sys, time
from pathlib import Path
folder, kinds = Path(sys.argv[1]), [Path(name).read_bytes() for name in sys.argv[2:]]
for step in itertools.count(1):
    for name in (f"step_{step:07d}.safetensors", "best.safetensors"):
        (folder / ".writing").write_bytes(kinds[step % 2])
        os.replace(folder / ".writing", folder / name)
    (folder / f"step_{step - 1:07d}.safetensors").unlink(missing_ok=True)
    print(flush=True) if step == 1 else time.sleep(0.04)
"""


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose checkpoints are replaced about as fast as the smallest model's can be."""
    run = tmp_path_factory.mktemp("home") / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copyfile(MADE / "finished" / "config.yaml", run / "config.yaml")
    kinds = [
        MADE / name / "checkpoints" / file
        for name, file in (
            ("finished", "step_0000400.safetensors"),
            ("stopped_unet", "step_0000023.safetensors"),
        )
    ]
    arguments = [sys.executable, "-c", WRITER, str(run / "checkpoints"), *map(str, kinds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        yield run
        writer.kill()


def typed(run: Path, *more: str) -> list[str]:
    return hydra.read_overrides([f"ckpt={run}", *more])


READERS: dict[str, Callable[[Path], object]] = {
    "ddpm.load": lambda run: ddpm.load(run, device="cpu"),
    "ddpm-info": lambda run: info(InfoConfig(str(run))),
    "ddpm-sample": lambda run: default_sampler.overrides("sample", typed(run)),
    "ddpm-eval": lambda run: eval_keys.before_typed(typed(run, "dataset=folder", "dataset.path=pictures")),
    "ddpm-train": lambda run: resume.before_typed([f"trainer.resume={run}"]),
    "contact sheet": lambda run: contact_sheet.drawn(run, 1, 0, None, torch.device("cpu")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_run_that_trains_can_be_read(training: Path, reader: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that is gone is no broken one
        for _ in range(8):
            READERS[reader](training)


def test_a_run_that_trains_is_a_row_without_a_reason(training: Path) -> None:
    for _ in range(8):
        row = runs.read(training, "run", lambda path: True)
        assert (row.status, row.reason) == ("running", "") and row.settings["dataset"] == "digits"


def test_where_a_listed_file_is_gone_the_list_is_read_again(tmp_path: Path) -> None:
    folder, asked = tmp_path / "checkpoints", list[str]()
    folder.mkdir()
    good = (MADE / "finished" / "checkpoints" / "step_0000400.safetensors").read_bytes()
    (folder / "step_0000001.safetensors").write_bytes(good)

    def read(file: Path) -> None:
        asked.append(file.name)
        if len(asked) < 3:
            os.replace(file, folder / f"step_000000{len(asked) + 1}.safetensors")
        checkpoint.verify(file)

    path, _, notes = locate.read_newest(lambda: locate.find(str(tmp_path)), read)
    assert path.name == asked[-1] == "step_0000003.safetensors" and len(asked) == 3 and notes == []
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        locate.read_newest(list, read)
    gone = tmp_path / "gone.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot read .*gone.safetensors"):
        locate.read_newest(lambda: [gone], checkpoint.verify)


def test_a_file_that_goes_while_it_is_read_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MADE / "finished" / "checkpoints" / "step_0000400.safetensors"
    file, original = Path(shutil.copy(made, tmp_path / "best.safetensors")), verify.fitting

    def deleted(path: Path, *header: Any) -> object:
        path.unlink()
        return original(path, *header)

    monkeypatch.setattr(verify, "fitting", deleted)
    model, meta = models.load(file, torch.device("cpu"))
    assert meta == checkpoint.read_meta(made)[0] and model.step == meta.step == 400 and not file.exists()
