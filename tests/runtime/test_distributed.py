"""Several processes as one: the same trajectory, one folder, one log, and every way to stop; with torchrun and gloo.

In float64 the processes agree to 1e-10. In float32 sums over a batch are rounded in another order, about 1e-7 a step,
and Adam carries that on: losses are compared to 2e-5, and weights to 1e-4 but for a few whose true gradient is 0 (a
key's bias under softmax), where Adam makes whole steps of rounding.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddpm import build
from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check
from ddpm.errors import UserError
from ddpm.runs import resume
from ddpm.runtime import device, distributed
from ddpm.runtime.world import ALONE, World, world

pytestmark = pytest.mark.xdist_group("distributed")  # one after the other: each takes every core
WORKER = Path(__file__).with_name("double_worker.py")
SMALL = (
    "device=cpu",
    "model.channels=[8,16]",
    "model.head_dim=8",
    "trainer.batch_size=10",
    "trainer.log_every=1",
    "trainer.validate_every=5",
    "trainer.checkpoint_every=5",
    "trainer.sample_every=0",
    "trainer.max_steps=10",
)
LONG = (  # steps of a few milliseconds, enough of them to be interrupted
    "device=cpu",
    "model=mlp",
    "model.hidden=64",
    "trainer.batch_size=10",
    "trainer.max_steps=600",
    "trainer.log_every=60",
    "trainer.validate_every=0",
    "trainer.sample_every=0",
    "trainer.checkpoint_every=60",
)
ALL = (  # what could depend on how a batch is split
    "objective.timesteps=loss_aware",
    "schedule.num_timesteps=20",
    "model.conditional=true",
    "objective.label_dropout=0.2",
    "trainer.accumulate=2",
)


def start(
    folder: Path, processes: int, *command: str, flags: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    """`ddpm-…` or a script, of so many processes; 0: without torchrun."""
    bin = Path(sys.executable).parent
    program = [str(bin / command[0]), *command[1:]]
    if processes:
        how = [str(bin / "torchrun"), f"--nproc-per-node={processes}", *(flags or ("--standalone",))]
        program = [*how, "--no-python", *program]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    pipe = subprocess.PIPE
    return subprocess.Popen(program, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:  # torchrun's processes outlive it if it is killed
            for number in workers(process).values():
                os.kill(number, signal.SIGKILL)
            process.kill()
    return process.returncode, out, err


def done(folder: Path, processes: int, *command: str, flags: tuple[str, ...] = ()) -> str:
    """What it printed; it must succeed."""
    status, out, err = finish(start(folder, processes, *command, flags=flags))
    assert status == 0, out + err
    return out


def losses(run: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record.pop("step"): record for record in records}


def assert_same_run(a: Path, b: Path) -> None:
    """Every line of metrics.jsonl and the last weights, in float32."""
    ours, theirs = losses(a), losses(b)
    assert list(ours) == list(theirs)
    for step, record in ours.items():
        for name in record.keys() - {"images_per_second"}:
            assert record[name] == pytest.approx(theirs[step][name], abs=2e-5, rel=2e-4), (step, name)
    assert_same_weights(a, b)


def assert_same_weights(a: Path, b: Path) -> None:
    (meta, ours), (other, theirs) = (
        checkpoint.load(locate.saved_steps(run)[-1], "model", "ema") for run in (a, b)
    )
    assert meta.step == other.step and ours.keys() == theirs.keys()
    distance = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert (distance > 1e-4).double().mean() < 2e-2, distance.max()


def until(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def workers(torchrun: "subprocess.Popen[str]") -> dict[int, int]:
    """{rank: process number} of its children."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == torchrun.pid else []
        except OSError:
            continue
        found |= {
            int(v.removeprefix(b"RANK=")): int(folder.name) for v in variables if v.startswith(b"RANK=")
        }
    return found


def is_alive(number: int) -> bool:
    return Path(f"/proc/{number}").exists()


# --- one process by itself ---------------------------------------------------------------------------------------


