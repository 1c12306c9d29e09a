"""Writes docs/results.md: what the recipes under configs/experiment/ reached, from what was stored of their runs.

python scripts/write_results.py             writes the page from benchmarks/results/<recipe>/<seed>/
python scripts/write_results.py --check     fails where the page says anything else
python scripts/write_results.py --store RUN RECIPE      copies what counts of a run that was judged, then writes
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddpm.evaluate import record
from ddpm.evaluate.record import Evaluation, Metric
from ddpm.report import sampler_study

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
RECIPES = ROOT / "configs" / "experiment"
TEXTS = (
    "evaluation.json",
    "result.json",
    "environment.json",
)  # needed; study.json, study.png and grid.png may be there
FEWEST = 2  # seeds
STUDIED = 1000  # images of each setting of a study
BANDS = 5  # of noise levels, that training and test error are compared in

HEAD = """# Results

Written by `python scripts/write_results.py` from the files under `benchmarks/results/`; do not edit by hand. Samples
are held against the test images, and so are real training images beside them: what a perfect model of the training data
would reach. `ddpm-eval compare=[benchmarks/results/RECIPE/SEED]` shows all figures of a run with their doubts. A value
over several seeds is the mean, with the lowest and the highest. Pictures of all that `ddpm-sample` does are in
[gallery.md](gallery.md).
"""


@dataclass(frozen=True)
class Seed:
    """What is stored of one run of a recipe."""

    folder: Path
    evaluation: Evaluation
    result: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def figures(self) -> Mapping[str, Metric]:
        return self.evaluation.figures


# Of recipes that ran where their evaluation could not be stored.
UNSTORED = {
    "mnist_gpu": "One seed ran on an H200: see [performance.md](performance.md#on-a-gpu). "
    "Its evaluation is not stored here yet.\n"
}


def page(stored: Path, recipes: Path, place: Path) -> str:
    """The page, with links as seen from the folder `place`."""
    parts = [HEAD]
    for recipe in sorted(recipes.glob("*.yaml")):
        seeds = [
            _read(folder) for folder in sorted((stored / recipe.stem).glob("*/"), key=lambda path: path.name)
        ]
        parts.append(f"## {recipe.stem}\n\n{_purpose(recipe)}\n\n{_commands(recipe, seeds)}")
        parts += list(_measured(seeds, place)) if seeds else [UNSTORED.get(recipe.stem, "Not run yet.\n")]
    return "\n".join(parts)


def _purpose(recipe: Path) -> str:
    """The first comment that is no directive."""
    lines = [line.lstrip("# ") for line in recipe.read_text().splitlines() if line.startswith("#")]
    text = next(line for line in lines if not line.startswith("@package"))
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _commands(file: Path, seeds: list[Seed]) -> str:
    """Those that made what is stored; else those that would."""
    number, recipe = seeds[0].folder.name if seeds else "0", file.stem
    run = f"runs/{recipe}-{number}"
    lines = [
        f"ddpm-train experiment={recipe} seed={number} run_dir={run}",
        f"ddpm-eval ckpt={run} {_told(seeds[0].evaluation.protocol if seeds else {})}",
        f"ddpm-sample ckpt={run} n=100",
    ]
    studies = [sampler_study.read(kept) for seed in seeds if (kept := seed.folder / "study.json").exists()]
    swept, about = "sampler=dpmpp_2m_sde,ddim,dpmpp_2m sampler.num_steps=10,20", {"n": STUDIED}
    if yaml.safe_load(file.read_text())["model"].get("conditional"):
        swept += " guidance_scale=1,1.3,1.5 guidance_interval=null,[0.3,5]"
    if studies:
        rows, about = studies[0].rows, dict(studies[0].about)
        values = {
            "sampler": [row.sampler["name"] for row in rows],
            "sampler.num_steps": [str(row.num_steps) for row in rows],
            "guidance_scale": [f"{row.guidance_scale:g}" for row in rows],
            "guidance_interval": [_interval(row.guidance_interval) for row in rows],
        }
        keys = ("sampler", "sampler.num_steps", *studies[0].varied)
        swept = " ".join(f"{key}={','.join(dict.fromkeys(values[key]))}" for key in values if key in keys)
    if studies or not seeds:
        lines.append(f"ddpm-eval -m ckpt={run} {_told(about)} {swept}")
    return "\n".join(["```", *lines, f"python scripts/write_results.py --store {run} {recipe}", "```", ""])


def _told(about: Mapping[str, Any]) -> str:
    """n, precision and guidance where they are not the default, and the sampler of an evaluation."""
    precision = about.get("precision", "fp32")
    told = f"n={about.get('n', 10_000)}" + (f" precision={precision}" if precision != "fp32" else "")
    if "sampler" in about:
        told += f" sampler={about['sampler']['name']} sampler.num_steps={about['num_steps']}"
    if about.get("guidance_scale", 1) != 1:
        told += f" guidance_scale={about['guidance_scale']:g}"
        told += "".join(f" {key}={about[key]:g}" for key in ["guidance_rescale"] if about.get(key))
        told += "".join(f" {key}={_interval(about[key])}" for key in ["guidance_interval"] if about.get(key))
    return told


def _interval(ends: list[float] | None) -> str:
    return "null" if ends is None else f"[{','.join(f'{end:g}' for end in ends)}]"


def _read(folder: Path) -> Seed:
    result, environment = (json.loads((folder / name).read_text()) for name in TEXTS[1:])
    return Seed(folder, record.read(str(folder)), result, environment)


def _measured(seeds: list[Seed], place: Path) -> Iterator[str]:
    """The parts of a recipe's section."""
    few = f"\n\nOnly {len(seeds)} seed so far; {FEWEST} are wanted." if len(seeds) < FEWEST else ""
    yield f"{_machine(seeds)}{few}\n"
    yield _table([["", "value", "beside it"], *_rows(seeds)])
    if bands := _bands([seed for seed in seeds if {"test", "train"} <= seed.evaluation.curves.keys()]):
        yield (
            f"### {seeds[0].folder.parent.name}: generalisation\n\nMean squared error in eps by noise level, "
            f"± its standard error. Training images far below test images would be over-fitting.\n"
        )
        yield _table([["t", "sigma / alpha", "test images", "training images", "training / test"], *bands])
    for seed in seeds:
        if (file := seed.folder / "study.json").exists():
            yield f"### {seed.folder.parent.name}: samplers\n\n{sampler_study.markdown(sampler_study.read(file))}\n"
            if (picture := seed.folder / "study.png").exists():
                yield f"![excess over cost]({_link(picture, place)})\n"
    for seed in seeds:
        if (picture := seed.folder / "grid.png").exists():
            yield f"![{seed.folder.parent.name}, seed {seed.folder.name}]({_link(picture, place)})\n"


