"""`ddpm-train -m`: check every job, run Hydra's launcher in a subprocess, print a table of the results.

This process holds the lock of the sweep's folder and handles signals. `launch.py` runs Hydra and its launcher, whose
workers each run `job.py`, which watches one `ddpm-train`. A job saves a checkpoint and ends when the file `.stop`
appears in the folder, when the lock is free or another sweep's, or when its parent process is gone.
"""

import itertools
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpm.config import hydra
from ddpm.config.overrides import quoted, typed_value
from ddpm.config.schema import TrainConfig, check
from ddpm.config.unused import refuse_unused
from ddpm.errors import UserError
from ddpm.io.files import write_atomically
from ddpm.report import runs, table
from ddpm.runs import resume
from ddpm.runs import run_dir as run_folder
from ddpm.runtime import gpu_locks, signals
from ddpm.runtime.console import tell, typed
from ddpm.sweep import job
from ddpm.train import loggers

LOCAL = ("joblib", "submitit_local")  # launchers that run several jobs at once on this machine
# settings of Hydra that have an effect with -m
OF_HYDRA = r"hydra[./](launcher|sweeper)\b|hydra\.(callbacks|searchpath|job\.env_)"
# A plug-in would end too early what the user did not limit: a search after one failure, jobs after an hour.
UNLIMITED = {
    ("hydra/sweeper", "optuna"): "hydra.sweeper.max_failure_rate=1.0",
    ("hydra/launcher", "submitit_local"): "hydra.launcher.timeout_min=525600",
}


