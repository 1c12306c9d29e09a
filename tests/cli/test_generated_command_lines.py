"""Generated command lines: whatever is typed, a command composes it, or says in one line what is wrong.

The seeds are fixed. By default 150 lines are tried, and 40 of ddpm-sample with a model, whose tasks are run; with
`-m slow` 6,000 and 500.
"""

# ruff: noqa: SIM905 (words are easier to read than a list of strings)
import logging.config
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm.cli import app
from ddpm.config.checking import groups
from ddpm.config.choices import choices, known_keys
from ddpm.config.schema import SCHEMAS
from tests.conftest import run_script

pytestmark = pytest.mark.xdist_group("generated")  # one worker, which makes its fixtures once
VALUES = """null true 1 -1 0 2.5 1e1 1e400 nan inf [] [1] [null] [[1]] {} {a:1} {a:{b:2}} a a.b '' \\ é a,b 1,2 a, ,
    [a,b {a ( ) a=b = $ ${ ${} ${a} ${seed} ${oc.env:HOME} ${x:y} ??? range(0,0) range(1,3) range(0,9,0) choice(1,2)
    choice() glob(*) glob( shuffle(1,2) interval(0,1) sort(3,2,1) sort(a,1) int(a) float(1e5) str(1) json_str(1)
    extend_list(1) tag(a,1) _target_ !!python/name:os.system - %s {0} @ ~ / .. . 0x10 0b1 1_000 1__0 00 +1 1e .5 5.
    2026-11-27 12:30:45 1:2 a:b yes on off None True nul # a#b""".split()
VALUES += ["", " ", "' '", '"', "'", "a b", "a: b", "- a", "&a [*a]", "\n", "a\nb", "\t", "\x07", "\u202e"]
VALUES += ["9" * 5000, "-" + "9" * 5000, "a" * 5000, "[" * 200]
FLAGS = """-m --multirun -sc --shell-completion --cfg -c --info -i --package -p --resolve --run -r --config-name -cn
    --config-path -cp --config-dir -cd --version --hydra-help --experimental-rerun -x - -- --- --help=x -hh --cfg=job
    --cfg=nonsense --info=all -sc=query=bash -m=1 --=1""".split()
WORDS = [
    "all",
    "job",
    "hydra",
    "nonsense",
    "query=bash",
    "query=nothing",
    "install=bash",
    "uninstall=zsh",
    "",
]
OF_HYDRA = """hydra hydra.run.dir hydra/launcher hydra/sweeper hydra.job.name hydra.mode hydra/nothing hydra.searchpath
    hydra.launcher hydra.verbose hydra.x.y defaults _self_ experiment""".split()
STRANGE = ["", ".", "a", "a.b", "a/b", "/", "@", "0", "null", "é", "_target_", "_group_", "$", "${a}"]
CHOSEN = ["null", "1", "true", "[a]", "{}", "''", "a/b", "../x", "", "9" * 50]


def key(program: str, draw: random.Random) -> str:
    """Return a key of the command, or something close to one."""
    one = draw.choice([*known_keys(program), *groups(SCHEMAS[program])])
    match draw.randrange(10):
        case 0:
            return one + draw.choice([".x", ".name", ".", "..a", ".0", "[0]", "@a", "@a:b", ":", "/x"])
        case 1:
            place = draw.randrange(len(one))
            return one[:place] + draw.choice("x._-@ é") + one[place + 1 :]
        case 2:
            return draw.choice(OF_HYDRA)
        case 3:
            return draw.choice(STRANGE)
        case 4:
            return "".join(draw.choice("abc._/@+~:-") for _ in range(draw.randrange(1, 12)))
    return one


def argument(program: str, draw: random.Random) -> str:
    match draw.randrange(12):
        case 0:
            return draw.choice(FLAGS)
        case 1:
            return draw.choice(WORDS)
        case 2:
            group = draw.choice(groups(SCHEMAS[program]) or ["sampler"])
            sign = draw.choice(["", "", "+", "++", "~"])
            return f"{sign}{group}={draw.choice([*choices(group), *CHOSEN])}"
    sign = draw.choice(["", "", "", "", "", "", "+", "++", "~", "-", "+++"])
    equals = draw.choice(["=", "=", "=", "=", "=", "=", "", "==", " = ", ":="])
    return sign + key(program, draw) + equals + draw.choice(VALUES)


