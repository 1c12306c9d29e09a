"""Sweeps as they are typed: real processes; what is pretended is only how many GPUs there are."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check
from ddpm.errors import UserError
from ddpm.runs import run_dir
from ddpm.runtime import gpu_locks
from ddpm.sweep import job
from ddpm.sweep import sweep as sweeps
from ddpm.sweep.job import MAX_NAME, name
from tests.conftest import run_script

TINY = [
    "model.channels=[8,16]",
    "model.num_blocks=1",
    "model.attention=[]",
    "model.head_dim=8",
    "trainer.batch_size=8",
    "trainer.sample_every=0",
]
ENDLESS = [*TINY, "trainer.max_steps=100000", "trainer.validate_every=0", "trainer.checkpoint_every=0"]

# A plug-in that stands for two GPUs: their number, and a device to compute on. It notes who is on which GPU, and
# whom it met there alive.
FAKE = """
import os, time
from pathlib import Path
import torch
from ddpm.runtime import device as runtime_device
from ddpm.runtime import gpu_locks as leases

leases.visible = lambda: ["0", "1"]
real = runtime_device.device

def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

def device(name, *world):
    if not name.startswith("cuda"):
        return real(name)
    home = Path(os.environ["FAKE_GPUS"]) / name
    home.mkdir(parents=True, exist_ok=True)
    met = [other.name for other in home.iterdir() if alive(other.name)]
    (home / str(os.getpid())).touch()
    with open(home.parent / "log", "a") as log:
        log.write(f"{name} {len(met) + 1} {os.getpid()}\\n")
    return real("cpu")

runtime_device.device = device
"""


def start(*arguments: str, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [Path(sys.executable).with_name("ddpm-train"), "-m", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.1)


def processes(folder: Path) -> list[int]:
    """All that work in a folder, but for zombies: whatever they are called, however far they got away."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            here = entry.name.isdecimal() and os.readlink(entry / "cwd") == str(folder)
            if here and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def saved(sweep: Path) -> set[str]:
    return {path.parents[1].name for path in sweep.glob("*/checkpoints/step_*.safetensors")}


def begun(sweep: Path, count: int) -> Callable[[], bool]:
    """Whether so many jobs have trained some steps."""
    return lambda: sum(path.stat().st_size > 0 for path in sweep.glob("*/metrics.jsonl")) >= count


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.slow
@pytest.mark.parametrize(("count", "kills"), [(3, 1), (8, 2)])
def test_jobs_share_two_gpus_one_each_also_where_some_are_killed(
    tmp_path: Path, count: int, kills: int
) -> None:
    """And the same command, with one more value, skips what is done, continues what broke and adds what is new."""
    (tmp_path / "two_gpus.py").write_text(FAKE)
    seen = tmp_path / "seen"
    settings = ["plugins=two_gpus", "run_dir=sweep", "hydra/launcher=joblib", *TINY, "trainer.max_steps=20"]
    environment = {"FAKE_GPUS": str(seen), "TMPDIR": str(tmp_path)}
    seeds = ",".join(map(str, range(count)))
    sweep = start(f"seed={seeds}", "hydra.launcher.n_jobs=4", *settings, cwd=tmp_path, **environment)

    def log() -> list[list[str]]:
        return [line.split() for line in (seen / "log").read_text().splitlines()] if seen.exists() else []

    for number in range(kills):
        until(lambda number=number: len(log()) > number * 3 or sweep.poll() is not None)  # type: ignore[misc]
        os.kill(int(log()[-1][2]), signal.SIGKILL)
    output, _ = sweep.communicate(timeout=200)
    assert [line[1] for line in log()] == ["1"] * count, log()  # nobody ever met another one
    assert {line[0] for line in log()} == {"cuda:0", "cuda:1"}
    assert (
        output.count("failed: killed by signal 9") == kills and output.count(": done in") == count - kills
    ), output
    assert sweep.returncode == 2 and "not all jobs finished" in output
    assert processes(tmp_path) == []

    again = run_script("train", "-m", f"seed={seeds},{count}", *settings, cwd=tmp_path, **environment)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(": done already:") == count - kills
    assert again.stdout.count(": done in") == kills + 1
    assert len(list(tmp_path.glob("sweep/*/result.json"))) == count + 1
    assert not list(tmp_path.glob("sweep/*/failed.txt"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("how", "launcher"),
    [
        ("SIGTERM", "basic"),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("SIGTERM", "joblib"),
                ("SIGINT to all", "basic"),
                ("SIGINT to all", "joblib"),
                ("SIGKILL", "joblib"),
                ("SIGKILL", "basic"),
                ("SIGTERM", "submitit_local"),
                ("SIGINT to all", "submitit_local"),
                ("SIGKILL", "submitit_local"),
            )
        ],
    ],
)
def test_nothing_outlives_the_sweep_and_every_job_is_saved(tmp_path: Path, how: str, launcher: str) -> None:
    sweep = start("seed=0,1,2", f"hydra/launcher={launcher}", "run_dir=sweep", *ENDLESS, cwd=tmp_path)
    at_once = {"basic": 1, "joblib": 2, "submitit_local": 3}[launcher]
    at_once = min(at_once, len(os.sched_getaffinity(0))) if launcher == "joblib" else at_once
    until(begun(tmp_path / "sweep", at_once))
    working = {path.parent.name for path in tmp_path.glob("sweep/*/metrics.jsonl")}
    started = time.monotonic()
    if how == "SIGINT to all":  # as a terminal does it
        os.killpg(sweep.pid, signal.SIGINT)
    else:
        sweep.send_signal(getattr(signal, how))
    output, _ = sweep.communicate(timeout=30) if how != "SIGKILL" else ("", sweep.wait())
    until(lambda: not processes(tmp_path), 20)
    assert time.monotonic() - started < 12
    assert saved(tmp_path / "sweep") == working  # saved, and no further one begun
    assert {path.parent.name for path in tmp_path.glob("sweep/*/metrics.jsonl")} == working
    if how != "SIGKILL":
        assert sweep.returncode == 128 + {"SIGTERM": 15, "SIGINT to all": 2}[how]
        assert "run_dir=sweep goes on" in output and "Traceback" not in output, output


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["ddpm.sweep.launch", "popen_loky_posix"])
def test_jobs_end_with_whoever_stood_between_them_and_the_sweep(tmp_path: Path, victim: str) -> None:
    """SIGKILL to the process in the middle, or to a worker of joblib's, which then kills all under the others."""
    sweep = start("seed=0,1", "hydra/launcher=joblib", "run_dir=sweep", *ENDLESS, cwd=tmp_path)
    until(begun(tmp_path / "sweep", min(2, len(os.sched_getaffinity(0)))))
    working = {path.parent.name for path in tmp_path.glob("sweep/*/metrics.jsonl")}
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in processes(tmp_path)}
    os.kill(next(pid for pid, line in lines.items() if victim in line), signal.SIGKILL)
    output, _ = sweep.communicate(timeout=40)
    assert sweep.returncode == 2 and "not all jobs finished" in output, output
    until(lambda: not processes(tmp_path), 20)
    assert saved(tmp_path / "sweep") == working or victim != "ddpm.sweep.launch"


