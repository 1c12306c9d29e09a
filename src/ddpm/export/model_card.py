"""The model card: README.md of an exported folder, in the form that the Hugging Face Hub reads."""

import shlex
from pathlib import Path
from string import Template
from typing import Any

from ddpm.config import hydra
from ddpm.config.overrides import as_overrides
from ddpm.config.schema import NOT_PART_OF_THE_EXPERIMENT, TrainConfig, check, to_dict
from ddpm.config.tables import uses_plugin
from ddpm.data.persian import NOTICE as PERSIAN
from ddpm.export.formats import ddim_as_exported, public_config
from ddpm.sample.model import Model
from ddpm.train.metrics_file import VALIDATED

TEMPLATES = Path(__file__).with_name("templates")
NOTICES = {"persian": PERSIAN}
SCALE = 2.0  # of guidance, in the example


def card(model: Model, form: str, ema: bool, checkpoint_sha256: str) -> str:
    """Return the card in Markdown, from the files in `templates/`.

    `form` is a key of `formats.FORMATS`. Names from the checkpoint are shown as code, so that none of them is taken
    for markup.
    """
    facts, config, sampler = model.facts, model.config, ddim_as_exported(model).params
    guided = model.conditional and config.objective.label_dropout > 0
    restricted = config.dataset.name in NOTICES
    values = {
        "license": "license: other\nlicense_name: research-only  # of the images it was trained on"
        if restricted
        else "# license: yours to choose, with an eye on that of the images it was trained on",
        "library": "diffusers" if form == "diffusers" else "ddpm",
        "task": "" if model.conditional else "pipeline_tag: unconditional-image-generation\n",
        "name": _code(facts.name),
        "network": config.model.name,
        "parameters": f"{sum(parameter.numel() for parameter in model.network.parameters()):,}",
        "conditional": "conditional" if model.conditional else "unconditional",
        "shape": f"{facts.image_size}×{facts.image_size}×{facts.channels}",
        "size": facts.image_size,
        "channels": facts.channels,
        "levels": facts.levels,
        "classes": facts.num_classes or "no",
        "last_class": facts.num_classes - 1,
        "labels": _labels(facts.class_names),
        "weights": "averaged (EMA)" if ema else "last",
        "step": f"{model.step:,}",
        "steps": sampler["num_steps"],
        "timesteps": model.schedule.num_timesteps,
        "all_steps": f"{model.schedule.num_timesteps:,}",
        "clip": sampler["clip"],
        "clipped": ", use_clipped_model_output=True" if sampler["clip"] == "clip" else "",
        "scale": SCALE,
        "label": " label=all guidance_scale=2" if guided else "",
        "notice": NOTICES.get(config.dataset.name, "The licence of the images is that of their publishers."),
        "recipe": _table(_recipe(model)),
        "command": training_command(model),
        "figures": _table(
            {_code(key): f"{model.figures[key]:.5g}" for key in VALIDATED if key in model.figures}
        ),
        "sha256": _code(checkpoint_sha256),
    }
    kind = "" if form != "diffusers" or not model.conditional else "_guided" if guided else "_conditional"
    values["sample"] = _fill(f"{form}{kind}.md", values).rstrip("\n")
    return _fill("card.md", values)


def _fill(template: str, values: dict[str, object]) -> str:
    return Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)


def _labels(names: tuple[str, ...]) -> str:
    """Return a paragraph with the first hundred names, or nothing."""
    listed = ", ".join(f"{i} {_code(name)}" for i, name in enumerate(names[:100]))
    return f"Labels: {listed}.\n\n" if listed else ""


def _recipe(model: Model) -> dict[str, str]:
    """Return the settings of each part of the experiment, each as code."""
    config = public_config(model)
    parts = {"network": config["model"]}
    parts |= {group: config[group] for group in ("schedule", "objective", "optimizer", "sampler")}
    length = "max_steps" if config["trainer"]["max_epochs"] is None else "max_epochs"
    trainer = {key: config["trainer"][key] for key in (length, "batch_size", "precision", "ema_decay")}
    parts["training"] = {"name": f"step {model.step:,}", **trainer, "seed": config["seed"]}
    if model.config.trainer.init_from is not None:
        parts["training"]["init_from"] = "another model"
    return {
        part: ", ".join(_code(f"{key} {value}".removeprefix("name ")) for key, value in settings.items())
        for part, settings in parts.items()
    }


def training_command(model: Model) -> str:
    """Return the shortest `ddpm-train` that composes the same config; paths are left for the reader to fill in."""
    config = public_config(model)
    with_path = "path" in config["dataset"]
    given = ["dataset.path=here"] if with_path else []
    wanted = _overrides(config)
    begin = [next(o for o in wanted if o.startswith("dataset="))]
    begin.append(f"objective={config['objective']['prediction']}")
    usual = _overrides(_composed(begin + given))
    begin += [o for o in wanted if o.partition("=")[0] in ("model", "schedule", "sampler") and o not in usual]
    usual = _overrides(_composed(begin + given))
    changed = [o for o in wanted if o not in (*begin, *usual) and not o.startswith("dataset.path=")]
    blanks = {
        "plugins=<module>": uses_plugin(config),
        "dataset.path=<images>": with_path,
        "trainer.init_from=<checkpoint>": model.config.trainer.init_from is not None,
    }
    words = [*(blank for blank, wanted in blanks.items() if wanted), *map(shlex.quote, begin + changed)]
    return " ".join(["ddpm-train", *words])


def _composed(overrides: list[str]) -> dict[str, Any]:
    return to_dict(check(TrainConfig, hydra.compose("train", overrides)))


def _overrides(config: dict[str, Any]) -> list[str]:
    """Return all that makes the experiment, as it is typed."""
    experiment = {key: value for key, value in config.items() if key not in NOT_PART_OF_THE_EXPERIMENT}
    return as_overrides(experiment)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "/") + "`"
