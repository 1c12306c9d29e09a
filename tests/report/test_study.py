"""`ddpm-eval -m`: which setting is named, what is kept and skipped, and that mistakes come before the first image."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ddpm import build
from ddpm.cli import evaluate as command
from ddpm.cli import study, study_run
from ddpm.config import hydra, schema
from ddpm.config.choices import Component, choose_sampler
from ddpm.config.schema import check
from ddpm.data.dataset import Dataset, Split
from ddpm.errors import UserError
from ddpm.evaluate import evaluator, record
from ddpm.evaluate import run as evaluation_run
from ddpm.evaluate.record import Evaluation, Metric
from ddpm.report import sampler_study, sampler_study_plot
from ddpm.runtime import signals
from ddpm.sample import sampler_file
from ddpm.train.checkpointing import save
from ddpm.train.state import prepare
from tests.train.test_training import CPU, config

pytestmark = pytest.mark.xdist_group("study")  # one worker, which makes its fixtures once
SETTINGS = ["sampler=ddim,dpmpp_2m", "sampler.num_steps=2,4"]
QUICK = ["n=120", "device=cpu", "measure=[distance]"]


def of(
    sampler: str, steps: int, excess: float | None, wide: float = 0.1, seconds: float = 1.0, **more: Any
) -> Evaluation:
    """An evaluation of 500 images, with a network evaluation for each step (heun: two)."""
    found = {} if excess is None else {"fd_excess": Metric(excess, low=excess - wide, high=excess + wide)}
    protocol = {
        "sampler": {"name": sampler, "num_steps": steps, **more},
        "guidance_scale": 1.0,
        "num_steps": steps,
        "evaluations_per_image": steps * (2 if sampler == "heun" else 1),
        "seconds": {"sampling": seconds},
        "machine": "a machine",
        **dict.fromkeys(sampler_study.COMMON, "x"),
        **{"n": 500, "seed": 0, "step": 7, "split_images": 400},
    }
    return Evaluation("a run", {**found, "real_fd_excess": Metric(0.01, low=0.0, high=0.02)}, protocol)


def chosen(*evaluations: Evaluation) -> tuple[int | None, int | None]:
    """Places of the best and of the cheapest within its interval."""
    found = sampler_study.gather(evaluations, ["sampler", "sampler.num_steps"])
    best, cheapest = sampler_study.best(found), sampler_study.cheapest(found)
    return tuple(None if row is None else found.rows.index(row) for row in (best, cheapest))  # type: ignore[return-value]


def test_the_cheapest_within_the_interval_of_the_best_is_named() -> None:
    rows = [of("ddim", 5, 0.9), of("ddim", 20, 0.29), of("ddim", 50, 0.2), of("heun", 9, 0.31)]
    assert chosen(*rows) == (2, 1)  # 0.31 lies above 0.2 + 0.1, though its own interval reaches further down
    assert chosen(*rows, of("heun", 9, 0.3)) == (2, 4)  # on the border; 18 evaluations are fewer than 20
    assert chosen(of("ddim", 5, 0.3), of("unipc", 5, 0.3, seconds=0.9)) == (
        1,
        1,
    )  # seconds decide between equals
    assert chosen(of("ddim", 5, -0.05), of("ddim", 4, 0.06)) == (0, 0)
    assert chosen(of("ddim", 5, None), of("ddim", 20, 0.4)) == (1, 1)
    assert chosen(of("ddim", 5, None)) == (None, None)
    none = sampler_study.gather([of("ddim", 5, None)], [])
    assert "500 images are too few" in sampler_study.verdict(none) and "–" in sampler_study.table(none)


def test_the_table_shows_what_was_varied_and_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = [of("ddim", 5, 0.4, eta=0.0), of("ddim", 10, 0.35, eta=0.5, seconds=2.0), of("heun", 3, 1.5)]
    found = sampler_study.gather(rows, ["sampler", "sampler.num_steps", "sampler.eta"])
    head, first, *_, heun, real = sampler_study.cells(found)
    assert head[:5] == ["sampler", "steps", "eta", "evaluations", "s / 1,000 images"]
    assert first[:6] == ["ddim", "5", "0", "5", "2", "0.400 [0.300, 0.500]"]
    assert (
        heun[:5] == ["heun", "3", "–", "6", "2"] and real[0] == "real images" and real[5].startswith("0.010")
    )
    sampler_study.write(tmp_path / "study.json", found)
    assert sampler_study.read(tmp_path / "study.json") == found
    lines = sampler_study.markdown(found).splitlines()
    assert len({line.count("|") for line in lines[:6]}) == 1 and "Cheapest within" in lines[-1]
    for excess in (0.4, -0.2):  # log axes, and those that go below 0
        sampler_study_plot.draw(
            sampler_study.gather([*rows, of("unipc", 8, excess)], []), tmp_path / "study.png"
        )
        assert Image.open(tmp_path / "study.png").width > 1000


def concluded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *evaluations: Evaluation,
    recommended: tuple[Any, ...] = (1.0, 0.0, None),
    **settings: Any,
) -> Component | None:
    """The sampler that a study of these evaluations leaves beside its checkpoint."""
    monkeypatch.setattr(sampler_study_plot, "draw", lambda *_: 1 / 0)  # a picture decides nothing
    usual = {"ema": True, "n": 1000, **settings}
    configs: list[Any] = [
        SimpleNamespace(sampler=choose_sampler(str(each.protocol["sampler"]["name"]), {}), **usual)
        for each in evaluations
    ]
    varied = ["sampler", "guidance_scale"]
    (folder / "sampler.yaml").unlink(missing_ok=True)
    study_run.conclude(configs, varied, folder / "a.safetensors", folder, list(evaluations), recommended)
    return sampler_file.read(folder / "sampler.yaml")


def test_guidance_has_columns_and_the_cheapest_may_be_guided(tmp_path: Path) -> None:
    plain, all_over, within = (
        of("ddim", 9, 0.9),
        guided(of("ddim", 9, 0.2), 1.5),
        guided(of("ddim", 9, 0.15), 1.5),
    )
    within = dataclasses.replace(within, protocol={**within.protocol, "guidance_interval": [0.3, 5.0]})
    found = sampler_study.gather([plain, all_over, within], ["guidance_scale", "guidance_interval"])
    head, *_, last, _ = sampler_study.cells(found)
    assert head[2:4] == ["guidance_scale", "guidance_interval"] and last[2:4] == ["1.5", "[0.3, 5.0]"]
    assert "best: ddim, 9 steps, guidance_scale 1.5, guidance_interval" in sampler_study.verdict(found)
    sampler_study.write(tmp_path / "study.json", found)
    assert sampler_study.read(tmp_path / "study.json") == found
    raw = json.loads((tmp_path / "study.json").read_text())
    for row in raw["rows"]:
        del row["guidance_rescale"], row["guidance_interval"]  # as older files
    (tmp_path / "study.json").write_text(json.dumps(raw))
    assert sampler_study.read(tmp_path / "study.json").rows[2].guidance == (1.5, 0.0, None)


def test_an_interval_without_guidance_is_no_setting(run: Path) -> None:
    typed = [f"ckpt={run}", "sampler=ddim", "guidance_scale=1,2", "guidance_interval=null,[0,1],[1,2]"]
    settings, varied = study._settings(hydra.read_overrides(typed))
    assert [(each.guidance_scale, each.guidance_interval) for each in settings] == [
        (1.0, None),
        (2.0, None),
        (2.0, [0.0, 1.0]),
        (2.0, [1.0, 2.0]),
    ]
    assert varied == ["guidance_scale", "guidance_interval"]


def guided(made: Evaluation, scale: float) -> Evaluation:
    return dataclasses.replace(made, protocol={**made.protocol, "guidance_scale": scale})


def test_only_a_study_that_can_tell_names_the_next_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best, second, third = guided(of("ddim", 9, 0.1), 3.0), of("unipc", 9, 0.4), of("heun", 9, 0.3)
    found = concluded(tmp_path, monkeypatch, best, second, third)
    assert (
        found is not None and found.name == "unipc"
    )  # the cheapest at guidance 1, which ddpm-sample draws with
    assert "study.png could not be drawn: division by zero" in capsys.readouterr().out
    text = (tmp_path / "sampler.yaml").read_text()
    assert "of 2 settings" in text and "ddim" not in text and "guidance_scale 1\n" in text
    capsys.readouterr()
    for evaluations, settings, why in (
        ([second, third], {"n": 999}, "n=999 is too few"),
        ([second, third], {"ema": False}, "with ema=false"),
        ([second], {}, "1 of the settings at guidance_scale=1"),
        ([best, second], {}, "1 of the settings at guidance_scale=1"),
        ([best, guided(third, 2.0)], {}, "0 of the settings at guidance_scale=1"),
        ([second, of("ddim", 4, None)], {}, "1 of the settings"),
    ):
        assert concluded(tmp_path, monkeypatch, *evaluations, **settings) is None
        assert f"sampler.yaml is not written: {why}" in capsys.readouterr().out


def test_the_next_sampler_is_chosen_at_the_guidance_that_the_training_recommends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [of("heun", 9, 0.1), guided(of("unipc", 9, 0.4), 1.5), guided(of("ddim", 5, 0.8), 1.5)]
    made = concluded(tmp_path, monkeypatch, *rows, recommended=(1.5, 0.0, None))
    assert made is not None and made.name == "unipc"
    assert "guidance_scale 1.5\n" in (tmp_path / "sampler.yaml").read_text()


@pytest.mark.parametrize(
    "change",
    [{"evaluations_per_image": 1e308 * 10}, {"n": 10**400}, {"n": 0}, {"seconds": {"sampling": "x" * 9999}}],
)
def test_what_was_kept_is_not_trusted(change: dict[str, Any], tmp_path: Path) -> None:
    identity = {"sampler": {"name": "ddim", "num_steps": 4}}
    about = {**of("ddim", 4, 0.2).protocol, "setting": study_run.digest_of(identity)}
    file = study_run.evaluation_file(tmp_path, identity)
    file.parent.mkdir()
    for more, there in (({}, True), (change, False)):
        kept = dataclasses.replace(of("ddim", 4, 0.2), protocol={**about, **more}).to_dict()
        file.write_text(json.dumps(kept))
        assert (study_run.read_kept(tmp_path, identity) is not None) is there


def test_a_study_goes_into_a_folder_of_its_own_checkpoint(tmp_path: Path) -> None:
    def not_of(sha: str) -> str:
        opened: Any = SimpleNamespace(meta=SimpleNamespace(sha256=sha))
        return study_run._not_of_the_study(tmp_path, opened, {"ddim-4-0123abcd"})

    about = {**of("ddim", 4, 0.2).protocol, "setting": "0", "checkpoint_sha256": "a"}
    (tmp_path / "ddim-4-0123abcd").mkdir()  # of this command, killed before it was written
    assert not_of("a") == not_of("b") == ""
    (tmp_path / "heun-4-4567cdef").mkdir()
    assert not_of("a") == "heun-4-4567cdef"
    record.write(
        tmp_path / "heun-4-4567cdef" / record.FILE, dataclasses.replace(of("heun", 4, 0.2), protocol=about)
    )
    assert not_of("a") == "" and not_of("b") == "heun-4-4567cdef"
    (tmp_path / "study.md").write_text("my own")
    assert not_of("a") == "study.md"
    (tmp_path / "study.json").write_text(json.dumps({"about": {"checkpoint_sha256": "a"}}))
    assert not_of("a") == "" and not_of("b") != ""
    (tmp_path / "thesis.txt").write_text("years of work")
    assert not_of("a") == "thesis.txt"


def test_a_study_of_another_checkpoint_gets_another_folder(tmp_path: Path) -> None:
    opened: Any = SimpleNamespace(
        meta=SimpleNamespace(sha256="a"), path=tmp_path / "checkpoints" / "a.safetensors"
    )
    study = tmp_path / "evaluations" / "study"
    assert study_run._folder(None, opened, set()) == study
    study.mkdir(parents=True)
    (study / "study.md").write_text("of another")
    assert study_run._folder(None, opened, set()) == study.with_name("study-2")
    with pytest.raises(UserError, match=r"holds study\.md, which is not of a study of this checkpoint"):
        study_run._folder(str(study), opened, set())


def test_a_sampler_file_of_somebody_is_kept(tmp_path: Path) -> None:
    sampler, file = choose_sampler("heun", {}), tmp_path / sampler_file.NAME
    sampler_file.write(file, sampler, ["written by ddpm-eval -m"])
    sampler_file.write(file, sampler, ["written by ddpm-eval -m, again"])
    file.write_text("name: ddim  # my own\n")
    with pytest.raises(OSError, match="not written by a study"):
        sampler_file.write(file, sampler, ["written by ddpm-eval -m"])
    assert file.read_text() == "name: ddim  # my own\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["about"].update(n="x" * 9999),
        lambda d: d["about"].pop("machine"),
        lambda d: d.update(about=[]),
        lambda d: d.update(rows={"a": 1}),
        lambda d: d["rows"][0].update(seconds="x" * 9999),
        lambda d: d["rows"][0].update(evaluations=None),
        lambda d: d["rows"][0].update(sampler="ddim"),
        lambda d: d["rows"][0].update(more=1),
        lambda d: d["rows"][0]["figures"].update(fd_excess={"value": "x"}),
        lambda d: d.update(real=[]),
    ],
)
def test_a_strange_study_json_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = tmp_path / "study.json"
    sampler_study.write(file, sampler_study.gather([of("ddim", 4, 0.2)], []))
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"study.json: is no study\.json of ddpm-eval -m"):
        sampler_study.read(file)


# As users type it.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an unconditional model that was not trained at all."""
    folder = tmp_path_factory.mktemp("home") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    own = config("model.channels=[8,16]", "model.head_dim=8")
    untrained = prepare(own, build.dataset(Component("digits", {}), "nowhere"), CPU)
    save(untrained, folder / "checkpoints" / "step_0000000.safetensors", {})
    return folder