def test_shares_are_whole_ordered_and_even() -> None:
    for n in (0, 1, 3, 10, 1024):
        for size in (1, 2, 4, 7):
            worlds = [World(rank, size) for rank in range(size)]
            parts = [list(range(n))[world.share(n)] for world in worlds]
            assert [i for part in parts for i in part] == list(range(n))
            lengths = [len(part) for part in parts]
            assert (
                lengths == worlds[0].lengths(n) == sorted(lengths, reverse=True)
                and lengths[0] - lengths[-1] <= 1
            )


def test_the_world_is_what_torchrun_says() -> None:
    said = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert world(said) == World(5, 8, 1, 4)
    assert world({}) == world({"WORLD_SIZE": "1", "RANK": "nonsense"}) == ALONE
    for key, value in (("RANK", "8"), ("LOCAL_RANK", "-1"), ("WORLD_SIZE", "many"), ("LOCAL_WORLD_SIZE", "")):
        with pytest.raises(UserError, match=f"{key}={value}: must be a number from"):
            world({**said, key: value})


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    two, three = World(3, 4, 1, 2), World(0, 3, 0, 3)
    assert device.device("auto", two) == device.device("cuda", two) == torch.device("cuda", 1)
    assert device.device("cpu", three) == torch.device("cpu")
    with pytest.raises(UserError, match="device=auto: 3 processes on a machine with 2 CUDA devices"):
        device.device("auto", three)
    with pytest.raises(UserError, match="device=cuda:1: 4 processes: must be auto, cpu or cuda"):
        device.device("cuda:1", two)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.device("auto", two) == torch.device("cpu")


def test_no_network_has_buffers() -> None:
    """DDP would send them around in every forward pass."""
    config = check(TrainConfig, hydra.compose("train", []))
    facts = build.dataset(config.dataset, config.data_root).facts
    for model in ("unet_tiny", "mlp"):
        config = check(TrainConfig, hydra.compose("train", [f"model={model}", "model.conditional=true"]))
        assert not list(build.network(config.model, config.objective, facts).buffers())


def composed(*overrides: str) -> TrainConfig:
    return check(TrainConfig, hydra.compose("train", list(overrides)))  # type: ignore[no-any-return]


def test_a_restart_goes_on_in_the_folder_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other" / "checkpoints" / "step_0000002.safetensors"
    other.parent.mkdir(parents=True)
    other.touch()

    def found(count: int, *overrides: str) -> resume.Place:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        return resume.place(composed(*overrides))

    for count in (0, 1):
        with pytest.raises(
            UserError, match=r"torchrun --max-restarts=3: name the folder to go on in with run_dir=…"
        ):
            found(count)
    for typed in ([], ["overwrite=true"], ["trainer.resume=auto"], ["trainer.resume=other/checkpoints"]):
        first, second = (found(count, "run_dir=run", *typed) for count in (0, 1))
        assert first.folder == second.folder == "run" and second.in_place and second.again
        assert first.in_place == first.again == ("trainer.resume=auto" in typed)
        other_run = "trainer.resume=other/checkpoints" in typed
        assert first.files == second.files == [other.relative_to(tmp_path)] * other_run
    own = tmp_path / "run" / "checkpoints" / "step_0000004.safetensors"
    own.parent.mkdir(parents=True)
    own.touch()
    assert found(1, "run_dir=run", "trainer.resume=other/checkpoints").files == [own.relative_to(tmp_path)]
    for key in ("MAX_RESTARTS", "RESTART_COUNT"):
        monkeypatch.delenv(f"TORCHELASTIC_{key}")
    assert resume.place(composed()) == resume.Place(None, False, [])


# --- several processes -------------------------------------------------------------------------------------------


