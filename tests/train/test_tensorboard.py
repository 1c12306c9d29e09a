"""logger=tensorboard, read back by TensorBoard's own reader."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.checkpoint import file as checkpoint
from ddpm.cli import train as train_command
from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check
from ddpm.errors import UserError
from ddpm.runs import resume, run_dir
from ddpm.train import loggers
from tests.conftest import Command

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.xdist_group("tensorboard")  # one worker, which makes its fixtures once
QUICK = [
    "model.channels=[16,32]",
    "trainer.batch_size=16",
    "trainer.log_every=2",
    "trainer.validate_every=4",
    "trainer.checkpoint_every=4",
    "trainer.sample_every=4",
]


def train(*overrides: str) -> None:
    """What ddpm-train does once it has read its command line."""
    typed = hydra.read_overrides(list(overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm.train.validation.EVALUATIONS", 34)
        patch.setattr("ddpm.train.loop.PREVIEWS", 4)
        train_command.train(check(TrainConfig, hydra.compose("train", resume.before_typed(typed) + typed)))


def read(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def check_equal_to_metrics(run: Path) -> None:
    """Every number of every line once, and no other."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = read(run)
    assert set(events.Tags()["scalars"]) == {name for line in lines for name in line} - {"step"}
    for name in events.Tags()["scalars"]:
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]


def check_images(run: Path, steps: list[int]) -> None:
    import io

    images = read(run).Images("samples")
    assert [image.step for image in images] == steps
    for image in images:
        told = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("L"))
        kept = np.asarray(Image.open(run / "samples" / f"step_{image.step:07d}.png"))
        assert told.shape == kept.shape and (told == kept).all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two with event files."""
    folder = tmp_path_factory.mktemp("sweep")
    for schedule in ("linear", "cosine"):
        train(
            *QUICK,
            f"run_dir={folder}/{schedule}",
            f"schedule={schedule}",
            "trainer.max_steps=8",
            "logger=tensorboard",
        )
    return folder


def test_events_say_what_the_plain_files_say(runs: Path) -> None:
    for name in ("linear", "cosine"):
        check_equal_to_metrics(runs / name)
        check_images(runs / name, [4, 8])
    for file in ("metrics.jsonl", "result.json", "loss.png"):
        assert (runs / "linear" / file).exists()


def test_the_hparams_page_compares_the_runs_of_a_sweep(runs: Path) -> None:
    """Through the page's own code: all settings of all runs, which differ, and the figures of each run."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    events = plugin_event_multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(str(runs))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(runs))
    page, request = backend_context.Context(TBContext(data_provider=provider)), context.RequestContext()
    experiment = page.experiment_from_metadata(
        request,
        "",
        True,
        page.hparams_metadata(request, ""),
        page.hparams_from_data_provider(request, "", None),
    )
    settings = {info.name: info.differs for info in experiment.hparam_infos}
    assert [name for name, differs in settings.items() if differs] == ["schedule"]
    assert {"schedule.s", "schedule.beta_start", "optimizer.lr", "model.channels", "seed"} <= settings.keys()
    assert "run_dir" not in settings and "data_root" not in settings
    assert {"val_eps_mse", "val_loss"} <= {info.name.tag for info in experiment.metric_infos}
    everything = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS]
    )
    groups = list_session_groups.Handler(request, page, "", everything).run().session_groups
    assert len(groups) == 2  # a run is one session, and none beside it
    for group in groups:
        name = group.hparams["schedule"].string_value
        result = json.loads((runs / name / "result.json").read_text())
        shown = {value.name.tag: value.value for value in group.metric_values}
        for figure in ("val_eps_mse", "val_loss"):
            assert shown[figure] == pytest.approx(result[figure], rel=1e-6)
        assert group.hparams["model.channels"].string_value == "[16, 32]"
        assert group.hparams["optimizer.lr"].number_value == pytest.approx(1e-3, rel=3)


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Gone on from an older checkpoint, with the line of that step lost, as where a process is killed in between."""
    run = tmp_path / "run"
    train(*QUICK, f"run_dir={run}", "trainer.max_steps=6", "logger=tensorboard")
    (run / "checkpoints" / "step_0000006.safetensors").unlink()
    (run / "checkpoints" / "best.safetensors").unlink(missing_ok=True)
    (first,) = (run / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.a.1.0"))  # from an earlier second
    train(f"trainer.resume={run}", "trainer.max_steps=10")  # the logger is the run's
    assert len(list((run / "tensorboard").iterdir())) == 2
    check_equal_to_metrics(run)
    check_images(run, [4, 6, 8, 10])  # the one of step 6 lies in samples/ since the first time


@pytest.mark.slow
def test_a_run_that_began_without_is_told_from_its_beginning(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(*QUICK, f"run_dir={run}", "trainer.max_steps=4")
    assert not (run / "tensorboard").exists()
    train(f"trainer.resume={run}", "trainer.max_steps=8", "logger=tensorboard")
    check_equal_to_metrics(run)
    check_images(run, [4, 8])
    overwrite = [*QUICK, f"run_dir={run}", "trainer.max_steps=2", "overwrite=true", "logger=tensorboard"]
    (run / "tensorboard" / "notes.txt").write_text("mine")
    train(*overwrite)
    check_equal_to_metrics(run)
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    assert (run / "tensorboard" / "notes.txt").read_text() == "mine"
    (run / "tensorboard" / "notes.txt").unlink()
    run_dir.clear(run)
    assert not (run / "tensorboard").exists()


def test_event_files_are_a_runs_own(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.host.2.0").touch()
    assert not run_dir.more_than_begun(tmp_path)
    (tmp_path / "tensorboard" / "thesis.txt").touch()
    assert run_dir.more_than_begun(tmp_path)


def test_without_the_package_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger=tensorboard needs: pip install -e '/.*\[tensorboard\]'"):
        train(*QUICK, f"run_dir={tmp_path}/run", "trainer.max_steps=2", "logger=tensorboard")
    assert list(tmp_path.iterdir()) == []
    loggers.check(check(TrainConfig, hydra.compose("train", [])).logger)  # files need nothing


def test_another_logger_is_one_line(command: Command, tmp_path: Path) -> None:
    result = command("train", "logger=wandb")
    assert result.returncode == 2 and "logger=wandb: must be one of files, tensorboard" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_from_before_there_was_a_logger_are_read(runs: Path) -> None:
    path = runs / "linear" / "checkpoints" / "step_0000008.safetensors"
    meta, _ = checkpoint.read_meta(path)
    older = {key: value for key, value in meta.config.items() if key != "logger"}
    assert meta.config["logger"] == "tensorboard" and checkpoint.config(path, meta).logger == "tensorboard"
    assert checkpoint.config(path, dataclasses.replace(meta, config=older)).logger == "files"