def ddpm_eval_m(*typed: str) -> None:
    study.study(hydra.read_overrides(list(typed)))


def inverted(data: Dataset) -> Dataset:
    return dataclasses.replace(data, test=Split(255 - data.test.images, data.test.labels))


def forbid_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: object, **__: object) -> None:
        raise AssertionError("an image was drawn")

    monkeypatch.setattr(evaluator, "draw", draw)


@pytest.mark.slow
def test_a_study_from_the_first_image_to_the_sampler_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, draw, drawn = run / "evaluations" / "study", evaluator.draw, list[str]()

    def draw_three(model: Any, sampler: Any, **options: Any) -> evaluator.Drawn:
        if len(drawn) == 3:
            raise signals.Stopped(2)
        drawn.append(f"{sampler.name} {sampler.params['num_steps']} {options['seed']} {options['n']}")
        return draw(model, sampler, **options)

    monkeypatch.setattr(evaluator, "draw", draw_three)
    monkeypatch.setattr(study_run, "FEWEST", 120)
    with pytest.raises(signals.Stopped) as stopped:  # Ctrl-C in the fourth
        ddpm_eval_m(f"ckpt={run}", *SETTINGS, *QUICK, "seed=3")
    assert stopped.value.said and "the same command goes on" in capsys.readouterr().out
    assert drawn == ["ddim 2 3 120", "ddim 4 3 120", "dpmpp_2m 2 3 120"]
    assert len(list(folder.iterdir())) == 3 and not (run / "checkpoints" / "sampler.yaml").exists()

    first = next(iter(folder.glob("ddim-4-*"))) / "evaluation.json"
    before = first.read_bytes()
    next(iter(folder.glob("ddim-2-*/evaluation.json"))).write_text("{}")  # broken since,
    other = next(iter(folder.glob("dpmpp_2m-2-*/evaluation.json")))
    other.write_text(
        other.read_text().replace('"evaluations_per_image": 2', '"evaluations_per_image": "x"')
    )  # both
    drawn.clear()
    ddpm_eval_m(f"ckpt={run}", *SETTINGS, *QUICK, "seed=3")
    assert drawn == ["ddim 2 3 120", "dpmpp_2m 2 3 120", "dpmpp_2m 4 3 120"] and first.read_bytes() == before
    out = capsys.readouterr().out
    assert out.count("as it was there") == 1 and "cheapest within the interval of the best" in out
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "study.md",
        "study.json",
        "study.png",
    }

    result = sampler_study.read(folder / "study.json")
    assert [(row.sampler["name"], row.evaluations) for row in result.rows] == [
        *(("ddim", 2), ("ddim", 4), ("dpmpp_2m", 2), ("dpmpp_2m", 4))
    ]
    named = sampler_study.cheapest(result)
    written = sampler_file.read(run / "checkpoints" / "sampler.yaml")
    assert named is not None and written is not None and written.to_dict() == named.sampler

    forbid_drawing(monkeypatch)
    monkeypatch.setattr(evaluator, "prepare", None)  # nor is anything else done again
    ddpm_eval_m(f"ckpt={run}", *SETTINGS, *QUICK, "seed=3")
    assert "all of them are there already" in capsys.readouterr().out
    with pytest.raises(TypeError):  # which nothing but new work does
        ddpm_eval_m(f"ckpt={run}", *SETTINGS, "n=121", *QUICK[1:], "seed=3")
    load = evaluation_run.dataset_of
    monkeypatch.setattr(evaluation_run, "dataset_of", lambda *some: inverted(load(*some)))
    with pytest.raises(TypeError):  # other test images of the same name
        ddpm_eval_m(f"ckpt={run}", *SETTINGS, *QUICK, "seed=3")

    monkeypatch.undo()  # a setting's figures are those of ddpm-eval for the same
    typed = [
        f"ckpt={run}",
        *QUICK,
        "seed=3",
        "sampler=ddim",
        "sampler.num_steps=4",
        f"out={tmp_path / 'one'}",
    ]
    command.evaluate(check(schema.EvalConfig, hydra.compose("eval", hydra.read_overrides(typed))))
    assert record.read(str(tmp_path / "one")).figures == record.read(str(first)).figures


