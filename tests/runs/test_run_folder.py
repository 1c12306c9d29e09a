"""A run's folder: locked, never overwritten by accident, swept of leftovers; and where a run may go on."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check, to_dict
from ddpm.errors import CheckpointError, UserError
from ddpm.io.files import leftovers, open_regular, write_atomically
from ddpm.networks.kernels import group_norm
from ddpm.runs import open_run, resume, run_dir
from ddpm.train import environment
from ddpm.train.checkpointing import save
from ddpm.train.state import TrainState, prepare
from tests.train.test_training import CPU, tiny_data

SMALL = ["model.channels=[8,16]", "model.head_dim=8", "trainer.max_steps=9"]


def typed(*overrides: str) -> TrainConfig:
    """As the command line composes it, what a resumed run was told included."""
    given = hydra.read_overrides(list(overrides))
    return check(TrainConfig, hydra.compose("train", resume.before_typed(given) + given))  # type: ignore[no-any-return]


@pytest.fixture
def run(tmp_path: Path) -> TrainState:
    """A run with checkpoints of its steps 2 and 5 in `tmp_path/mine`."""
    run = prepare(typed(*SMALL, "data_root=elsewhere"), tiny_data(), CPU)
    for step in (2, 5):
        run.step = step
        folder = tmp_path / "mine" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        save(run, folder / f"step_{step:07d}.safetensors", {})
    (tmp_path / "mine" / "config.yaml").write_text(OmegaConf.to_yaml(to_dict(run.config)))
    return run


def test_a_folder_is_locked_until_its_holder_ends(tmp_path: Path) -> None:
    held = run_dir.claim(str(tmp_path), overwrite=False, fresh=True)
    code = f"from ddpm.runs import run_dir as run_folder; run_folder.claim({str(tmp_path)!r}, False, fresh=False)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is in use by another process" in other.stderr
    held.release()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    run_dir.claim(str(tmp_path), False, fresh=True).release()  # the other process has ended


def test_a_claim_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    run_dir.claim(str(tmp_path / "a" / "b"), False, fresh=True).release()
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        run_dir.claim(str(tmp_path), False, fresh=True)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt"}


def test_a_folder_that_has_gone_is_released_without_a_word(tmp_path: Path) -> None:
    held = run_dir.claim(str(tmp_path / "a"), False, fresh=True)
    (tmp_path / "a" / ".lock").unlink()
    (tmp_path / "a").rmdir()
    held.release()


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft lock in its place would outlive a process that is killed."""

    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot use run_dir=.*: Function not implemented"):
        run_dir.claim(str(tmp_path / "a"), False, fresh=True)


def test_only_what_a_run_makes_is_ever_deleted(tmp_path: Path, run: TrainState) -> None:
    mine = tmp_path / "mine"
    with pytest.raises(UserError, match="is not empty: overwrite=true replaces"):
        run_dir.claim(str(mine), overwrite=False, fresh=True)
    (mine / "thesis.txt").write_text("years of work")
    (mine / "checkpoints" / "epoch_3.ckpt").write_bytes(b"of another tool")
    (mine / "samples").mkdir()
    (mine / "samples" / "step_0000002.png").write_bytes(b"")
    run_dir.claim(str(mine), overwrite=True, fresh=True).release()
    run_dir.clear(mine)
    left = {str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file()}
    assert left == {"thesis.txt", "checkpoints/epoch_3.ckpt"} and not (mine / "samples").exists()
    with pytest.raises(UserError, match="other things than a run"):
        run_dir.claim(str(mine), overwrite=True, fresh=True)


