"""Helpers for tests that drive the real console scripts."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other

# A shell starts what runs in its background with SIGINT ignored, and all that it starts: no Ctrl-C to test then.
signal.signal(signal.SIGINT, signal.default_int_handler)

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run_script(
    program: str, *arguments: str, cwd: Path, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """`ddpm-<program> arguments…` as the installed console script runs it."""
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
    """Console scripts that run in an empty folder."""
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