def _bands(seeds: list[Seed]) -> list[list[str]]:
    """The curves of all seeds, averaged, in BANDS of t; no rows without seeds."""
    rows = list[list[str]]()
    for band in range(BANDS if seeds else 0):
        means, texts, places = list[float](), list[str](), slice(0)
        for name in ("test", "train"):
            curves = [seed.evaluation.curves[name] for seed in seeds]
            size = len(curves[0]["t"]) // BANDS
            places = slice(band * size, (band + 1) * size)
            values = [value for curve in curves for value in curve["eps_mse"][places]]
            errors = [error for curve in curves for error in curve["error"][places]]
            means.append(sum(values) / len(values))
            texts.append(f"{means[-1]:.3g} ± {sum(error**2 for error in errors) ** 0.5 / len(errors):.1g}")
        curve = seeds[0].evaluation.curves["test"]
        ends = [curve[key][places][end] for key in ("t", "lambda_") for end in (0, -1)]
        low, high = ("∞" if lambda_ is None else f"{math.exp(-lambda_):.3g}" for lambda_ in ends[2:])
        times = f"{ends[0]:.0f} … {ends[1]:.0f}"
        rows.append([times, f"{low} … {high}", *texts, f"{means[1] / means[0]:.3f}"])
    return rows


def _machine(seeds: list[Seed]) -> str:
    machines = dict.fromkeys(
        f"{seed.environment['device']}, torch {seed.environment['torch']}, {seed.environment['precision']}"
        for seed in seeds
    )
    names = ", ".join(seed.folder.name for seed in seeds)
    return f"Seed{'s' * (len(seeds) > 1)} {names}, on {' and '.join(machines)}."