MISTAKES = [
    (["hydra/launcher=joblib"], "hydra/launcher=joblib: a study loads model and data once"),
    (["n=100,200"], "n: -m varies the sampler"),
    (["dataset=digits,mnist"], "dataset: -m varies the sampler"),
    (["sampler.num_steps=4,1001"], "1001"),
    (["sampler.num_steps=4,0"], "sampler.num_steps=0: must be a number"),
    (["sampler=ddim,ddimm"], "sampler=ddimm: must be one of .*did you mean 'ddim'"),
    (["sampler=ddim,dpmpp_2m", "sampler.eta=0,1"], "sampler.eta"),
    (["sampler=ddim", "sampler.num_steps=5,5"], "two settings are the same: sampler.num_steps=5"),
    (["sampler=ddpm,ddim", "sampler.num_steps=4", "guidance_scale=1,2"], "guidance_scale need a model"),
    (["sampler=ddpm", "sampler.variance=small,learned"], "sampler.variance=learned"),
    (["sampler.spacing=logsnr,karas"], "sampler.spacing"),
    (
        ["sampler.num_steps=4,5", "measure=[neighbours]"],
        r"measure=\[neighbours\]: -m compares by distance",
    ),
    (["guidance_scale=range(0,0)"], "holds no value"),
    (["sampler.num_steps=4,5", "compare=[a]"], "leave all but one out"),
    (["sampler.num_steps=4,5", "out=FILE/x"], "cannot write to .*it is no folder"),
]


@pytest.mark.parametrize(
    ("typed", "words"),
    [*MISTAKES[:3], *(pytest.param(*each, marks=pytest.mark.slow) for each in MISTAKES[3:])],
    ids=str,
)
def test_a_mistake_is_one_line_before_the_first_image(
    typed: list[str], words: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_drawing(monkeypatch)
    with pytest.raises(UserError, match=words) as refusal:
        ddpm_eval_m(
            f"ckpt={run}", *QUICK[:2], *[each.replace("FILE", f"{run}/config.yaml") for each in typed]
        )
    assert "\n" not in str(refusal.value)


def test_a_study_needs_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="ckpt is needed"):
        ddpm_eval_m("sampler=ddim,heun")
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)  # as MPI's and Slurm's users set them, too
    with pytest.raises(UserError, match="leave torchrun out"):
        ddpm_eval_m("ckpt=run", "sampler=ddim,heun")
