"""Helpers for tests that drive the commands."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import forks

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other

# A shell starts what runs in its background with SIGINT ignored, and all that it starts: no Ctrl-C to test then.
signal.signal(signal.SIGINT, signal.default_int_handler)

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run_script(
    program: str, *arguments: str, cwd: Path, real: bool = False, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """`ddpm-<program> arguments…` in a fork that has imported everything; `real`: as the installed script runs it."""
    if not real:
        done = forks.run(program, *arguments, cwd=cwd, limited=False, **environment)
        return subprocess.CompletedProcess(done.command, done.status, done.stdout, done.stderr)
    script = Path(sys.executable).with_name(f"ddpm-{program}")
    return subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Commands that run in an empty folder."""
    return lambda program, *arguments, **environment: run_script(
        program, *arguments, cwd=tmp_path, **environment
    )


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """Print what tests recorded under "summary", each line once."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    told = {
        value
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == "summary"
    }
    for line in sorted(told):
        terminalreporter.write_line(line)