def sweep(overrides: list[str]) -> None:
    """Run a multirun. Raises UserError, also where a job did not finish."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("-m makes several runs, torchrun several processes of one: leave one of them out")
    if typed_value(overrides, "trainer.resume") not in (None, "null", "auto"):
        raise UserError("trainer.resume=<run> goes on with one run; -m makes several: leave one of them out")
    resume.check_lengths(overrides)
    if not (each := typed_value(overrides, "jobs_per_gpu") or "1").isdecimal():
        raise UserError(f"jobs_per_gpu={each}: must be one whole number, for all jobs alike")
    of_hydra = [o for o in overrides if o.lstrip("+~").startswith("hydra")]
    of_jobs = [o for o in overrides if o not in of_hydra and not o.startswith("run_dir=")]
    for each in of_hydra:
        if not re.match(OF_HYDRA, each.lstrip("+~")):
            raise UserError(f"{each}: -m takes launchers and sweepers; run_dir=… names the sweep's folder")
    settings = hydra.hydra_settings("train", of_hydra)
    choice = settings["runtime"]["choices"]
    jobs = _planned(of_jobs, choice["hydra/sweeper"])
    shares, environment, note = _shares(of_jobs, choice["hydra/launcher"], settings, len(jobs))
    for (group, name), limit in UNLIMITED.items():
        if choice[group] == name and typed_value(of_hydra, limit.partition("=")[0]) is None:
            shares.append(limit)
    claim = _claim(typed_value(overrides, "run_dir"))
    folder = claim.path
    try:
        count = f"{len(jobs)} jobs" if jobs else f"jobs by {choice['hydra/sweeper']}"
        tell(f"{count} in {folder}{note}; how they do: ddpm-report {typed(folder)}")
        where = f"hydra.sweep.dir={quoted(str(folder))}"
        arguments = ["-m", *of_hydra, *of_jobs, *shares, where]
        status = _launch(arguments, environment, folder, job.is_far(choice["hydra/launcher"]))
        _tell_results(folder, [job.name(overrides) for overrides in jobs], of_jobs)
    finally:
        claim.release()
    if (number := signals.stop_requested()) is not None:
        tell(f"stopped by {signals.name(number)}; the same command with run_dir={typed(folder)} goes on")
        raise signals.Stopped(number, said=True)
    if status != 0:
        raise UserError(f"not all jobs finished; the same command with run_dir={typed(folder)} tries again")


def _planned(overrides: list[str], sweeper: str) -> list[list[str]]:
    """Return the overrides of each job, composed and checked; none where a sweeper decides them as it goes.

    Of such a sweeper's jobs one is checked, with the first of all values. Raises UserError.
    """
    values: dict[str, list[str]] = {}  # by key: the last of several overrides of a key counts
    with hydra.parsed("train", overrides) as all_parsed:
        for override in all_parsed:
            if sweeper != "basic" and override.is_sweep_override() and not override.is_discrete_sweep():
                unrolled = [f"{override.get_key_element()}={override.value().start}"]
            else:
                unrolled = hydra.unrolled(override)
            values[override.get_key_element()] = unrolled if sweeper == "basic" else unrolled[:1]
    jobs = [list(each) for each in itertools.product(*values.values())]
    configs = [_checked(each) for each in jobs]
    if sweeper == "basic":  # another one may choose what gives a setting its effect
        refuse_unused([(job.of_experiment(each), config) for each, config in zip(jobs, configs, strict=True)])
    names = [job.name(each) for each in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two jobs are the same: {twice[0]}")
    return jobs if sweeper == "basic" else []


def _checked(overrides: list[str]) -> TrainConfig:
    config: TrainConfig = check(TrainConfig, hydra.compose("train", overrides))
    resume.check_batch(config.trainer)
    loggers.check(config.logger)
    gpu_locks.allowed(config.gpus or "auto", config.device)
    if config.trainer.init_from == "latest":
        raise UserError("trainer.init_from=latest: each job would look for another one; name the run")
    return config


def _tell_results(folder: Path, planned: list[str], of_jobs: list[str]) -> None:
    """Print the table of the runs, the best of them, and how to look closer."""
    figure = typed_value(of_jobs, "minimize") or "val_eps_mse"
    rows = []
    with suppress(UserError):  # no run at all
        rows = runs.read_all([folder], run_folder.is_running)
        tell(table.table(rows, figure))
    if missing := sum(not (folder / name).is_dir() for name in planned):
        tell(f"{missing} of {len(planned)} jobs were not begun")
    if best := table.best(rows, figure):
        tell(best)
    tell(f"pictures and CSV: ddpm-report {typed(folder)}")


def _claim(run_dir: str | None) -> run_folder.Claim:
    """Lock the sweep's folder: a new one unless it was named; else new, empty or a sweep's. Raises UserError."""
    if run_dir in (None, "null"):
        return run_folder.claim_new("outputs/multirun")
    claim = run_folder.lock(Path(str(run_dir)))
    try:
        if claim.before - {run_folder.LOCK} and not job.is_sweep(claim.path):
            what = "a single run" if (claim.path / "checkpoints").exists() else "not empty and no sweep"
            raise UserError(f"run_dir={claim.path} is {what}; a sweep needs a folder of its own")
        (claim.path / job.STOP).unlink(missing_ok=True)
    except BaseException:
        claim.release()
        raise
    return claim


def _shares(
    of_jobs: list[str], launcher: str, settings: Any, planned: int
) -> tuple[list[str], dict[str, str], str]:
    """Run as many jobs at once as there are places: on GPUs, or with the CPU's threads divided among them.

    Returns overrides and environment variables for that, and a note for the user. Raises UserError.
    """
    gpus, device = typed_value(of_jobs, "gpus"), typed_value(of_jobs, "device") or "auto"
    shares, places = [] if gpus else ["gpus=auto"], 0
    asked = launcher in LOCAL or (launcher == "basic" and (gpus or device.startswith("cuda")))
    if asked and device != "cpu" and gpus != "null":
        numbers = gpu_locks.allowed(gpus or "auto", device, len(gpu_locks.visible()))
        places = len(numbers) * int(typed_value(of_jobs, "jobs_per_gpu") or 1)
    if launcher not in LOCAL:
        return shares, {}, ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = planned or settings["sweeper"].get("n_jobs") or cores
    if launcher == "joblib":
        at_once = settings["launcher"]["n_jobs"]
        if at_once != -1 and at_once < 1:
            raise UserError(f"hydra.launcher.n_jobs={at_once}: must be at least 1, or -1 for as many as fit")
        if at_once == -1:
            at_once = min(places or cores, planned or sys.maxsize)
        # joblib would hand out short jobs in bundles
        shares += [f"hydra.launcher.n_jobs={at_once}", "hydra.launcher.batch_size=1"]
    if places or "OMP_NUM_THREADS" in os.environ:
        return shares, {}, f", {at_once} at once"
    threads = max(1, cores // at_once)
    note = f", {at_once} at once with {threads} of {cores} CPU threads each"
    return shares, {"OMP_NUM_THREADS": str(threads)}, note


def _launch(arguments: list[str], environment: dict[str, str], folder: Path, far: bool) -> int:
    """Run Hydra with these arguments in a subprocess and wait for all jobs. Returns its exit status.

    `far`: the jobs run under Slurm, without this process; one that is lost is no reason to stop the others.
    """
    token = secrets.token_hex(8)
    write_atomically(folder / job.OWNER, token.encode(), durable=False)
    plugins = [a.removeprefix("plugins=").strip("[] ") for a in sys.argv[1:] if a.startswith("plugins=")]
    environment = {**os.environ, **environment, job.PLUGINS: ",".join(plugins), job.TOKEN: token}
    with signals.defer_signals():
        launcher = subprocess.Popen(
            [sys.executable, "-P", "-m", "ddpm.sweep.launch", *arguments],
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
        if not far:
            _end_all(folder)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(launcher.pid, signal.SIGKILL)
    if not far:  # whose queue may hold jobs that are yet to see it
        (folder / job.STOP).unlink(missing_ok=True)
    return launcher.wait()


def _end_all(folder: Path) -> None:
    """Ask the jobs that a failed launcher left behind to save and end; wait for them for a while."""
    (folder / job.STOP).touch()
    for _ in range(round(signals.GRACE / job.POLL)):
        if not any(run_folder.is_running(path) for path in folder.iterdir() if path.is_dir()):
            break
        time.sleep(job.POLL)
