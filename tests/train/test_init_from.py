"""`trainer.init_from`: another run's weights to begin with, nothing else of it; and configs older than a key."""

import shutil
from pathlib import Path

import pytest
import torch

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate, verify
from ddpm.cli import train
from ddpm.config import hydra
from ddpm.config.schema import DEFAULTS_FOR_OLD_CHECKPOINTS, TrainConfig, check, to_dict
from ddpm.errors import CheckpointError, UserError
from ddpm.runs import resume
from ddpm.train import checkpointing
from ddpm.train.checkpointing import save
from ddpm.train.state import TrainState, prepare
from tests.checkpoint.test_checkpoint import rewrite
from tests.train.test_training import CPU, FACTS, config, tiny_data

SMALL = ["model.channels=[8,16]", "model.head_dim=8", "trainer.batch_size=8", "trainer.sample_every=0"]


@pytest.fixture(autouse=True)
def quick_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm.train.validation.EVALUATIONS", 34)


def source(path: Path, *overrides: str) -> TrainState:
    """A checkpoint of step 7 in which weights and averaged weights are random, and different."""
    run = prepare(config(*overrides), tiny_data(), CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*run.network.parameters(), *run.ema.parameters()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    run.step = 7
    path.parent.mkdir(parents=True, exist_ok=True)
    save(run, path, {})
    return run


def begun(path: Path, *overrides: str) -> tuple[TrainState, TrainState, list[str]]:
    """A new run, the same as it would have been, and what it says."""
    plain, run = (prepare(config(*overrides), tiny_data(), CPU) for _ in range(2))
    return run, plain, checkpointing.init_from(run, str(path))


def test_averaged_weights_go_into_network_and_average_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    old = source(file)
    run, _, notes = begun(file, "objective=v", "schedule=cosine", "dataset=digits", "seed=5")
    for network in (run.network, run.ema):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, old.ema.state_dict()[name]), name
            assert not torch.equal(tensor, old.network.state_dict()[name]), name
    assert run.step == 0 and not run.optimizer.state and run.config.seed == 5
    count = len(old.ema.state_dict())
    assert notes == [f"begins with {count} of {count} tensors from step 7 of {file}"]


def test_a_class_table_that_was_not_there_stays_new(tmp_path: Path) -> None:
    old = source(tmp_path / "a.safetensors")
    run, plain, notes = begun(tmp_path / "a.safetensors", "model.conditional=true")
    for network, as_new in ((run.network, plain.network), (run.ema, plain.ema)):
        for name, tensor in network.state_dict().items():
            expected = as_new if name == "label.weight" else old.ema
            assert torch.equal(tensor, expected.state_dict()[name]), name
    assert notes[1:] == ["new: label.weight 4×32, there is none"]


def test_another_width_takes_what_fits_and_lists_the_rest_with_both_shapes(tmp_path: Path) -> None:
    old = source(tmp_path / "a.safetensors")
    run, plain, notes = begun(tmp_path / "a.safetensors", "model.channels=[8,32]")
    fits = {
        name
        for name, tensor in old.ema.state_dict().items()
        if tensor.shape == run.ema.state_dict()[name].shape
    }
    assert 0 < len(fits) < len(old.ema.state_dict())
    for name, tensor in run.network.state_dict().items():
        assert torch.equal(tensor, (old.ema if name in fits else plain.network).state_dict()[name]), name
    new = len(plain.network.state_dict()) - len(fits)
    assert notes[0].startswith(f"begins with {len(fits)} of ")
    assert "down.1.blocks.0.0.norm_1.weight" not in notes[1]  # 8 wide in both
    assert "down.1.blocks.0.0.conv_1.weight 32×8×3×3, there 16×8×3×3" in notes[1]
    assert notes[1].endswith(f"; and {new - checkpointing.LISTED} more") and "\n" not in notes[1]


def test_where_nothing_fits_there_is_nothing_to_begin_with(tmp_path: Path) -> None:
    source(tmp_path / "a.safetensors")
    run = prepare(check(TrainConfig, hydra.compose("train", ["model=mlp"])), tiny_data(), CPU)
    with pytest.raises(UserError, match=r"trainer.init_from=.*: no tensor of .* fits this network: layers.0"):
        checkpointing.init_from(run, str(tmp_path / "a.safetensors"))