@pytest.mark.slow
def test_a_failing_job_leaves_the_others_running(tmp_path: Path) -> None:
    arguments = ["-m", "model.head_dim=8,5", *[o for o in TINY if "head_dim" not in o]]
    arguments += ["hydra/launcher=joblib", "run_dir=sweep", "trainer.max_steps=3"]
    result = run_script("train", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stdout + result.stderr
    assert result.stderr.splitlines() == [
        "ddpm-train: not all jobs finished; the same command with run_dir=sweep tries again"
    ]
    assert (
        result.stdout.count(": done in") == 1 and result.stdout.count(": failed: model=unet: channels=") == 1
    )
    (failed,) = tmp_path.glob("sweep/*/failed.txt")
    assert "head_dim=5" in failed.parent.name and "divisible" in failed.read_text()
    *_, head, done, broken, best, last = result.stdout.splitlines()
    assert "val_eps_mse" in head and " done " in done
    assert " failed " in broken
    assert best.startswith("best: ddpm-sample ckpt='sweep/") and last == "pictures and CSV: ddpm-report sweep"
    again = run_script("train", *arguments, cwd=tmp_path)
    assert (
        again.returncode == 2
        and again.stdout.count(": done already: ") == again.stdout.count(": failed: ") == 1
    )


@pytest.mark.slow
def test_a_fault_in_a_plug_in_is_told_whole_and_kept_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import ddpm\n"
        "from ddpm.data.digits import digits\n"
        "@ddpm.register('dataset')\n"
        "def odd(data_root, count=0):\n"
        "    if count == 1:\n"
        "        raise KeyError('no such thing')\n"
        "    return digits(data_root)\n"
    )
    arguments = ["-m", "plugins=mine", "dataset=odd", "dataset.count=1,2", "model=mlp", "trainer.max_steps=2"]
    result = run_script(
        "train", *arguments, "trainer.batch_size=8", "hydra/launcher=joblib", "run_dir=s", cwd=tmp_path
    )
    assert result.returncode == 2 and "Traceback" in result.stdout and result.stdout.count(": done in") == 1
    (failed,) = tmp_path.glob("s/*/failed.txt")
    assert failed.read_text() == "KeyError: 'no such thing'" and "count=1" in failed.parent.name


