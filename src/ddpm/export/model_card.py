"""The model card: README.md of an exported folder, in the form that the Hugging Face Hub reads."""

from pathlib import Path
from string import Template

from ddpm.data.persian import NOTICE as PERSIAN
from ddpm.export.formats import ddim_as_exported
from ddpm.sample.model import Model
from ddpm.train.metrics_file import VALIDATED

TEMPLATES = Path(__file__).with_name("templates")
NOTICES = {"persian": PERSIAN}
SCALE = 2.0  # of guidance, in the example


def card(model: Model, form: str, ema: bool, checkpoint_sha256: str, command: str) -> str:
    """Return the card in Markdown, from the files in `templates/`.

    `form` is a key of `export.FORMATS`, `command` what trains such a model. Names from the checkpoint are shown as
    code, so that none of them is taken for markup.
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
        "command": command,
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
    config = model.config
    length = config.trainer
    planned = (
        f"{length.max_steps:,} steps planned"
        if length.max_epochs is None
        else f"{length.max_epochs} epochs planned"
    )
    rows = {
        "network": {"": config.model.name, **config.model.params},
        "schedule": {"": config.schedule.name, **config.schedule.params},
        "objective": {"predicts": config.objective.prediction, "weight": config.objective.weight},
        "optimizer": {("" if key == "name" else key): value for key, value in vars(config.optimizer).items()},
        "training": {
            "": f"step {model.step:,}, {planned}",
            "batch": length.batch_size,
            "precision": length.precision,
            "ema_decay": length.ema_decay,
            "seed": config.seed,
        },
        "sampler": {"": config.sampler.name, **config.sampler.params},
    }
    if length.init_from is not None:
        rows["training"]["began with"] = "the weights of another model"
    return {
        part: ", ".join(_code(f"{key} {value}".strip()) for key, value in values.items())
        for part, values in rows.items()
    }


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "/") + "`"
