"""A run's folder: locked, never overwritten by accident, swept of leftovers; and where a run may go on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm import checkpoint
from ddpm.cli import git, hydra_app, resume, run_folder
from ddpm.config import TrainConfig, check
from ddpm.errors import CheckpointError, UserError
from ddpm.files import leftovers, open_regular, write_atomically
from ddpm.runs import Run, prepare, save
from tests.test_training import CPU, tiny_data

SMALL = ["model.channels=[8,16]", "model.head_dim=8", "trainer.max_steps=9"]


def typed(*overrides: str) -> TrainConfig:
    """As the command line composes it, what a resumed run was told included."""
    given = hydra_app.read_overrides(list(overrides))
    return check(TrainConfig, hydra_app.compose("train", resume.before_typed(given) + given))  # type: ignore[no-any-return]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with checkpoints of its steps 2 and 5 in `tmp_path/mine`."""
    run = prepare(typed(*SMALL, "data_root=elsewhere"), tiny_data(), CPU)
    for step in (2, 5):
        run.step = step
        folder = tmp_path / "mine" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        save(run, folder / f"step_{step:07d}.safetensors", {})
    (tmp_path / "mine" / "config.yaml").write_text("")
    return run


def test_a_folder_is_locked_until_its_holder_ends(tmp_path: Path) -> None:
    held = run_folder.lock(tmp_path)
    code = (
        f"from pathlib import Path; from ddpm.cli import run_folder; run_folder.lock(Path({str(tmp_path)!r}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is in use by another process" in other.stderr
    held.release()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    run_folder.lock(tmp_path).release()  # the other process has ended


def test_what_is_there_is_not_overwritten(tmp_path: Path, run: Run) -> None:
    mine = str(tmp_path / "mine")
    with pytest.raises(UserError, match="is not empty: overwrite=true replaces"):
        run_folder.make(mine, overwrite=False, resumed=False, held=None)
    folder, lock = run_folder.make(mine, overwrite=True, resumed=False, held=None)
    lock.release()
    assert [path.name for path in folder.iterdir()] == [".lock"]
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="other things than a run"):
        run_folder.make(mine, overwrite=True, resumed=False, held=None)


def test_leftovers_of_killed_processes_are_swept(tmp_path: Path, run: Run) -> None:
    left = tmp_path / "mine" / "checkpoints" / ".step_0000007.safetensors.99.abcd.tmp"
    left.write_bytes(b"half")
    _, lock = run_folder.make(str(tmp_path / "mine"), overwrite=False, resumed=True, held=None)
    lock.release()
    assert not left.exists() and len(checkpoint.saved_steps(tmp_path / "mine")) == 2


def test_files_ahead_of_the_step_are_set_aside(tmp_path: Path, run: Run) -> None:
    (note,) = run_folder.set_aside(tmp_path / "mine", 2)
    assert "step_0000005" in note and len(checkpoint.saved_steps(tmp_path / "mine")) == 1
    assert (tmp_path / "mine" / "checkpoints" / "set_aside" / "step_0000005.safetensors").exists()


def test_a_run_goes_on_in_its_own_folder_or_a_new_one(tmp_path: Path, run: Run) -> None:
    mine, file = str(tmp_path / "mine"), tmp_path / "mine" / "checkpoints" / "step_0000002.safetensors"
    for wanted, folder, in_place in (
        ([f"trainer.resume={mine}"], mine, True),
        ([f"trainer.resume={file}"], mine, True),
        ([f"trainer.resume={file}", f"run_dir={tmp_path}/other"], f"{tmp_path}/other", False),
        ([f"trainer.resume={file}", f"run_dir={tmp_path}/../{tmp_path.name}/mine"], None, True),
    ):
        place = resume.place(typed(*wanted))
        assert place.in_place == in_place and (folder is None or place.folder == folder)
    loose = tmp_path / "sent_by_a_colleague.safetensors"
    loose.write_bytes(file.read_bytes())
    place = resume.place(typed(f"trainer.resume={loose}"))
    assert place.folder is None and not place.in_place


def test_auto_begins_goes_on_and_never_begins_again_over_broken_files(tmp_path: Path, run: Run) -> None:
    def auto(name: str) -> resume.Source | None:
        config = typed(*SMALL, "trainer.resume=auto", f"run_dir={tmp_path}/{name}")
        return resume.choose(resume.place(config), config)

    assert auto("new") is None
    source = auto("mine")
    assert source is not None and source.meta.step == 5
    newest, oldest = reversed(checkpoint.saved_steps(tmp_path / "mine"))
    newest.write_bytes(newest.read_bytes()[:-1])
    source = auto("mine")
    assert source is not None and source.path == oldest and str(newest) in source.notes[0]
    oldest.write_bytes(b"")
    with pytest.raises(CheckpointError, match="nor is any other of the 2"):
        auto("mine")