@pytest.mark.slow
def test_optuna_minimises_what_the_jobs_return(tmp_path: Path) -> None:
    """hydra-optuna-sweeper 1.3 with optuna 2.10."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    result = run_script(
        "train",
        *["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "run_dir=best"],
        *[
            "hydra/sweeper/sampler=random",
            "hydra.sweeper.sampler.seed=1",
            "optimizer.lr=tag(log,interval(1e-5,1e-2))",
        ],
        *[*TINY, "trainer.max_steps=8", "trainer.validate_every=4", "minimize=val_loss"],
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    figures = {}
    for path in tmp_path.glob("best/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        figures[path.parent.name] = min(line["val_loss"] for line in lines if "val_loss" in line)
    assert len(figures) == 2
    found = (tmp_path / "best" / "optimization_results.yaml").read_text()
    value = float(found.rpartition("best_value:")[2].split()[0])
    assert value == min(figures.values())
    best = min(figures, key=lambda run: figures[run])
    assert found.partition("optimizer.lr:")[2].split()[0] in best


@pytest.mark.slow
def test_mistakes_are_found_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".owner").write_text("somebody else's")
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        (["seed=0,0"], "two jobs are the same"),
        (["seed=0,1", "gpus=a,b"], "gpus=a,b: must be auto, or numbers"),
        (["seed=0,1", "hydra/launcher=jobib"], "hydra/launcher=jobib: must be one of basic"),
        (["seed=0,1", "run_dir=run"], "is a single run"),
        (["seed=0,1", "run_dir=mine"], "run_dir=mine is not empty and no sweep"),
        (["seed=range(0,0)", "run_dir=new/deep"], "seed=range(0,0): holds no value"),
        (
            ["seed=0,1", "trainer.batch_size=4", "trainer.accumulate=5"],
            "trainer.accumulate=5: must be at most",
        ),
        (["seed=0,1", "hydra.sweep.dir=here"], "run_dir=… names the sweep's folder"),
        (["seed=0,1", "logger=wandb"], "logger=wandb: must be one of files, tensorboard"),
        (["seed=0,1", "device=cdua"], "device=cdua: must be auto, cpu, cuda or cuda:<number>"),
        (["seed=0,1", "device=cuda:7"], "device=cuda:7: this machine has"),
        (["seed=0,1", "gpus=auto", "trainer.init_from=latest"], "trainer.init_from=latest: each job"),
        (["seed=0,1", "trainer.max_steps=5", "trainer.max_epochs=1"], "both say how long to train"),
        (["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "n_jobs=0: must be at least 1"),
        (["seed=0,1", "jobs_per_gpu=1,2"], "jobs_per_gpu=1,2: must be one whole number"),
        (["seed=0,1", "minimize=fid"], "minimize=fid: must be one of val_eps_mse, val_loss"),
        (["seed=0,1", "jobs_per_gpu=0"], "jobs_per_gpu=0"),
    ):
        result = run_script("train", "-m", *arguments, cwd=tmp_path)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_jobs_whose_evidence_is_gone_fail_and_lose_nothing(tmp_path: Path) -> None:
    sweep = ["-m", *TINY, "trainer.max_steps=2", "seed=1,2,3", "run_dir=s"]
    assert run_script("train", *sweep, cwd=tmp_path).returncode == 0
    folders = sorted(path for path in (tmp_path / "s").iterdir() if path.is_dir())
    (folders[0] / "checkpoints").rename(tmp_path / "on_a_disk")
    (folders[1] / "checkpoints").rename(tmp_path / "on_another")
    (folders[1] / "checkpoints").symlink_to("/mnt/no/disk")
    folders[2].rename(tmp_path / "job")
    folders[2].symlink_to("/mnt/no/disk")
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    for more in ([], ["overwrite=true", "seed=2,3"]):  # the link counts as evidence, also to replace
        result = run_script("train", *sweep, *more, cwd=tmp_path)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert "cannot write to" in result.stdout
        after = {path: path.read_bytes() for path in before if path.exists()}
        of_start = (job.OWNER, "multirun.yaml")  # say what was started last
        assert {path: data for path, data in before.items() if path.name not in of_start} == {
            path: data for path, data in after.items() if path.name not in of_start
        }


def test_every_job_is_planned_and_checked() -> None:
    assert len(sweeps._planned(["schedule=glob(*)", "seed=range(3)", "gpus=auto"], "basic")) == 12
    searched = [
        "dataset=choice(mnist,kmnist)",
        "dataset.image_size=32",
        "optimizer.lr=tag(log,interval(1e-5,1e-2))",
    ]
    assert sweeps._planned(searched, "optuna") == []
    with pytest.raises(UserError, match=r"dataset\.image_size"):
        sweeps._planned(["dataset=choice(digits,mnist)", "dataset.image_size=32"], "optuna")


def test_jobs_are_those_of_hydras_own_sweeper() -> None:
    """Whose class is private: it runs the jobs, and this notices when it names them otherwise than we do."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    typed = ["seed=1,2", "dataset=folder", "dataset.path='a b','c=d'", "schedule=glob(c*)", "seed=range(3)"]
    typed += ["model.channels=[8,16],[16]", "optimizer.lr=1e-3", "trainer.keep=2", "run_dir=null"]
    with hydra.parsed("train", typed) as parsed:
        (theirs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert sweeps._planned(typed, "basic") == theirs and len(theirs) == 12


def test_a_job_belongs_to_the_start_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to the next one in the same folder, whose lock looks the same."""
    lock = run_dir.lock(tmp_path)
    (tmp_path / job.OWNER).write_text("first")
    monkeypatch.setenv(job.TOKEN, "first")
    assert not job._orphaned(tmp_path)
    (tmp_path / job.OWNER).write_text("second")
    assert job._orphaned(tmp_path)
    monkeypatch.setenv(job.TOKEN, "second")
    lock.release()
    assert job._orphaned(tmp_path)


def test_the_name_of_a_job_fits_a_file_system_and_stays_its_own() -> None:
    assert name(["seed=1", "+run_dir=a", "gpus=auto", "schedule=cosine"]) == "schedule=cosine,seed=1"
    assert name([]) == "defaults"
    paths = [name([f"dataset.path='{text}'"]) for text in ("a/b", "a_b", "a b", "ا" * 300, "ا" * 301)]
    assert len(set(paths)) == 5 and all(
        len(path.encode()) <= MAX_NAME + 9 and "/" not in path for path in paths
    )


def config(**changes: object) -> TrainConfig:
    return check(TrainConfig, hydra.compose("train", [f"{key}={value}" for key, value in changes.items()]))  # type: ignore[no-any-return]


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_locks, "visible", lambda: ["3", "GPU-5e"])
    monkeypatch.setattr(gpu_locks.tempfile, "gettempdir", lambda: str(tmp_path))


def take(say: Callable[[str], None], **changes: object) -> gpu_locks.GpuLock | None:
    own = config(**changes)
    return gpu_locks.take(own.gpus, own.device, own.jobs_per_gpu, say)


def taken(**changes: object) -> gpu_locks.GpuLock | None:
    """None where it would have to wait."""

    class Waits(Exception):
        pass

    def say(_: str) -> None:
        raise Waits

    try:
        return take(say, **changes)
    except Waits:
        return None


def test_a_gpu_is_held_alone_or_by_as_many_as_agreed(two_gpus: None) -> None:
    first, second = taken(gpus="auto"), taken(gpus="auto")
    assert first and second and {first.device, second.device} == {"cuda:0", "cuda:1"}
    assert taken(gpus="auto") is None and taken(gpus="auto", jobs_per_gpu=2) is None
    second.release()
    shared = [taken(gpus="auto", jobs_per_gpu=2) for _ in range(3)]
    assert [lease.device for lease in shared if lease] == ["cuda:1", "cuda:1"]
    assert taken(gpus="auto") is None
    first.release()
    others = [taken(gpus="auto", jobs_per_gpu=2) for _ in range(3)]
    assert [lease.device for lease in others if lease] == ["cuda:0", "cuda:0"]


def test_the_emptiest_gpu_is_taken_first(two_gpus: None) -> None:
    held = [taken(gpus="auto", jobs_per_gpu=3) for _ in range(6)]
    assert [lease.device for lease in held if lease] == ["cuda:0", "cuda:1"] * 3


def test_only_gpus_that_are_named_and_there_are_taken(two_gpus: None) -> None:
    (lease,) = [taken(gpus="'1'")]
    assert lease and lease.device == "cuda:1" and taken(gpus="'1'") is None
    lease.release()
    pinned = taken(gpus="auto", device="'cuda:1'")
    assert pinned and pinned.device == "cuda:1"
    assert take(print, gpus="auto", device="cpu") is None
    assert take(print) is None
    with pytest.raises(UserError, match="gpus=0,2: this machine has 2 CUDA devices"):
        take(print, gpus="'0,2'")


def test_locks_are_not_put_into_a_folder_of_somebody_else(two_gpus: None, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"ddpm-gpus-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="belongs to somebody else"):
        taken(gpus="auto")
    assert not list((tmp_path / "elsewhere").iterdir())
