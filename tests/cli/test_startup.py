"""What the user waits for before anything happens: whatever is slow to import and not needed is not imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ddpm.cli.completion import completions
from ddpm.config import choices
from ddpm.config.choices import CONFIG_DIR, known_keys
from tests.conftest import run_script

SLOW = {"torch", "torch._dynamo", "torchvision", "sklearn", "matplotlib", "hydra", "omegaconf", "diffusers"}
REPORT = f"""
import atexit, sys
def imported():
    print("imported", *sorted({SLOW} & sys.modules.keys()), flush=True)
atexit.register(imported)
sys.argv[0] = "ddpm"
"""
FIRST_STEP = """
import ddpm.train.loop
step = ddpm.train.loop.train_step
def first(*given):
    if ddpm.train.loop.train_step is first:
        result = step(*given)
        imported()
        ddpm.train.loop.train_step = step
        return result
ddpm.train.loop.train_step = first
"""
QUICK = [
    "model.channels=[8,16]",
    "model.head_dim=8",
    "trainer.max_steps=1",
    "trainer.batch_size=8",
    "device=cpu",
]


def imported(program: str, *arguments: str, cwd: Path, before: str = "") -> list[set[str]]:
    """Which of SLOW the command had imported, each time that it was asked, and at its end."""
    code = f"{REPORT}{before}\nfrom ddpm.cli.entry import {program}\n{program}()"
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    found = [set(words[1:]) for words in lines if words[:1] == ["imported"]]
    assert found, result.stderr
    return found


def test_help_and_tab_need_neither_torch_nor_hydra(tmp_path: Path) -> None:
    assert imported("train", "--help", cwd=tmp_path) == [set()]
    assert imported("train", "-sc", "query=bash", cwd=tmp_path) == [set()]


def test_a_mistake_needs_no_torch(tmp_path: Path) -> None:
    for mistake in ("optimizer.lrr=1", "optimizer.lr=-1"):
        assert imported("train", mistake, cwd=tmp_path) == [{"hydra", "omegaconf"}]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_training_and_sampling_need_no_compiler_and_no_torchvision(tmp_path: Path, optimizer: str) -> None:
    """Torch's compiler takes a second to import, and much of torch imports it in passing."""
    needed = {"torch", "hydra", "omegaconf"}
    typed = [
        *QUICK,
        f"optimizer={optimizer}",
        "run_dir=run",
        "model.conditional=true",
        "trainer.precision=bf16",
    ]
    assert imported("train", *typed, cwd=tmp_path, before=FIRST_STEP) == [needed, needed | {"matplotlib"}]
    assert imported("sample", "ckpt=run", "n=2", "device=cpu", cwd=tmp_path) == [needed]


@pytest.mark.parametrize("file", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda file: file.stem)
def test_our_yaml_is_what_hydra_reads(file: Path) -> None:
    ours, theirs = choices.read_yaml(file), OmegaConf.to_container(OmegaConf.load(file))
    assert repr(ours) == repr(theirs)  # 1 is not 1.0


@pytest.mark.parametrize(
    "typed",
    ["schedule=", "schedule=s", "sampler=heun sampler.c", "trainer.m", "objective", "device=", "none"],
)
def test_tab_says_what_hydra_would(typed: str, tmp_path: Path) -> None:
    line = f"ddpm-train {typed}"
    hydra = run_script("train", "-sc", "query=fish", cwd=tmp_path, COMP_LINE=line)
    assert completions("train", line) == hydra.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "ddpm-train trainer.precision=",
            [f"trainer.precision={p}" for p in ("auto", "bf16", "fp16", "fp32", "tf32")],
        ),
        ("ddpm-train overwrite=t", ["overwrite=true"]),
        ("ddpm-train model.ch", ["model.channels="]),
        ("ddpm-eval d", ["data_root=", "dataset.", "dataset=", "device="]),
        ("ddpm-train sampler.ch", []),  # of another sampler than the default
        (
            "ddpm-sample ckpt=latest sampler.churn_n",
            ["sampler.churn_noise="],
        ),  # which may be the checkpoint's
        ("ddpm-train experiment=mnist_cpu schedule.ta", ["schedule.tau="]),
        ("ddpm-train run_dir=r", ["run_dir=runs/"]),
        ("ddpm-train run_dir=runs/", ["run_dir=runs/a.txt"]),
        ("ddpm-info ", ["ckpt="]),
        ("ddpm-train trainer.precision=fp32 ", [f"{key}=" for key in known_keys("train") if "." not in key]),
    ],
)
def test_tab(line: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/a.txt").touch()
    monkeypatch.chdir(tmp_path)
    found = completions(line.split()[0].removeprefix("ddpm-"), line)
    assert [word for word in found if not (line.endswith(" ") and word.endswith("."))] == sorted(expected)


def test_tab_offers_no_path_that_a_shell_would_run(tmp_path: Path) -> None:
    for name in ("plain-1.0", "$(touch x)", "`id`", "two words", "semi;colon", "quo'te"):
        (tmp_path / name).mkdir()
    assert completions("train", f"ddpm-train dataset.path={tmp_path}/") == [
        f"dataset.path={tmp_path}/plain-1.0/"
    ]
