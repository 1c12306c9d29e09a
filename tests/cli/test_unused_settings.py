"""A setting without effect is refused in one line, by every command; what says "off" and what a sweep varies is not."""

import sys
from pathlib import Path

import pytest

from ddpm.cli import app
from ddpm.config import hydra
from ddpm.config.checking import declared
from ddpm.config.schema import SCHEMAS, check
from ddpm.config.unused import refuse_unused
from ddpm.errors import UserError

OF_HYDRA = ["hydra.run.dir=x", "hydra.sweep.dir=x", "hydra.job.chdir=true", "hydra.output_subdir=null"]
OF_HYDRA += [
    "hydra.verbose=true",
    "+hydra.x=1",
    "~hydra.run",
    "hydra/launcher=joblib",
    "hydra.launcher.n_jobs=2",
]
FOLDERS = {"train": "run_dir=…", "info": "single run"}
SAMPLES = ["samples=a.npz", "dataset=digits"]


def refused(program: str, *typed: str) -> str:
    overrides = hydra.read_overrides(list(typed))
    with pytest.raises(UserError) as caught:
        refuse_unused([(overrides, check(SCHEMAS[program], hydra.compose(program, overrides)))])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def accepted(program: str, *typed: str) -> None:
    overrides = hydra.read_overrides(list(typed))
    refuse_unused([(overrides, check(SCHEMAS[program], hydra.compose(program, overrides)))])


@pytest.mark.parametrize("program", SCHEMAS)
def test_settings_of_hydra_are_refused_in_a_single_run(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for override in OF_HYDRA[: -2 if program == "report" else None]:  # which takes a/b=c for a folder
        monkeypatch.setattr(sys, "argv", [f"ddpm-{program}", override])
        with pytest.raises(SystemExit) as end:
            app.run(program)
        said = capfd.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1
        assert said.startswith(f"ddpm-{program}: {override}: Hydra's own settings have no effect")
        assert FOLDERS.get(program, "out=…") in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "typed", "unused", "needed"),
    [
        ("sample", ["strength=0.5"], "strength=0.5: has no effect with task=generate", "task=variation"),
        ("sample", ["jump_length=4", "task=variation", "input=a"], "jump_length=4", "task=inpaint"),
        ("sample", ["jump_n_sample=2"], "jump_n_sample=2", "task=inpaint"),
        ("sample", ["guidance_rescale=0.7"], "with guidance_scale=1.0", "another guidance_scale"),
        (
            "sample",
            ["guidance_rescale=0.7", "guidance_scale=0"],
            "with guidance_scale=0.0",
            "another guidance_scale",
        ),
        ("sample", ["guidance_interval=[0,1]"], "guidance_interval=[0,1]", "another guidance_scale"),
        ("sample", ["nrow=4", "save=[npz,images]"], "with save=[npz,images]", "save=grid"),
        (
            "sample",
            ["sampler=ddim", "sampler.rho=3"],
            "with sampler.spacing=linspace",
            "sampler.spacing=karras",
        ),
        ("sample", ["sampler.dynamic_percentile=0.9"], "with sampler.clip=clip", "sampler.clip=dynamic"),
        (
            "sample",
            ["sampler=heun", "sampler.churn_noise=1"],
            "with sampler.churn=0.0",
            "another sampler.churn",
        ),
        ("sample", ["sampler=ddim", "sampler.eta=1", "task=inpaint"], "with task=inpaint", "another task"),
        ("eval", ["compare=[a,b]", "out=x"], "with compare=[a,b]", "compare=null"),
        ("eval", ["compare=[a,b]", "dataset=digits"], "dataset=digits", "compare=null"),
        (
            "eval",
            [*SAMPLES, "sampler=heun"],
            "sampler=heun: has no effect with samples=a.npz",
            "samples=null",
        ),
        ("eval", [*SAMPLES, "++sampler.clip=none"], "sampler.clip=none", "samples=null"),
        ("eval", [*SAMPLES, "precision=bf16"], "precision=bf16", "samples=null"),
        ("report", ["folder=[a]", "contact=false", "n=4"], "with contact=false", "contact=true"),
        ("train", ["objective.min_snr_gamma=3"], "with objective.weight=uniform", "objective.weight=min_snr"),
        ("train", ["objective.logit_normal_std=2"], "uniform", "objective.timesteps=logit_normal"),
        ("train", ["objective.label_dropout=0.2"], "with model.conditional=false", "model.conditional=true"),
        ("train", ["objective.vlb_weight=1"], "false", "objective.learned_variance=true"),
        ("train", ["optimizer.halvings=3"], "with optimizer.decay=cosine", "optimizer.decay=halving"),
        ("train", ["overwrite=true"], "with run_dir=null", "run_dir=…"),
        ("train", ["jobs_per_gpu=2"], "with gpus=null", "gpus=…"),
        ("train", ["gpus=auto", "device=cpu"], "with device=cpu", "another device"),
    ],
)
def test_a_setting_without_effect_is_refused(
    program: str, typed: list[str], unused: str, needed: str
) -> None:
    ckpt = [] if program in ("train", "report", "eval") else ["ckpt=a"]
    said = refused(program, *ckpt, *typed)
    assert unused in said and said.endswith(f"it needs {needed}")


def test_what_has_an_effect_or_is_off_is_accepted() -> None:
    accepted("sample", "ckpt=a", "guidance_rescale=0", "guidance_interval=null", "nrow=null", "ema=false")
    accepted("sample", "ckpt=a", "guidance_scale=2", "guidance_rescale=0.5", "guidance_interval=[0,1]")
    accepted("sample", "ckpt=a", "task=inpaint", "jump_length=2", "sampler=heun", "sampler.rho=3", "seed=1")
    accepted("sample", "ckpt=a", "task=variation", "strength=0.5", "sampler=heun", "sampler.churn=1")
    accepted("train", "overwrite=false", "optimizer.decay=halving", "optimizer.halvings=3", "gpus=auto")
    accepted("train", "experiment=seed_notebook", "trainer.max_epochs=1")
    accepted("train", "model.conditional=true", "objective.label_dropout=0.5", "objective.label_dropout=0")
    accepted("eval", *SAMPLES, "n=10", "seed=1", "measure=[distance]", "out=x", "ema=false")
    accepted("report", "folder=[a]", "contact=false", "figure=val_loss", "out=x")


def test_in_a_sweep_one_job_with_an_effect_is_enough() -> None:
    def job(*typed: str) -> tuple[list[str], object]:
        return list(typed), check(SCHEMAS["train"], hydra.compose("train", list(typed)))

    decays = [job(f"optimizer.decay={decay}", "optimizer.halvings=3") for decay in ("cosine", "halving")]
    refuse_unused(decays)
    with pytest.raises(UserError, match=r"optimizer\.halvings=3: has no effect"):
        refuse_unused(decays[:1])


def test_needs_name_keys() -> None:
    known = {program: declared(schema) for program, schema in SCHEMAS.items()}
    inside = {"model.conditional", "sampler.spacing"}  # of files, without limits
    gates = inside | {key for keys in known.values() for key in keys}
    needs = [need for keys in known.values() for key in keys.values() for need in key.needs.split()]
    assert len(needs) > 50
    for need in needs:
        gate, equals, wanted = need.partition("=")
        assert equals and wanted and gate.rstrip("!") in gates, need