def test_broken_and_hostile_files_are_refused_and_a_run_falls_back_to_an_older_one(tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoints"
    for step in (3, 9):
        source(run / f"step_{step:07d}.safetensors")
    newest = run / "step_0000009.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with pytest.raises(CheckpointError, match="is broken"):
        begun(newest)
    _, _, notes = begun(tmp_path / "run")
    assert notes[0].startswith(f"warning: {newest}") and "step_0000003" in notes[1]
    rewrite(
        run / "step_0000003.safetensors",
        lambda fields: fields["config"]["model"].update(_target_="os.system"),
    )
    with pytest.raises(CheckpointError, match=r"unknown key 'model\._target_'"):
        begun(run / "step_0000003.safetensors")
    wrong = prepare(config(), tiny_data(), CPU)
    with torch.no_grad():
        next(wrong.ema.parameters()).fill_(float("nan"))
    tensors = {
        f"{part}.{name}": tensor.clone()
        for part in ("model", "ema")
        for name, tensor in wrong.ema.state_dict().items()
    }
    facts = {**vars(FACTS), "class_names": list(FACTS.class_names)}
    checkpoint.save(
        tmp_path / "nan.safetensors", tensors, checkpoint.Meta(to_dict(wrong.config), facts, 1, {}, {}, "")
    )
    with pytest.raises(CheckpointError, match="holds numbers that are not finite"):
        begun(tmp_path / "nan.safetensors")


def test_a_resumed_run_needs_no_source_and_follows_no_stored_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source(tmp_path / "old" / "checkpoints" / "step_0000007.safetensors")

    def go(*overrides: str) -> None:
        given = hydra.read_overrides(list(overrides))
        train.train(check(TrainConfig, hydra.compose("train", resume.before_typed(given) + given)))

    command = [*SMALL, "run_dir=new", "trainer.resume=auto", "trainer.init_from=old", "device=cpu"]
    go(*command, "trainer.max_steps=2")
    assert "begins with" in capsys.readouterr().out
    assert "begins with" in (tmp_path / "new" / "train.log").read_text()
    shutil.rmtree(tmp_path / "old")
    go(*command, "trainer.max_steps=3")
    assert "going on from step 2" in (said := capsys.readouterr().out) and "begins with" not in said
    meta, _ = checkpoint.read_meta(locate.of_run(tmp_path / "new")[0])
    assert meta.step == 3 and meta.config["trainer"]["init_from"] == "old"
    go("trainer.resume=new", "trainer.max_steps=4", "device=cpu")
    assert "init_from: null" in (tmp_path / "new" / "config.yaml").read_text()
    assert "init_from" not in capsys.readouterr().out  # nothing to tell of
    with pytest.raises(UserError, match="leave one of them out"):
        go("trainer.resume=new", "trainer.init_from=new", "trainer.max_steps=9")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        go(*SMALL, "trainer.init_from=nowhere", "run_dir=none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_a_config_older_than_a_key_has_its_default(tmp_path: Path, version: int) -> None:
    file = tmp_path / "a.safetensors"
    old = source(file)

    def forget(fields: dict[str, dict[str, dict[str, object]]]) -> None:
        fields.update(format_version=version)  # type: ignore[arg-type, dict-item]
        for key in DEFAULTS_FOR_OLD_CHECKPOINTS:
            group, _, name = key.rpartition(".")
            del (fields["config"][group] if group else fields["config"])[name]

    rewrite(file, forget, seal=version > 1)
    verify.examine(file)
    assert checkpoint.config(file, checkpoint.read_meta(file)[0]) == old.config
    rewrite(file, lambda fields: fields["config"].pop("trainer"), seal=version > 1)
    with pytest.raises(CheckpointError, match="'trainer' is missing"):
        verify.examine(file)


def test_every_key_added_later_is_one_of_todays_with_its_default() -> None:
    for key, default in DEFAULTS_FOR_OLD_CHECKPOINTS.items():
        value = to_dict(config())
        for part in key.split("."):
            value = value[part]
        assert value == default, key
