"""docs/extending.md, run as it stands; and plug-ins that are missing, broken, or not the user's own wish."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.config import choices, hydra, schema
from ddpm.config.choices import CONFIG_DIR
from ddpm.config.tables import TABLES, Names
from ddpm.errors import UserError
from ddpm.register import COMMON
from tests.conftest import Command, run_script

pytestmark = pytest.mark.xdist_group("extending")  # one worker, which makes its fixtures once
PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
(PLUGIN,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS, JUDGE = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
TRAIN, SAMPLE, SWEEP, OWN = COMMANDS.splitlines()
TINY = [
    "model.channels=[8,16]",
    "model.num_blocks=1",
    "model.attention=[]",
    "model.head_dim=8",
    "trainer.max_steps=4",
    "trainer.batch_size=8",
    "schedule.num_timesteps=200",
    "dataset.count=100",
]


def run_line(line: str, *more: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    program, *arguments = shlex.split(line)
    return run_script(program.removeprefix("ddpm-"), *arguments, *more, cwd=cwd)


def one_line(result: "subprocess.CompletedProcess[str]") -> str:
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stdout + result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with my_plugin.py, in which the page's first command ran."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "my_plugin.py").write_text(PLUGIN)
    result = run_line(TRAIN, *TINY, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "discs: 80 training and 10 validation images, 16×16×1" in result.stdout
    return folder


def test_plugin_keys_are_stored_but_no_module(trained: Path) -> None:
    stored = (trained / "runs" / "discs" / "config.yaml").read_text()
    for line in ("name: arc", "power: 1.5", "name: discs", "count: 100", "name: renoise", "fresh: 1.0"):
        assert line in stored
    files = [trained / "runs" / "discs" / "config.yaml", *trained.glob("runs/discs/checkpoints/*")]
    assert len(files) > 1 and not any(b"my_plugin" in file.read_bytes() for file in files)


def test_sampling_takes_the_sampler_of_the_checkpoint(trained: Path) -> None:
    result = run_line(SAMPLE, "sampler.num_steps=3", cwd=trained)
    assert result.returncode == 0, result.stderr
    assert '"name": "renoise"' in (trained / "runs/discs/samples/drawn-1/sample.json").read_text()


def test_network_objective_and_optimizer_train_resume_sample_and_are_judged(trained: Path) -> None:
    own = TINY[4:]
    result = run_line(OWN, *own, "model.conditional=false", "trainer.sample_every=0", cwd=trained)
    assert result.returncode == 0, result.stderr
    again = ["trainer.resume=runs/mine", "trainer.max_steps=5", "plugins=my_plugin"]
    result = run_script("train", *again, cwd=trained)
    assert result.returncode == 0 and "going on from step 4" in result.stdout, result.stderr
    stored = (trained / "runs/mine/config.yaml").read_text()
    for name in ("my_transformer", "half_way", "soft_snr", "noisy_half", "muon_for_all", "losses_csv"):
        assert name in stored
    logged = [line.split(",") for line in (trained / "runs/mine.csv").read_text().splitlines()]
    metrics = [json.loads(line) for line in (trained / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert logged == [[str(line["step"]), str(line["loss"])] for line in metrics] and len(logged) == 2
    few = ["plugins=my_plugin", "ckpt=runs/mine", "sampler.num_steps=3", "n=4"]
    result = run_script("sample", *few, cwd=trained)
    assert result.returncode == 0, result.stderr
    result = run_line(JUDGE, *few[2:], cwd=trained)
    assert result.returncode == 0, result.stderr
    figures = json.loads((trained / "runs/mine/evaluations/eval-1/evaluation.json").read_text())["figures"]
    assert 0 < figures["brightness"]["value"] < 1 and 0 < figures["real_brightness"]["value"] < 1
    assert "bits_per_dim" in figures and re.search(r"^brightness +0\.\d{3} +0\.\d{3}$", result.stdout, re.M)
    missing = one_line(run_script("eval", *few[1:], "measure=[brightness]", cwd=trained))
    assert "measure=brightness: must be one of distance, " in missing and "add plugins=[…]" in missing
    refused = run_script("export", "plugins=my_plugin", "ckpt=runs/mine", "out=exported", cwd=trained)
    assert "model=my_transformer is none of its networks" in one_line(refused)
    assert not (trained / "exported").exists()
    result = run_script(
        "export", "plugins=my_plugin", "ckpt=runs/mine", "out=exported", "format=safetensors", cwd=trained
    )
    assert result.returncode == 0 and "plugins=<module>" in (trained / "exported/README.md").read_text()
    assert "add plugins=[…]" in one_line(run_script("info", "ckpt=runs/mine", cwd=trained))


def test_the_names_of_a_table_are_read_without_importing_it() -> None:
    for kind, table in TABLES.items():
        assert list(Names(kind)) == list(getattr(importlib.import_module(table.module), table.attribute))


@pytest.mark.slow
def test_sweep(trained: Path) -> None:
    result = run_line(SWEEP, *TINY, cwd=trained)
    assert result.returncode == 0, result.stderr
    assert len(list(trained.glob("runs/schedules/*/result.json"))) == 2


@pytest.mark.parametrize("program", ["sample", "info"])
def test_checkpoint_without_its_plugin(trained: Path, program: str) -> None:
    text = one_line(run_script(program, "ckpt=runs/discs", cwd=trained))
    assert "'discs'" in text and "if it comes from a plug-in, add plugins=[…]" in text


def test_resume_wants_the_plugin_and_takes_it(trained: Path) -> None:
    again = ["trainer.resume=runs/discs", "trainer.max_steps=5"]
    assert "add plugins=[…]" in one_line(run_script("train", *again, cwd=trained))
    result = run_script("train", *again, "plugins=[my_plugin]", cwd=trained)
    assert result.returncode == 0 and "going on from step 4" in result.stdout, result.stderr


def test_help_and_cfg_know_plugins(trained: Path) -> None:
    text = run_script("train", "--help", "plugins=my_plugin", cwd=trained).stdout
    assert "renoise         (plug-in)" in text
    shown = run_script("train", "--cfg", "job", "plugins=my_plugin", "dataset=discs", cwd=trained)
    assert "count: 2000" in shown.stdout and "plugins" not in shown.stdout


BASE = "import ddpm\n\n@ddpm.register('schedule')\n"
BROKEN = {
    "clash": (
        BASE + "def linear(num_timesteps): ...",
        "schedule 'linear' exists already, in ddpm.diffusion.schedules",
    ),
    "wrong": (BASE + "def mine(T): ...", "schedule 'mine': its parameters must begin with num_timesteps"),
    "bare": (BASE + "def mine(num_timesteps, a): ...", "schedule 'mine': its parameter 'a' needs a default"),
    "types": (BASE + "def mine(num_timesteps, tau='x'): ...", "schedule.tau=x: must be a number"),
    "raises": ("x = 1\nx / 0", "ZeroDivisionError: division by zero ("),
    "inner": ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugin_is_one_line(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}_plugin.py").write_text(BROKEN[name][0])
    text = one_line(command("train", f"plugins={name}_plugin", PYTHONDONTWRITEBYTECODE="1"))
    assert text.startswith(f"ddpm-train: plugins={name}_plugin: ") and BROKEN[name][1] in text
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}_plugin.py"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plugins=[no_such]"], "plugins=no_such: not found, neither installed nor in "),
        (["plugins=no_such.part"], "plugins=no_such.part: not found"),
        (["plugins=../evil"], "plugins=../evil: must be the name of a module"),
        (["schedule=arc"], "schedule=arc: must be one of cosine, linear"),
        (["schedule=arc"], "if it comes from a plug-in, add plugins=[…]"),
        (["+plugins=[os]"], "unknown key 'plugins'"),
    ],
)
def test_mistake_is_one_line(command: Command, arguments: list[str], expected: str) -> None:
    assert expected in one_line(command("train", *arguments))


def test_a_config_cannot_ask_for_plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither an experiment file nor a stored config: nothing is imported, the key is refused."""
    shutil.copytree(CONFIG_DIR, tmp_path / "configs")
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    (tmp_path / "configs/experiment/evil.yaml").write_text("# @package _global_\nplugins: [evil]\n")
    monkeypatch.setattr(hydra, "CONFIG_DIR", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    raw = hydra.compose("train", ["experiment=evil"])
    assert raw["plugins"] == ["evil"]
    with pytest.raises(UserError, match="unknown key 'plugins'"):
        schema.check(schema.TrainConfig, raw)


def test_common_keys_are_those_of_every_file() -> None:
    for group, common in COMMON.items():
        keys = [content.keys() - {"name"} for content in choices.choices(group).values()]
        assert set.intersection(*map(set, keys)) == set(common)


def test_importing_ddpm_is_cheap() -> None:
    code = "import ddpm, sys; assert not {'torch', 'hydra', 'omegaconf'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
