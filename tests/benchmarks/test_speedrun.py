"""benchmarks/speedrun/replay.py: what is repeated enters the table, and what cannot be is refused. On tiny digits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.speedrun import replay

from ddpm.cli import eval_keys, train
from ddpm.cli import evaluate as judge
from ddpm.config import hydra
from ddpm.config.schema import EvalConfig, TrainConfig, check
from ddpm.errors import UserError

TINY = ["model.channels=[8,16]", "model.head_dim=8", "trainer.max_steps=2", "trainer.batch_size=8"]
TINY += ["trainer.validate_every=0", "trainer.sample_every=0", "trainer.checkpoint_every=0"]
RECORD: dict[str, Any] = {"track": "cpu", "target": "loss", "train": TINY, "sample": [], "seconds": 50}
RECORD |= {"who": "a test", "date": "2026-11-28", "commit": "0123abc"}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A file that says RECORD with changes, replayed in this process, where seed i takes 50 + i seconds."""
    monkeypatch.setattr(replay, "DATASET", "digits")
    monkeypatch.setattr(replay, "DRAWS", 200)
    monkeypatch.setattr(replay, "N", 200)
    monkeypatch.setattr(replay, "hold_to_the_track", lambda device: None)

    def in_process(program: str, *arguments: str) -> float:
        typed = hydra.read_overrides(list(arguments))
        if program == "ddpm-train":
            config: TrainConfig = check(TrainConfig, hydra.compose("train", typed))
            train.train(config)
            return 50.0 + config.seed
        judge.evaluate(check(EvalConfig, hydra.compose("eval", eval_keys.before_typed(typed) + typed)))
        return 0.0

    monkeypatch.setattr(replay, "run", in_process)

    def written(**changes: Any) -> Path:
        file = tmp_path / "records" / "mine.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump({**RECORD, **changes}))
        return file

    return written


def limits(monkeypatch: pytest.MonkeyPatch, **targets: tuple[replay.Limit, ...]) -> None:
    monkeypatch.setattr(replay, "TARGETS", targets)


def test_a_record_is_repeated_measured_and_shown(
    record: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits(monkeypatch, loss=(replay.Limit("eps_loss", 9.0, 1),))
    file, page = record(), tmp_path / "README.md"
    page.write_text(f"rules\n{replay.BEGIN}old\n{replay.END}after\n")
    monkeypatch.setattr(replay, "PAGE", page)
    monkeypatch.setattr(replay, "HOME", tmp_path)
    monkeypatch.setattr("sys.argv", ["replay.py", str(file)])
    replay.main()
    found = json.loads(file.with_suffix(".json").read_text())
    assert found["seconds"] == [50.0, 51.0, 52.0] and found["seeds"] == [0, 1, 2]
    assert len({*found["figures"]["eps_loss"]}) == 3 and "device" in found["machine"]
    text = page.read_text()
    assert text.startswith("rules\n") and text.endswith("after\n") and "old" not in text
    assert "| 2 CPU cores | loss | **51** (50 … 52) | eps_loss " in text and "| 0123abc |" in text
    for limit, seconds, why in (
        (1e-3, 50, r"eps_loss is .* with a 95 % bound of .*; needs at most 0\.001"),
        (9.0, 40, r"51\.0 s on average, at least 49\.3 with 95 %; claimed are 40"),
    ):
        limits(monkeypatch, loss=(replay.Limit("eps_loss", limit, 1),))
        monkeypatch.setattr(replay, "measure", lambda *_: {"eps_loss": 1.0 + len(str(_[1])) / 1e6})
        with pytest.raises(UserError, match=f"mine is not repeated: {why}"):
            replay.replay(record(seconds=seconds), [0, 1, 2])
    monkeypatch.setattr("sys.argv", ["replay.py", str(file)])
    with pytest.raises(SystemExit, match="replay: mine is not repeated"):
        replay.main()
    assert page.read_text() == text and json.loads(file.with_suffix(".json").read_text()) == found


def test_digits_are_judged_by_the_pinned_features(
    record: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "SHIPPED", {("digits", 8): replay.SHIPPED["digits", 8]})
    sample = ["sampler=ddim", "sampler.num_steps=2"]
    made = replay.read(record(target="digits", sample=sample))
    replay.run("ddpm-train", *[f"dataset={replay.DATASET}", *TINY, f"run_dir={tmp_path / 'a'}", "device=cpu"])
    found = replay.measure(made, tmp_path / "a", "cpu")
    assert found.keys() == {"fd_excess", "confident"} and 0 <= found["confident"] <= 1 < found["fd_excess"]
    for name, value, why in (
        ("MOST_EVALUATIONS", 1, "2 network evaluations"),
        ("SHIPPED", {}, "feature network: its SHA-256 is"),
    ):
        (tmp_path / "a-judged").rename(tmp_path / name)
        monkeypatch.setattr(replay, name, value)
        with pytest.raises(UserError, match=why):
            replay.measure(made, tmp_path / "a", "cpu")
        monkeypatch.setattr(replay, "MOST_EVALUATIONS", 40)


def test_the_bound_is_that_of_students_t() -> None:
    values = [0.30, 0.28, 0.29]  # mean 0.29, standard error 0.01 / √3
    assert replay.Limit("x", 0.30, 1).bound(values) == pytest.approx(0.29 + 2.920 * 0.01 / 3**0.5, rel=1e-4)
    assert not replay.Limit("x", 0.30, 1).holds(values) and replay.Limit("x", 0.31, 1).holds(values)
    assert replay.Limit("x", 0.27, -1).holds(values) and not replay.Limit("x", 0.28, -1).holds(values)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"track": "tpu"}, "track=tpu: must be one of cpu, gpu"),
        ({"train": ["trainer.init_from=best"]}, "is the same for all records"),
        ({"train": ["seed=3"]}, "is the same for all records"),
        ({"train": ["dataset=mnist"]}, "is the same for all records"),
        ({"train": ["schedule=cosine"]}, "target: loss needs schedule=linear"),
        ({"sample": ["n=10"]}, "must be of sampler"),
        ({"speed": 1}, "is no record"),
        ({"extrapolated": "from ten steps"}, "is of the history"),
    ],
)
def test_a_record_against_the_rules_is_refused(
    record: Callable[..., Path], changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        replay.replay(record(**changes), [0, 1, 2])


def test_the_page_has_the_table_of_the_records() -> None:
    assert replay.table(replay.HOME / "records") in replay.PAGE.read_text(), "run replay.py --table"
    for file in (replay.HOME / "records").glob("*.yaml"):
        replay.read(file)