def test_auto_begins_anew_only_where_nothing_but_a_beginning_lies(tmp_path: Path) -> None:
    """Killed before the first checkpoint: the same command may start again; a stranger's folder is left alone."""
    for part in ("checkpoints", "samples"):
        (tmp_path / part).mkdir()
    for name in ("train.log", "config.yaml", ".lock", "samples/step_0000003.png", ".a.7.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(to_dict(typed(*SMALL))))
    assert run_dir.more_than_begun(tmp_path) == ""
    for name in ("checkpoints/epoch_3.ckpt", "samples/paper_figure.png", "thesis.txt", ".vimrc.tmp"):
        (tmp_path / name).write_bytes(b"")
        assert run_dir.more_than_begun(tmp_path), name
        (tmp_path / name).unlink()
    (tmp_path / "checkpoints" / "best.safetensors").write_bytes(b"")
    assert run_dir.more_than_begun(tmp_path)


def test_leftovers_of_killed_processes_are_swept(tmp_path: Path, run: TrainState) -> None:
    left = tmp_path / "mine" / "checkpoints" / ".step_0000007.safetensors.99.0123abcd.tmp"
    left.write_bytes(b"half")
    (tmp_path / "mine" / ".notes.tmp").write_bytes(b"mine")
    run_dir.sweep(tmp_path / "mine")
    assert not left.exists() and (tmp_path / "mine" / ".notes.tmp").exists()
    assert len(locate.saved_steps(tmp_path / "mine")) == 2


def test_files_ahead_of_the_step_are_set_aside(tmp_path: Path, run: TrainState) -> None:
    folder = tmp_path / "mine" / "checkpoints"
    save(run, folder / "best.safetensors", {})  # of step 5
    notes = run_dir.set_aside(tmp_path / "mine", 2)
    assert len(notes) == 2 and "step_0000005" in notes[0] and "best" in notes[1]
    save(run, folder / "step_0000005.safetensors", {})
    run_dir.set_aside(tmp_path / "mine", 2)
    names = {path.name for path in (folder / "set_aside").iterdir()}
    assert names == {"step_0000005.safetensors", "step_0000005-2.safetensors", "best.safetensors"}
    assert [path.name for path in folder.glob("*.safetensors")] == ["step_0000002.safetensors"]


def test_best_is_gone_on_from_where_it_is_the_newest(tmp_path: Path, run: TrainState) -> None:
    run.step = 3
    best = tmp_path / "mine" / "checkpoints" / "best.safetensors"
    save(run, best, {})
    order = [path.stem for path in locate.of_run(tmp_path / "mine")]
    assert order == ["step_0000005", "best", "step_0000002"]
    run.step = 5
    save(run, best, {})
    assert [path.stem for path in locate.of_run(tmp_path / "mine")][:2] == ["step_0000005", "best"]
    best.write_bytes(b"broken")
    assert [path.stem for path in locate.of_run(tmp_path / "mine")][-1] == "best"


def test_results_that_make_no_sense_are_none(tmp_path: Path) -> None:
    for text in (
        "[]",
        "7",
        "{",
        '{"step": 1}',
        '{"step": [], "val_eps_mse": 1, "val_eps_mse_error": 1}',
        "[" * 9999,
    ):
        (tmp_path / "result.json").write_text(text)
        assert run_dir.read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"step": 1, "val_eps_mse": 0.5, "val_eps_mse_error": 0.1}')
    assert run_dir.read_result(tmp_path) == {"step": 1, "val_eps_mse": 0.5, "val_eps_mse_error": 0.1}


