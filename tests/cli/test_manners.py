"""How the commands behave to people, terminals and shells."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm.cli.train_progress import estimate
from ddpm.config.choices import CONFIG_DIR
from tests.conftest import run_script

COMMANDS = sorted(file.stem for file in CONFIG_DIR.glob("*.yaml"))
BIN = Path(sys.executable).parent
QUICK = ["model.channels=[8,16]", "model.head_dim=8", "trainer.max_steps=3", "trainer.batch_size=8"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_three_examples(command: str, tmp_path: Path) -> None:
    lines = run_script(command, "--help", cwd=tmp_path).stdout.splitlines()
    assert lines[0].startswith(f"ddpm-{command}: ") and lines[1] == ""
    assert all(line.startswith(f"  ddpm-{command}") for line in lines[2:5])


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_tab_completes_commands_groups_and_keys(tmp_path: Path) -> None:
    """As docs/quickstart.md says to install it."""
    (line,) = re.findall(
        r"^for .*-sc install=bash.*$", (Path(__file__).parents[2] / "docs/quickstart.md").read_text(), re.M
    )
    script = line + "\n" + "\n".join(
        f'COMP_LINE="{typed}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({typed}); COMP_CWORD=1; '
        "hydra_bash_completion; echo ${COMPREPLY[@]}"
        for typed in ("ddpm-train schedule=", "ddpm-train trainer.m", "ddpm-sample sampler=d", "ddpm-info ck")
    )  # fmt: skip
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.stdout.splitlines() == [
        "schedule=cosine schedule=linear schedule=sigmoid schedule=straight",
        "trainer.max_epochs= trainer.max_steps=",
        "sampler=ddim sampler=ddpm sampler=dpmpp_2m sampler=dpmpp_2m_sde",
        "ckpt=",
    ], result.stderr


@pytest.mark.slow
def test_a_bar_and_no_colours_on_a_terminal(tmp_path: Path) -> None:
    """With NO_COLOR (https://no-color.org) or without: nothing is ever coloured."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows, columns
    child = subprocess.Popen(
        [BIN / "ddpm-train", *QUICK], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            text += (more := os.read(ours, 65536))
        except OSError:  # how Linux says that the other side is closed
            break
        if not more:
            break
    os.close(ours)
    assert child.wait() == 0
    assert b"step/s" in text and not re.search(rb"\x1b\[[0-9;]*m", text)


@pytest.mark.parametrize(
    "name, device, steps, seconds_per_step, named",
    [
        ("mnist", "cpu", 20_000, 1.0, True),
        ("mnist", "cpu", 2_400, 1.0, False),  # that of mnist_cpu itself
        ("mnist", "cpu", 20_000, 0.01, False),
        ("mnist", "cuda", 20_000, 1.0, False),
        ("kmnist", "cpu", 20_000, 1.0, False),
    ],
)
def test_the_short_experiment_is_named_where_it_is_shorter(
    name: str, device: str, steps: int, seconds_per_step: float, named: bool
) -> None:
    run: Any = SimpleNamespace(
        facts=SimpleNamespace(name=name), device=torch.device(device), max_steps=steps, step=0
    )
    assert ("experiment=mnist_cpu is the short one" in estimate(run, seconds_per_step)) == named
