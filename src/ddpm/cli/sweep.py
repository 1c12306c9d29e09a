"""`ddpm-train -m`: every job checked, then Hydra's launcher in a process of its own, then a table of what came out.

Who is responsible for whom: this process holds the lock of the sweep's folder and heeds signals; `launch.py` runs
Hydra and its launcher, whose workers each run `job.py`, which watches one `ddpm-train`. A job ends, with a checkpoint,
when the file `.stop` appears in the folder, when the lock is free, or when the one who watches it is gone.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm import report, report_table
from ddpm.cli import hydra_app, job, leases, run_folder, signals, tensorboard
from ddpm.cli.progress import tell, typed
from ddpm.config import TrainConfig, check
from ddpm.errors import UserError

LOCAL = ("joblib", "submitit_local")  # launchers that run several jobs at once on this machine
OF_SWEEP = ("run_dir",)  # what is said of the sweep and not of its jobs


def sweep(overrides: list[str]) -> None:
    """The whole of a multirun. Raises UserError, also where a job did not finish."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("-m makes several runs, torchrun several processes of one: leave one of them out")
    if hydra_app.typed_value(overrides, "trainer.resume") not in (None, "null", "auto"):
        raise UserError("trainer.resume=<run> goes on with one run; -m makes several: leave one of them out")
    of_hydra = [o for o in overrides if o.lstrip("+~").startswith("hydra")]
    of_jobs = [o for o in overrides if o not in of_hydra and o.partition("=")[0] not in OF_SWEEP]
    if any(o.lstrip("+~").startswith(("hydra.sweep.", "hydra.run.")) for o in of_hydra):
        raise UserError(
            "run_dir=… names the sweep's folder, and each job's follows from what is typed for it"
        )
    settings = hydra_app.hydra_settings("train", of_hydra)
    choice = settings["runtime"]["choices"]
    jobs = _planned(of_jobs, choice["hydra/sweeper"])
    run_dir = hydra_app.typed_value(overrides, "run_dir")
    folder, lock = _claim(run_dir)
    try:
        count = f"{len(jobs)} jobs" if jobs else f"jobs by {choice['hydra/sweeper']}"
        tell(f"{count} in {folder}")
        limits, environment = _shares(of_hydra, of_jobs, choice["hydra/launcher"], settings, len(jobs))
        where = hydra_app.quote_path(f"hydra.sweep.dir={folder}", always=True)
        status = _launch(["-m", *of_hydra, *of_jobs, *limits, where], environment, folder)
        _tell_results(folder, [job.name(overrides) for overrides in jobs], of_jobs)
    finally:
        lock.release()
    if (number := signals.stop_requested()) is not None:
        tell(f"stopped by {signals.name(number)}; the same command with run_dir={typed(folder)} goes on")
        raise signals.Stopped(number, said=True)
    if status != 0:
        raise UserError(f"not all jobs finished; the same command with run_dir={typed(folder)} tries again")


def _planned(overrides: list[str], sweeper: str) -> list[list[str]]:
    """The overrides of each job, composed and checked; none where a sweeper decides them as it goes.

    Raises UserError.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        if sweeper != "basic":
            fixed = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
            _check(fixed)
            return []
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise UserError(hydra_app.one_line(error, "train")) from None
    for overrides in jobs:
        _check(overrides)
    names = [job.name(overrides) for overrides in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two jobs are the same: {twice[0]}")
    return jobs


def _check(overrides: list[str]) -> None:
    config: TrainConfig = check(TrainConfig, hydra_app.compose("train", overrides))
    tensorboard.check(config)
    if config.gpus is not None:
        leases.allowed(config.gpus, config.device, sys.maxsize)


def _tell_results(folder: Path, planned: list[str], of_jobs: list[str]) -> None:
    """The table of what is there, and what looks closer."""
    figure = hydra_app.typed_value(of_jobs, "minimize") or "val_eps_mse"
    with suppress(UserError):  # no run at all
        tell(report_table.table(report.read_all([folder], run_folder.is_running), figure))
    if missing := sum(not (folder / name).is_dir() for name in planned):
        tell(f"{missing} of {len(planned)} jobs were not begun")
    tell(f"pictures and CSV: ddpm-report {typed(folder)}")


def _claim(run_dir: str | None) -> tuple[Path, Any]:
    """The sweep's folder, new unless it was named, and its lock. Raises UserError."""
    if run_dir in (None, "null"):
        folder = hydra_app.run_folder("outputs/multirun")
    else:
        folder = Path(str(run_dir))
        if (folder / "checkpoints").exists():
            raise UserError(f"run_dir={folder} is a single run; a sweep needs a folder of its own")
    lock = run_folder.lock(folder)
    (folder / job.STOP).unlink(missing_ok=True)
    return folder, lock


def _shares(
    of_hydra: list[str], of_jobs: list[str], launcher: str, settings: dict[str, Any], planned: int
) -> tuple[list[str], dict[str, str]]:
    """As many jobs at once as there are places: on GPUs, or with the CPU's threads divided among them."""
    gpus = [] if hydra_app.typed_value(of_jobs, "gpus") else ["gpus=auto"]
    if launcher not in LOCAL:
        return gpus, {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = hydra_app.typed_value(of_jobs, "device") or "auto"
    places = 0
    if device != "cpu":
        each = hydra_app.typed_value(of_jobs, "jobs_per_gpu") or "1"
        wanted = hydra_app.typed_value(of_jobs, "gpus") or "auto"
        if wanted != "null":
            places = len(leases.allowed(wanted, device, len(leases.visible()))) * int(each)
    at_once = settings["launcher"].get("n_jobs", -1)
    limits = []
    if launcher == "joblib":
        limits = ["hydra.launcher.batch_size=1"]  # joblib would hand out short jobs in bundles
        if at_once == -1:
            at_once = min(places or cores, planned or sys.maxsize)
            limits.append(f"hydra.launcher.n_jobs={at_once}")
    else:
        at_once = planned or settings["sweeper"].get("n_jobs", 1)
    if places or "OMP_NUM_THREADS" in os.environ:
        return gpus + limits, {}
    tell(f"{at_once} at once, {max(1, cores // at_once)} of {cores} CPU threads each")
    return gpus + limits, {"OMP_NUM_THREADS": str(max(1, cores // at_once))}


def _launch(arguments: list[str], environment: dict[str, str], folder: Path) -> int:
    """Hydra with these arguments, until all its jobs have ended; returns its exit status."""
    plugins = [a.removeprefix("plugins=").strip("[] ") for a in sys.argv[1:] if a.startswith("plugins=")]
    environment = {**os.environ, **environment, job.PLUGINS: ",".join(plugins), "HYDRA_FULL_ERROR": "1"}
    with signals.patient():
        launcher = subprocess.Popen(
            [sys.executable, "-P", "-m", "ddpm.cli.launch", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        while launcher.poll() is None:
            if signals.stop_requested() is not None:
                (folder / job.STOP).touch()
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(signals.GRACE + 5)
                break
            time.sleep(job.POLL)
    if launcher.returncode != 0:
        _end_all(launcher, folder)
    (folder / job.STOP).unlink(missing_ok=True)
    return launcher.wait()


def _end_all(launcher: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Where the launcher did not end well, whatever it has left behind: first its jobs, which save."""
    (folder / job.STOP).touch()
    for _ in range(round(signals.GRACE / job.POLL)):
        if not any(run_folder.is_running(path) for path in folder.iterdir() if path.is_dir()):
            break
        time.sleep(job.POLL)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(launcher.pid, signal.SIGKILL)