def test_a_run_goes_on_in_its_own_folder_or_a_new_one(
    tmp_path: Path, run: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, file = str(tmp_path / "mine"), tmp_path / "mine" / "checkpoints" / "step_0000002.safetensors"
    for wanted, folder, in_place in (
        ([f"trainer.resume={mine}"], mine, True),
        ([f"trainer.resume={file}"], mine, True),
        ([f"trainer.resume={file}", f"run_dir={tmp_path}/other"], f"{tmp_path}/other", False),
        ([f"trainer.resume={file}", f"run_dir={tmp_path}/../{tmp_path.name}/mine"], None, True),
    ):
        place = resume.place(typed(*wanted))
        assert place.in_place == in_place and (folder is None or place.folder == folder)
        assert place.files == ([] if wanted[0].endswith("mine") else [file])
    loose = tmp_path / "sent_by_a_colleague.safetensors"
    loose.write_bytes(file.read_bytes())
    place = resume.place(typed(f"trainer.resume={loose}"))
    assert place.folder is None and not place.in_place
    monkeypatch.chdir(tmp_path)  # names that mean something else elsewhere
    (tmp_path / "outputs" / "x").mkdir(parents=True)
    (tmp_path / "mine").rename(tmp_path / "outputs" / "x" / "other")
    for name in ("latest", "checkpoints"):
        config = typed(*SMALL, "trainer.resume=auto", f"run_dir={name}")
        assert open_run.choose(resume.place(config), config) is None


def test_auto_begins_goes_on_and_never_begins_again_over_broken_files(
    tmp_path: Path, run: TrainState
) -> None:
    def auto(name: str) -> open_run.Source | None:
        config = typed(*SMALL, "trainer.resume=auto", f"run_dir={tmp_path}/{name}")
        return open_run.choose(resume.place(config), config)

    assert auto("new") is None
    source = auto("mine")
    assert source is not None and source.meta.step == 5
    newest, oldest = reversed(locate.saved_steps(tmp_path / "mine"))
    newest.write_bytes(newest.read_bytes()[:-1])
    source = auto("mine")
    assert source is not None and source.path == oldest and str(newest) in source.notes[0]
    oldest.write_bytes(b"")
    with pytest.raises(CheckpointError, match="nor is any other of the 2"):
        auto("mine")


def test_a_longer_run_is_asked_for_in_either_way(tmp_path: Path, run: TrainState) -> None:
    epochs = prepare(typed(*SMALL[:2], "trainer.max_epochs=1"), tiny_data(), CPU)
    save(epochs, tmp_path / "a.safetensors", {})
    longer = typed(f"trainer.resume={tmp_path}/a.safetensors", "trainer.max_steps=60").trainer
    assert longer.max_steps == 60 and longer.max_epochs is None
    longer = typed(f"trainer.resume={tmp_path}/a.safetensors", "trainer.max_epochs=3").trainer
    assert longer.max_epochs == 3
    config = typed(f"trainer.resume={tmp_path}/mine", "trainer.max_steps=90")
    source = open_run.choose(resume.place(config), config)
    assert source is not None
    told = open_run.notes(source, prepare(config, tiny_data(), CPU))
    assert any("optimizer.decay=cosine to step 90" in note for note in told)


def test_settings_come_from_the_checkpoint_but_paths_do_not(tmp_path: Path, run: TrainState) -> None:
    config = typed(f"trainer.resume={tmp_path}/mine", "optimizer.lr=1e-5", "trainer.max_steps=20")
    assert config.model.params["channels"] == [8, 16] and config.data_root != "elsewhere"
    source = open_run.choose(resume.place(config), config)
    assert source is not None
    again = prepare(config, tiny_data(), CPU)
    told = "\n".join(open_run.notes(source, again))
    assert "optimizer.lr was 0.001, is 1e-05" in told and "max_steps" not in told and "bit by bit" not in told
    again.environment |= {"device": "NVIDIA H200", "deterministic": "no"}
    told = "\n".join(open_run.notes(source, again))
    assert "not bit by bit: device was CPU" in told and "trainer.deterministic=true" in told


def test_a_weight_that_was_another_function_is_named(tmp_path: Path, run: TrainState) -> None:
    begun = prepare(typed(*SMALL, "objective.weight=sigmoid"), tiny_data(), CPU)
    for version, words in ((begun.environment["weight"], ""), (None, "weight was 1, is 2 (half the slope")):
        del begun.environment["weight"]
        begun.environment |= {"weight": version} if version else {}
        save(begun, tmp_path / "sigmoid.safetensors", {})
        config = typed(f"trainer.resume={tmp_path}/sigmoid.safetensors")
        source = open_run.choose(resume.place(config), config)
        assert source is not None
        told = "\n".join(open_run.notes(source, prepare(config, tiny_data(), CPU)))
        assert words in told and ("bit by bit" in told) == bool(words)


def test_what_decides_bits_on_a_cpu_is_compared(
    tmp_path: Path, run: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = typed(f"trainer.resume={tmp_path}/mine")
    source = open_run.choose(resume.place(config), config)
    assert source is not None

    def told() -> str:
        return "\n".join(open_run.notes(source, prepare(config, tiny_data(), CPU)))

    assert "bit by bit" not in told()
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "ATEN_CPU_CAPABILITY"):
        monkeypatch.setenv(variable, "AVX2")
        assert re.search(f"not bit by bit: variables was .*, is .*{variable}=AVX2", told())
        monkeypatch.delenv(variable)
    for name, value in (("_processor", "another"), ("_libraries", "others")):
        with monkeypatch.context() as patch:
            patch.setattr(environment, name, lambda *_, value=value: value)
            assert f"not bit by bit: {name.lstrip('_')} was" in told()
    with monkeypatch.context() as patch:
        patch.setattr(group_norm, "missing", lambda _: "")
        patch.setattr(group_norm, "code", lambda _: "GCC 99")
        assert re.search("group_norm_code was .*, is GCC 99", told())
    for key in ("processor", "libraries", "variables", "group_norm_code"):
        source.meta.versions.pop(key)
    (line,) = [line for line in told().splitlines() if "bit by bit" in line]
    assert line.endswith("too old to say group_norm_code, processor, libraries, variables")


def test_what_a_variable_holds_fits_into_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = []
    for end in "ab":
        monkeypatch.setenv("MKL_ODD", "\x1b[2J\n\udcff" + "x" * 2000 + end)
        save(prepare(typed(*SMALL), tiny_data(), CPU), tmp_path / "a.safetensors", {})
        stored.append(checkpoint.read_meta(tmp_path / "a.safetensors")[0].versions)
    assert stored[0]["variables"] != stored[1]["variables"]
    assert {key for key in stored[0] if stored[0][key] != stored[1][key]} == {"variables"}


def test_another_network_schedule_or_seed_is_another_run(tmp_path: Path, run: TrainState) -> None:
    for override in ("model.channels=[8,24]", "schedule=cosine", "seed=1", "objective=v", "dataset=mnist"):
        for again in (
            [*SMALL, "trainer.resume=auto", f"run_dir={tmp_path}/mine"],
            [f"trainer.resume={tmp_path}/mine"],
        ):
            config = typed(*again, override)
            key = override.partition("=")[0]
            with pytest.raises(CheckpointError, match=rf"cannot resume .*{key}.* was .*, is "):
                open_run.choose(resume.place(config), config)


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
    with pytest.raises(OSError, match="regular"):  # or replaced by a file
        write_atomically(tmp_path / "pipe", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_the_commit_is_that_of_the_repository_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_DIR", raising=False)  # git sets it in a hook
    assert environment.commit(tmp_path) is None

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=me", "-c", "user.email=me@here")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    assert environment.commit(tmp_path) is None  # nothing is committed yet
    git("commit", "--quiet", "--allow-empty", "--message=one")
    (tmp_path / "deeper").mkdir()
    first = git("log", "-1", "--format=%H")
    assert environment.commit(tmp_path / "deeper") == first
    git("pack-refs", "--all")
    assert environment.commit(tmp_path) == first
    git("checkout", "--quiet", "--detach")
    git("commit", "--quiet", "--allow-empty", "--message=two")
    assert environment.commit(tmp_path) == git("log", "-1", "--format=%H") != first
    head = (tmp_path / ".git" / "HEAD").read_text()
    for odd in ("ref: refs/../../secret", "ref: /etc/passwd", "\x1b[31m", "ref: refs/heads/none"):
        (tmp_path / ".git" / "HEAD").write_text(odd)
        assert environment.commit(tmp_path) is None
    (tmp_path / ".git" / "HEAD").write_text(head)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    (odd / ".git").write_bytes(b"gitdir: /nowhere/caf\xe9\n")  # which git's message quotes
    assert environment.commit(odd) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit(tmp_path) is None  # git is not installed


def test_old_pickles_are_converted_without_running_them(tmp_path: Path, run: TrainState) -> None:
    from scripts import convert_pt

    weights = {f"module.{name}": tensor.double() + 1 for name, tensor in run.network.state_dict().items()}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "old.pt")
    like = locate.find(str(tmp_path / "mine"))[0]
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