def _rows(seeds: list[Seed]) -> Iterator[list[str]]:
    """Name, value and what stands beside it, for all that at least one seed has."""
    yield [
        "training",
        _over(seeds, lambda s: s.result["seconds"] / 60, "{:.1f} min"),
        f"{seeds[0].result['step']:,} steps",
    ]
    yield ["val_loss", _over(seeds, lambda s: s.result["val_loss"], "{:.4f}"), ""]
    yield ["val_eps_mse", _over(seeds, lambda s: s.result["val_eps_mse"], "{:.4f}"), ""]
    eps = _over(seeds, lambda s: _value(s, "eps_loss"), "{:.5f}", lambda s: _error(s, "eps_loss"))
    yield ["error in eps, test", eps, _beside(seeds, "eps_loss_train", "{:.5f}", "training images")]
    excess = _over(
        seeds, lambda s: _value(s, "fd_excess"), "{:.3f}", lambda s: _ends(s.figures.get("fd_excess"))
    )
    floor = _beside(seeds, "fd_excess", "{:.3f}", "floor", floor=True)
    real = _beside(seeds, "real_fd_excess", "{:.3f}")
    yield [
        "Fréchet excess",
        excess,
        ", ".join(filter(None, [floor, real, _unguided(seeds, "fd_excess", "{:.3f}")])),
    ]
    yield _plain(seeds, "Fréchet excess within classes", "class_fd_excess", "{:.3f}")
    yield _plain(seeds, "Fréchet excess on pixels", "pixel_fd_excess", "{:.3f}")
    yield _plain(seeds, "KID", "kid", "{:.4f}")
    for key in dict.fromkeys(key for seed in seeds for key in seed.figures if key.startswith("FID-")):
        yield _plain(seeds, key, key, "{:.2f}")
    for name in ("precision", "recall", "density", "coverage"):
        yield _plain(seeds, name, name, "{:.3f}")
    yield _plain(seeds, "classifier confidence", "confident", "{:.1%}")
    yield _plain(seeds, "agreement with the label", "right_class", "{:.1%}")
    ends = [
        _over(seeds, lambda s, key=key: _value(s, key), "{:.1%}")
        for key in ("rarest_class", "most_frequent_class")
    ]
    of_real = [_beside(seeds, f"real_{key}", "{:.1%}", "") for key in ("rarest_class", "most_frequent_class")]
    yield [
        "class shares, from – to",
        " – ".join(ends),
        f"real images: {' – '.join(of_real)}" if all(of_real) else "",
    ]
    yield _plain(seeds, "classification accuracy score", "cas", "{:.1%}")
    yield _plain(seeds, "bits per dimension", "bits_per_dim", "{:.3f}")
    yield _plain(seeds, "memorized", "memorized", "{:.2%}")
    yield _plain(seeds, "memorized, relative to neighbours", "memorized_relative", "{:.2%}")
    identical = _over(seeds, lambda s: s.evaluation.memorization.get("identical"), "{:.0f}")
    yield ["identical to a training image", identical, f"of {seeds[0].evaluation.protocol['n']:,}"]
    images = _over(seeds, lambda s: s.evaluation.protocol["seconds"].get("sampling"), "{:.0f} s")
    yield [f"sampling, {_sampler(seeds[0])}", images, f"{seeds[0].evaluation.protocol['n']:,} images"]


def _plain(seeds: list[Seed], title: str, key: str, form: str) -> list[str]:
    own = _over(seeds, lambda s: _value(s, key), form, lambda s: _error(s, key))
    beside = [_beside(seeds, f"real_{key}", form), _unguided(seeds, key, form)]
    return [title, own, ", ".join(filter(None, beside))]


def _unguided(seeds: list[Seed], key: str, form: str) -> str:
    """The same figure of images drawn without guidance, where those of the table are guided."""
    plain = [seed.evaluation.unguided[key].value for seed in seeds if key in seed.evaluation.unguided]
    return f"without guidance: {form.format(sum(plain) / len(plain))}" if plain else ""


def _beside(seeds: list[Seed], key: str, form: str, what: str = "real images", floor: bool = False) -> str:
    """The same figure of something else, which needs no range: the first seed's."""
    for seed in seeds:
        if (figure := seed.figures.get(key)) is not None:
            value = figure.floor if floor else figure.value
            return "" if value is None else f"{what}: {form.format(value)}" if what else form.format(value)
    return ""