def command_lines(seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    draw = random.Random(seed)
    for _ in range(n):
        program = draw.choice(list(SCHEMAS))
        yield program, [argument(program, draw) for _ in range(draw.choice([1, 1, 1, 2, 3]))]


def outcome(program: str, typed: list[str]) -> object:
    """Return the exit status of a command in this process."""
    sys.argv = [f"ddpm-{program}", *typed]
    try:
        app.run(program)
    except SystemExit as end:
        return end.code
    return 0


def check_outcome(program: str, typed: list[str], capfd: pytest.CaptureFixture[str]) -> object:
    """Run a command; check that it says nothing on stderr or, with status 2, one line alone."""
    status = outcome(program, typed)
    said = capfd.readouterr()
    seen = (program, typed, status, said.err)
    assert status in (0, 2), seen
    if status == 0:
        assert said.err == "", seen
    else:
        assert said.err.startswith(f"ddpm-{program}: ") and len(said.err) > len(program) + 8, seen
        assert said.err.count("\n") == 1 and said.err.endswith("\n") and len(said.err) < 3000, seen
    return status


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield an empty folder, the current one; sys.argv and what Hydra's own flags set are put back after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    monkeypatch.setattr(logging.root, "handlers", logging.root.handlers[:])
    level = logging.root.level
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    yield tmp_path
    logging.root.setLevel(level)


@pytest.mark.parametrize(("seed", "n"), [(0, 150), pytest.param(1, 3000, marks=pytest.mark.slow)])
def test_every_command_line_composes_or_is_one_line(
    seed: int, n: int, empty: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for program in SCHEMAS:  # all but their tasks
        name = app.MODULES.get(program, program)
        monkeypatch.setattr(f"ddpm.cli.{name}.{name}", lambda config: None)
    for name in ("train._sweep", "evaluate.study"):
        monkeypatch.setattr(f"ddpm.cli.{name}", lambda overrides: None)
    statuses = {check_outcome(program, typed, capfd) for program, typed in command_lines(seed, n)}
    assert statuses == {0, 2} and list(empty.iterdir()) == []


PLAUSIBLE = """task=inpaint task=variation task=interpolate task=reconstruct task=generate input=digits:test:0-1
    input=digits:test:0 input=digits:test:9999 input=nothing.png input=. mask=left mask=random mask=nothing mask=bad.png
    strength=0 strength=0.5 strength=1 seeds=[0,1] seeds=[0] seeds=[1,2,3] seeds=[] index=0 index=[0,0] index=[]
    index=9999999
    label=0 label=9 label=10 label=all label=cat label=[1,dog] label=é label=1,2 label=null guidance_scale=0
    guidance_scale=1 guidance_scale=3 guidance_rescale=0.5 guidance_interval=[0,1] guidance_interval=[2,1]
    guidance_interval=[1] n=1 n=2 n=3 save=[] save=[grid] save=[npz,trajectory] save=[images,images] save=grid,npz
    nrow=1
    nrow=1000 jump_length=1 jump_length=1000 jump_n_sample=2 seed=1 seed=9223372036854775807 batch_size=1 precision=bf16
    ema=false device=0 device=cpu device=cuda:7 sampler=ddpm sampler=ddim sampler=heun sampler=unipc sampler=dpmpp_2m
    sampler.num_steps=1 sampler.num_steps=3 sampler.num_steps=99999 sampler.eta=1 sampler.eta=0 sampler.order=3
    sampler.churn=5 sampler.churn_min=1 sampler.cap=false sampler.rho=0.1 sampler.clip=none sampler.clip=dynamic
    sampler.clip=nothing sampler.dynamic_percentile=0.5 sampler.variance=learned sampler.spacing=karras
    sampler.spacing=5
    sampler.spacing=leading sampler.spacing=[9,5,0] sampler.spacing=[0,5] sampler.spacing=[] sampler.spacing=nothing
    out=run out=bad.png out=new hydra.run.dir=x""".split()


@pytest.fixture(scope="module", params=["false", "true"], ids=["unconditional", "conditional"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("trained")
    quick = [
        "model.channels=[8,8]",
        "model.head_dim=8",
        "trainer.max_steps=1",
        "trainer.batch_size=2",
        "device=cpu",
    ]
    quick += [f"model.conditional={request.param}", "schedule.num_timesteps=20", "run_dir=run"]
    result = run_script("train", *quick, cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "bad.png").write_text("no picture")
    return folder


@pytest.mark.parametrize(("seed", "n"), [(2, 10), pytest.param(3, 60, marks=pytest.mark.slow)])
def test_what_a_task_refuses_is_one_line_and_writes_nothing(
    seed: int, n: int, trained: Path, empty: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, empty, dirs_exist_ok=True)
    draw, statuses = random.Random(seed), set()
    for _ in range(n):
        typed = [
            "ckpt=run",
            "n=1",
            "sampler.num_steps=2",
            "device=cpu",
            *draw.choices(PLAUSIBLE, k=draw.randrange(1, 4)),
        ]
        before = sorted(empty.rglob("*"))
        statuses.add(status := check_outcome("sample", typed, capfd))
        assert status == 0 or sorted(empty.rglob("*")) == before, typed
    assert statuses == {0, 2}