def in_double(folder: Path, processes: int, steps: int, *overrides: str) -> dict[str, torch.Tensor]:
    result = folder / f"{processes}.pt"
    small = ("model.channels=[8,16]", "model.head_dim=8", "trainer.batch_size=10")
    done(folder, processes, "python", str(WORKER), str(result), str(steps), *small, *overrides)
    return torch.load(result)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("sizes", "steps", "overrides"),
    [
        ((2,), 15, ALL),
        pytest.param((2, 4), 50, ALL, marks=pytest.mark.slow),
        pytest.param((2, 3), 50, ("objective=v", "objective.weight=min_snr"), marks=pytest.mark.slow),
    ],
    ids=["2", "2 and 4", "2 and 3"],
)
def test_in_float64_the_trajectories_are_one(
    tmp_path: Path, sizes: tuple[int, ...], steps: int, overrides: tuple[str, ...]
) -> None:
    alone = in_double(tmp_path, 0, steps, *overrides)
    for size in sizes:
        several = in_double(tmp_path, size, steps, *overrides)
        assert several.pop("images") == -(-10 // size) * steps  # rank 0 computes its share and no more
        assert (
            several.pop("messages") == 1
        )  # this network fits into one bucket: one message, however many parts
        for name, numbers in several.items():
            distance = (numbers - alone[name]).abs().max().item()
            assert distance < 1e-10, (size, name, distance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `alone`, of one process."""
    folder = tmp_path_factory.mktemp("home")
    done(folder, 0, "ddpm-train", *SMALL, "run_dir=alone")
    return folder


@pytest.mark.slow
def test_the_command_trains_and_samples_the_same(alone: Path, tmp_path: Path) -> None:
    out = done(alone, 2, "ddpm-train", *SMALL, "run_dir=two")
    assert out.count("2 processes") == 1 and out.count("done in") == 1 and out.count("step ") >= 10
    assert_same_run(alone / "alone", alone / "two")
    names = [
        {str(file.relative_to(run)) for file in run.rglob("*")} for run in (alone / "alone", alone / "two")
    ]
    assert names[0] == names[1]
    about = json.loads((alone / "two" / "environment.json").read_text())
    assert about["processes"] == "2"
    order = ("ckpt=alone", "n=9", "batch_size=4", "sampler.num_steps=5", "save=[grid,npz,trajectory]")
    for name, processes in (("one", 0), ("two", 2)):
        done(alone, processes, "ddpm-sample", *order, f"out={tmp_path / name}")
    pictures = [np.load(tmp_path / name / "samples.npz")["images"].astype(int) for name in ("one", "two")]
    assert pictures[0].shape == (9, 8, 8) and np.abs(pictures[0] - pictures[1]).max() <= 1
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        file.name for file in (tmp_path / "two").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.accumulate=2",),
        ALL,
        ("model=mlp", "trainer.batch_size=13", "optimizer.decay=constant"),
        ("trainer.precision=bf16",),
        ("model=mlp", "model.hidden=32", "trainer.compile=true"),
    ],
    ids=str,
)
def test_the_command_trains_the_same_on_1_2_and_4(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    settings = [s for s in SMALL if not (overrides[0] == "model=mlp" and s.startswith("model."))]
    for processes in (1, 2, 4):
        done(tmp_path, processes, "ddpm-train", *settings, *overrides, f"run_dir=on-{processes}")
    low = "bf16" in str(
        overrides
    )  # whose rounding is 2^-8: one image's loss shows it, and sums do not hide it
    for processes in (2, 4):
        if low:
            ours, theirs = losses(tmp_path / "on-1"), losses(tmp_path / f"on-{processes}")
            assert all(ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-2) for step in ours)
        else:
            assert_same_run(tmp_path / "on-1", tmp_path / f"on-{processes}")


@pytest.mark.slow
def test_previews_dropout_and_fp16_run_on_several(tmp_path: Path) -> None:
    """Dropout depends on the number of processes; the run is as repeatable as any."""
    for name in ("a", "b"):
        done(
            tmp_path, 2, "ddpm-train", *SMALL, "model.dropout=0.3", "trainer.precision=fp16", "trainer.sample_every=5",
            f"run_dir={name}",
        )  # fmt: skip
    files = [locate.saved_steps(tmp_path / name)[-1] for name in ("a", "b")]
    assert checkpoint.read_meta(files[0])[0].sha256 == checkpoint.read_meta(files[1])[0].sha256
    assert len(list((tmp_path / "a" / "samples").glob("*.png"))) == 2


@pytest.mark.slow
def test_sigterm_stops_all_at_one_step_and_another_number_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "ddpm-train", *LONG, "run_dir=run")
    until(lambda: locate.saved_steps(tmp_path / "run"), process)
    ranks = workers(process)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGUSR1)  # any of them may be asked to save
    until(lambda: "SIGUSR1" in (tmp_path / "run" / "train.log").read_text(), process)
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert status != 0 and not any(map(is_alive, ranks.values()))
    log = (tmp_path / "run" / "train.log").read_text()
    stopped = re.findall(r"stopped by SIGTERM at step (\d+); go on with", log)
    assert len(stopped) == 1 and out.count("stopped by") == 1 and "ddpm-train:" not in err, out + err
    assert log.count("(SIGUSR1)") == 1
    assert locate.step_of(locate.saved_steps(tmp_path / "run")[-1]) == int(stopped[0]) < 600
    on = done(tmp_path, 0, "ddpm-train", "trainer.resume=run")
    assert f"going on from step {int(stopped[0]):,}" in on and "processes was 2, is 1" in on
    records = losses(tmp_path / "run")
    done(tmp_path, 0, "ddpm-train", *LONG, "run_dir=alone")
    whole = losses(tmp_path / "alone")
    assert list(records) == list(whole)
    for step, record in records.items():  # rounding goes further in hundreds of steps than in ten
        assert record["loss"] == pytest.approx(whole[step]["loss"], rel=2e-3), step


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 4])
def test_a_run_of_two_goes_on_with_another_number(tmp_path: Path, then: int) -> None:
    settings = (*SMALL, *ALL, "trainer.max_steps=15")
    done(tmp_path, 0, "ddpm-train", *settings, "run_dir=whole")
    process = start(tmp_path, 2, "ddpm-train", *settings, "run_dir=half")
    until(lambda: locate.saved_steps(tmp_path / "half"), process)
    for number in workers(process).values():
        os.kill(number, signal.SIGKILL)
    assert finish(process)[0] != 0
    for file in locate.saved_steps(tmp_path / "half")[1:]:
        file.unlink()
    (tmp_path / "half" / "checkpoints" / "best.safetensors").unlink()
    done(tmp_path, then, "ddpm-train", *settings, "run_dir=half", "trainer.resume=auto")
    assert_same_run(tmp_path / "whole", tmp_path / "half")


@pytest.mark.slow
def test_a_killed_worker_comes_again_in_the_same_folder(tmp_path: Path) -> None:
    flags = ("--standalone", "--max-restarts=2")
    process = start(tmp_path, 2, "ddpm-train", *LONG, "run_dir=run", flags=flags)
    until(lambda: locate.saved_steps(tmp_path / "run"), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    status, out, err = finish(process)
    assert status == 0, out + err
    # the survivor has one line, if it hears of it before it is told to end
    assert err.count("ddpm-train:") <= 1 and "Traceback" not in err, err
    assert "going on from step" in out and list(losses(tmp_path / "run")) == list(range(60, 601, 60))
    done(tmp_path, 2, "ddpm-train", *LONG, "run_dir=unbroken")
    files = [locate.saved_steps(tmp_path / name)[-1] for name in ("run", "unbroken")]
    a, b = (checkpoint.read_meta(file)[0] for file in files)
    assert a.step == b.step == 600 and a.sha256 == b.sha256  # the same number of processes: the same bits


@pytest.mark.parametrize(
    ("processes", "mistake", "says"),
    [
        (2, "trainer.batch_size=1", "trainer.batch_size=1: it is shared by 2 processes"),
        pytest.param(
            4, "trainer.batch_size=3", "batch_size=3: it is shared by 4 processes", marks=pytest.mark.slow
        ),
        pytest.param(4, "trainer.lr=1", "unknown key 'trainer.lr'", marks=pytest.mark.slow),
        pytest.param(2, "trainer.resume=nowhere", "nowhere", marks=pytest.mark.slow),
        pytest.param(
            2, "run_dir=taken", "taken is not empty: overwrite=true replaces", marks=pytest.mark.slow
        ),
        pytest.param(2, "optimizer.lr=1e30", "that update was not made", marks=pytest.mark.slow),
        pytest.param(2, "-m", "-m makes several runs", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, processes: int, mistake: str, says: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    status, out, err = finish(start(tmp_path, processes, "ddpm-train", *SMALL, mistake))
    lines = [line for line in err.splitlines() if line.startswith("ddpm-train:")]
    assert status != 0 and len(lines) == 1 and says in lines[0], out + err
    assert not [line for line in err.splitlines() if "Error" in line and "ddpm" in line], err


BROKEN = {  # what a plug-in does to rank 1, and what is said of it
    "memory": (
        "train",
        "import torch, ddpm.train.step as t\n"
        "def losses(*a): raise torch.OutOfMemoryError('CUDA out of memory')\nt.losses = losses",
        "ddpm-train: rank 1: out of memory on cpu with trainer.batch_size=10 trainer.accumulate=1 in 2 processes",
    ),
    "data": (
        "train",
        "import dataclasses, ddpm.build as b\nwhole = b.dataset\n"
        "def dataset(*a):\n    d = whole(*a)\n    return dataclasses.replace(d, train=d.val)\nb.dataset = dataset",
        "ddpm-train: rank 1: data is ",
    ),
    "folder": (
        "train",
        "import ddpm.build as b\ndef dataset(*a): raise PermissionError(13, 'Permission denied', 'digits')\n"
        "b.dataset = dataset",
        "ddpm-train: rank 1: Permission denied: digits",
    ),
    "sample": (
        "sample",
        "import ddpm.sample.sampling as s\nfrom ddpm.errors import UserError\n"
        "def finite(*a): raise UserError('not finite')\ns.finite = finite",
        "ddpm-sample: rank 1: not finite",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_what_goes_wrong_in_one_process_ends_all_with_its_line(alone: Path, what: str) -> None:
    program, code, says = BROKEN[what]
    indented = "\n".join("    " + line for line in code.splitlines())
    (alone / f"broken_{what}.py").write_text(f"import os\nif os.environ.get('RANK') == '1':\n{indented}\n")
    settings = (*SMALL, f"run_dir={what}") if program == "train" else ("ckpt=alone", "n=4", f"out={what}")
    begun = time.monotonic()
    status, out, err = finish(start(alone, 2, f"ddpm-{program}", f"plugins=[broken_{what}]", *settings))
    lines = [line for line in err.splitlines() if line.startswith(f"ddpm-{program}:")]
    assert status != 0 and time.monotonic() - begun < 60 and any(line.startswith(says) for line in lines), (
        out + err
    )
    # memory runs out in one process alone: the other loses its peer, or torchrun's SIGTERM comes before it notices
    others = ("another process of this run has ended", "stopped by SIGTERM") if what == "memory" else ()
    accepted = (says, *(f"ddpm-{program}: {other}" for other in others))
    assert all(line.startswith(accepted) for line in lines) and len(lines) <= 1 + bool(others), err
    assert err.count("Traceback") == err.count("ChildFailedError(") == 1, err  # torchrun's own
    assert not list((alone / what).glob("**/*.safetensors"))
    assert program == "train" or not (alone / what).exists()


def test_a_broken_nccl_group_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a public method of torch's: to destroy the group would wait for the processes that are lost."""
    calls = []

    class Group:
        class WORLD:
            @staticmethod
            def abort() -> None:
                calls.append("abort")

    assert callable(dist.ProcessGroup.abort)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(dist, "group", Group)
    distributed._leave(broken=True)
    distributed._leave(broken=False)
    assert calls == ["abort", "destroy"]