def test_settings_come_from_the_checkpoint_but_paths_do_not(tmp_path: Path, run: Run) -> None:
    config = typed(f"trainer.resume={tmp_path}/mine", "optimizer.lr=1e-5", "trainer.max_steps=20")
    assert config.model.params["channels"] == [8, 16] and config.data_root != "elsewhere"
    source = resume.choose(resume.place(config), config)
    assert source is not None
    again = prepare(config, tiny_data(), CPU)
    told = "\n".join(resume.notes(source, again))
    assert "optimizer.lr was 0.001, is 1e-05" in told and "max_steps" not in told and "bit by bit" not in told
    again.environment |= {"device": "NVIDIA H200", "deterministic": "no"}
    told = "\n".join(resume.notes(source, again))
    assert "not bit by bit: device was CPU" in told and "trainer.deterministic=true" in told


def test_another_network_schedule_or_seed_is_another_run(tmp_path: Path, run: Run) -> None:
    for override in ("model.channels=[8,24]", "schedule=cosine", "seed=1", "objective=v", "dataset=mnist"):
        for again in (
            [*SMALL, "trainer.resume=auto", f"run_dir={tmp_path}/mine"],
            [f"trainer.resume={tmp_path}/mine"],
        ):
            config = typed(*again, override)
            key = override.partition("=")[0]
            with pytest.raises(CheckpointError, match=rf"cannot resume .*{key}.* was .*, is "):
                resume.choose(resume.place(config), config)


def test_a_folder_of_images_has_to_be_typed_again(tmp_path: Path) -> None:
    config = typed("dataset=folder", "dataset.path=/home/me/pictures", "model=unet_tiny", *SMALL)
    save(prepare(config, tiny_data(), CPU), tmp_path / "a.safetensors", {})
    with pytest.raises(UserError, match=r"dataset.path was '/home/me/pictures' .* type dataset.path="):
        typed(f"trainer.resume={tmp_path}/a.safetensors")
    config = typed(f"trainer.resume={tmp_path}/a.safetensors", "dataset.path=/new")
    assert config.dataset.params["path"] == "/new"


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and leftovers(tmp_path) == []


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"regular|directory"):
            open_regular(path)
        with pytest.raises(CheckpointError, match="cannot read"):
            checkpoint.read_meta(path)


def test_the_commit_is_read_without_running_git(tmp_path: Path) -> None:
    assert git.commit(tmp_path) is None
    folder, commit = tmp_path / ".git", "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs" / "heads").mkdir(parents=True)
    (folder / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    (tmp_path / "deeper").mkdir()
    assert git.commit(tmp_path / "deeper") == commit
    (folder / "refs" / "heads" / "main").write_text(commit.replace("0", "f") + "\n")
    assert git.commit(tmp_path) == commit.replace("0", "f")
    (folder / "HEAD").write_text(commit)
    assert git.commit(tmp_path) == commit
    for odd in ("ref: refs/../../secret", "ref: /etc/passwd", "\x1b[31m", "ref: refs/heads/none"):
        (folder / "HEAD").write_text(odd)
        assert git.commit(tmp_path) is None


def test_old_pickles_are_converted_without_running_them(tmp_path: Path, run: Run) -> None:
    from scripts import convert_pt

    weights = {f"module.{name}": tensor.double() + 1 for name, tensor in run.network.state_dict().items()}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "old.pt")
    like = checkpoint.find(str(tmp_path / "mine"))[0]
    convert_pt.convert(tmp_path / "old.pt", like, tmp_path / "new.safetensors")
    meta, tensors = checkpoint.load(tmp_path / "new.safetensors")
    name = next(iter(run.network.state_dict()))
    assert torch.equal(tensors[f"ema.{name}"], run.network.state_dict()[name] + 1) and meta.figures == {}

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        convert_pt.convert(tmp_path / "evil.pt", like, tmp_path / "new.safetensors")
    assert not (tmp_path / "ran").exists()
    torch.save({name: torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        convert_pt.convert(tmp_path / "other.pt", like, tmp_path / "new.safetensors")