def _over(
    seeds: list[Seed],
    of: Callable[[Seed], float | None],
    form: str,
    doubt: Callable[[Seed], str] = lambda seed: "",
) -> str:
    """Of one seed the value, with its own interval or error; of several the mean, with lowest and highest."""
    values = [value for seed in seeds if (value := of(seed)) is not None]
    if not values:
        return "–"
    if len(values) == 1:
        return form.format(values[0]) + doubt(next(seed for seed in seeds if of(seed) is not None))
    low, high = form.format(min(values)), form.format(max(values))
    each = [text for seed in seeds if (text := doubt(seed).strip())]
    mean = f"{form.format(sum(values) / len(values))} ({low} … {high})"
    return mean + (f"; each {', '.join(dict.fromkeys(each))}" if each else "")


def _value(seed: Seed, key: str) -> float | None:
    return None if key not in seed.figures else seed.figures[key].value


def _ends(figure: Metric | None) -> str:
    return "" if figure is None or figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]"


def _error(seed: Seed, key: str) -> str:
    figure = seed.figures.get(key)
    return "" if figure is None or figure.error is None else f" ± {figure.error:.2g}"


def _sampler(seed: Seed) -> str:
    about = seed.evaluation.protocol
    guided = f", guidance {about['guidance_scale']:g}" if about.get("guidance_scale", 1) != 1 else ""
    within = f" within {_interval(about['guidance_interval'])}" if about.get("guidance_interval") else ""
    return f"{about['sampler']['name']} with {about['num_steps']} steps{guided}{within}"


def _table(rows: list[list[str]]) -> str:
    head, *others = [row for row in rows if row[1] not in ("–", "– – –")]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *others)]
    return "\n".join(lines) + "\n"


def _link(file: Path, place: Path) -> str:
    return Path(os.path.relpath(file, place)).as_posix()


def store(run: Path, recipe: str) -> Path:
    """Copies what counts of a judged run to benchmarks/results/<recipe>/<seed>. Paths go: they are of one machine."""
    if not (RECIPES / f"{recipe}.yaml").exists():
        raise SystemExit(f"no recipe configs/experiment/{recipe}.yaml")
    seed = yaml.safe_load((run / "config.yaml").read_text())["seed"]
    judged = sorted((run / "evaluations").glob("eval-*"), key=lambda path: path.stat().st_mtime)
    if not judged:
        raise SystemExit(f"{run} was not judged yet: ddpm-eval ckpt={run}")
    folder = STORED / recipe / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{recipe}, seed {seed}"
    evaluation = json.loads((judged[-1] / "evaluation.json").read_text())
    step = json.loads((run / "result.json").read_text())["step"]
    if evaluation["protocol"]["step"] != step or "cas" not in evaluation["protocol"]["measure"]:
        raise SystemExit(f"{judged[-1]} is not of step {step}, or leaves parts out: ddpm-eval ckpt={run}")
    evaluation["subject"] = name
    evaluation["protocol"]["checkpoint"] = Path(evaluation["protocol"]["checkpoint"]).name
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    for text in TEXTS[1:]:
        (folder / text).write_text(json.dumps(json.loads((run / text).read_text()), indent=2) + "\n")
    if (studied := run / "evaluations" / "study" / "study.json").exists():
        content = json.loads(studied.read_text())
        if content["about"]["checkpoint_sha256"] != evaluation["protocol"]["checkpoint_sha256"]:
            raise SystemExit(f"{studied} is of another checkpoint than {judged[-1]}: repeat the study")
        content["about"] |= {"subject": name, "checkpoint": Path(content["about"]["checkpoint"]).name}
        (folder / "study.json").write_text(json.dumps(content, indent=2) + "\n")
        shutil.copyfile(studied.with_name("study.png"), folder / "study.png")
    grids = sorted(run.glob("samples/drawn-*/grid.png"), key=lambda path: path.stat().st_mtime)
    if grids:
        shutil.copyfile(grids[-1], folder / "grid.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--store", nargs=2, metavar=("RUN", "RECIPE"))
    arguments = parser.parse_args()
    if arguments.store:
        print(store(Path(arguments.store[0]), arguments.store[1]))
    text = page(STORED, RECIPES, PAGE.parent)
    if arguments.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            raise SystemExit(
                f"{PAGE} is not what the stored results say: run python scripts/write_results.py"
            )
        return
    PAGE.write_text(text)
    print(PAGE)


if __name__ == "__main__":
    main()
