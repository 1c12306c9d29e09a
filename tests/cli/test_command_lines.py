"""Mistakes on the command line: one clear line, exit status not 0, nothing written."""

from pathlib import Path

import pytest

from tests.conftest import Command

WRONG = [
    ("train", ["trainer.max_stepz=5"], "unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
    ("train", ["optimizr.lr=1e-3"], "did you mean 'optimizer.lr'?"),
    ("train", ["+foo=1"], "unknown key 'foo'"),
    ("train", ["+trainer.foo=1"], "unknown key 'trainer.foo'"),
    ("train", ["schedule=cosin"], "schedule=cosin: must be one of cosine, linear"),
    ("train", ["dataset=mnits"], "did you mean 'mnist'?"),
    ("train", ["experiment=nothing"], "experiment=nothing: must be one of"),
    ("train", ["optimizer.lr=nan"], "optimizer.lr=nan: must be a finite number above 0"),
    ("train", ["optimizer.lr=fast"], "optimizer.lr=fast: must be a finite number above 0"),
    ("train", ["optimizer.lr=-1e-3"], "optimizer.lr=-0.001"),
    ("train", ["schedule.num_timesteps=0"], "schedule.num_timesteps=0: must be a number from 1 to 100000"),
    ("train", ["schedule.num_timesteps=10.5"], "schedule.num_timesteps=10.5"),
    ("train", ["trainer.batch_size=1e3"], "trainer.batch_size=1000.0"),
    ("train", ["trainer.precision=fp8"], "must be one of auto, fp32, tf32, bf16, fp16"),
    ("train", ["trainer.compile=yess"], "trainer.compile=yess: must be one of auto, true, false"),
    ("train", ["trainer.max_epochs=1", "trainer.max_steps=5"], "trainer.max_epochs and trainer.max_steps"),
    ("train", ["model.channels=[32,64,64,64,64]"], "image_size"),
    ("train", ["model.channels=32"], "model.channels=32: must be a list"),
    ("train", ["model.channels=[]"], "channels"),
    ("train", ["model.conditional=1"], "model.conditional=1: must be true or false"),
    ("train", ["~trainer"], "is missing"),
    ("train", ["device=tpu"], "device=tpu: must be auto, cpu, cuda or cuda:<number>"),
    ("train", ["device=cuda:99"], "device=cuda:99"),
    ("train", ["model.channels=[36,64]"], "36 must be"),
    ("train", ["dataset=folder"], "dataset.path is needed"),
    ("train", ["dataset=folder", "dataset.path=missing"], "missing"),
    ("train", ["trainer.resume=auto"], "trainer.resume=auto needs run_dir"),
    ("train", ["trainer.resume=no/such/run"], "no/such/run does not exist"),
    ("train", ["trainer.resume=a", "trainer.init_from=b"], "leave one of them out"),
    ("train", ["trainer.init_from=no/such/run"], "no/such/run does not exist"),
    ("train", ["run_dir"], "settings are written key=value"),
    ("train", ["--resume"], "unknown flag '--resume'"),
    ("train", ["--experimental-rerun=x"], "unknown flag"),
    ("train", ["-m", "schedule=linear,cosin"], "schedule=cosin: must be one of"),
    ("train", ["schedule=linear,cosine"], "several values for schedule: add -m"),
    ("sample", [], "ckpt is needed"),
    ("sample", ["ckpt=latest"], "no checkpoint under outputs/ yet"),
    ("sample", ["ckpt=no.safetensors"], "no.safetensors does not exist"),
    ("sample", ["ckpt=latest", "n=-5"], "n=-5"),
    ("sample", ["ckpt=latest", "label=[]"], "label=[]: must be a number, or a list of at least one"),
    ("sample", ["m=5"], "unknown key 'm'"),
    ("export", ["ckpt=latest"], "out is needed: out=…"),
    ("export", ["ckpt=none", "out=a"], "none does not exist"),
    ("export", ["ckpt=none", "out=a", "format=onnx"], "format=onnx: must be one of diffusers, safetensors"),
    ("export", ["ckpt=none", "out=a", "emma=true"], "unknown key 'emma'; did you mean 'ema'?"),
    ("eval", [], "ckpt is needed: ckpt=… (or samples=…"),
    ("eval", ["samples=none.npz", "dataset=digits"], "samples=none.npz: there is no such file or folder"),
    ("info", ["ckpt=a.pt"], "a.pt does not exist"),
]


@pytest.mark.parametrize(
    ("program", "arguments", "expected"), WRONG, ids=[" ".join([p, *a]) for p, a, _ in WRONG]
)
def test_mistake_is_one_line(
    command: Command, tmp_path: Path, program: str, arguments: list[str], expected: str
) -> None:
    result = command(program, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout == ""
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"ddpm-{program}: ")
    assert list(tmp_path.iterdir()) == []


def test_absent_dataset_without_network(command: Command, tmp_path: Path) -> None:
    """A proxy that refuses connections stands for a machine without network."""
    dead = "http://127.0.0.1:9"
    result = command(
        "train", "dataset=mnist", "data_root=nowhere", https_proxy=dead, http_proxy=dead, no_proxy=""
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    for words in ("nowhere/MNIST/raw", "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "dataset=digits"):
        assert words in result.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_help_is_answered_without_torch_or_hydra(command: Command) -> None:
    for program in ("train", "sample", "eval", "info", "report", "export"):
        result = command(program, "--help", real=True, PYTHONPROFILEIMPORTTIME="1")
        assert result.returncode == 0
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert "ddpm.config.schema" in imported and not imported & {"torch", "hydra"}
        assert result.stdout.startswith(f"ddpm-{program}: ")


def test_help_names_every_choice(command: Command) -> None:
    from ddpm.config.choices import CONFIG_DIR

    text = command("train", "--help").stdout
    for group in (
        "dataset",
        "model",
        "schedule",
        "objective",
        "optimizer",
        "sampler",
        "trainer",
        "experiment",
    ):
        for file in (CONFIG_DIR / group).glob("*.yaml"):
            lines = [line for line in text.splitlines() if line.strip().startswith(file.stem + " ")]
            assert lines and all(len(line.split(maxsplit=1)) == 2 for line in lines), file


def test_cfg_job_prints_the_config(command: Command, tmp_path: Path) -> None:
    result = command("train", "--cfg", "job", "dataset=mnist", "schedule=cosine")
    assert result.returncode == 0 and "name: cosine" in result.stdout and "image_size: 28" in result.stdout
    assert list(tmp_path.iterdir()) == []
