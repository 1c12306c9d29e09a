"""The model card: README.md of an exported folder, in the form that the Hugging Face Hub reads."""

from ddpm.data.persian import NOTICE as PERSIAN
from ddpm.export.formats import ddim_as_exported, ddim_steps
from ddpm.sample.model import Model
from ddpm.train.metrics_file import VALIDATED

NOTICES = {"persian": PERSIAN}
SCALE = 2.0  # of guidance, in the example


def card(model: Model, form: str, ema: bool, checkpoint_sha256: str, command: str) -> str:
    """Markdown. `form` is a key of `export.FORMATS`, `command` what trains such a model. Names from the checkpoint
    are shown as code, so that none of them is taken for markup.
    """
    facts, config = model.facts, model.config
    size, kind = (
        f"{facts.image_size}×{facts.image_size}×{facts.channels}",
        "averaged (EMA)" if ema else "last",
    )
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    parts = [
        _header(model, form),
        f"# A diffusion model of {_code(facts.name)}",
        f"{config.model.name} with {parameters:,} parameters, {'' if model.conditional else 'un'}conditional, for "
        f"images of {size}, trained with ddpm: {kind} weights of step {model.step:,}.",
        "## Sample",
        _diffusers(model) if form == "diffusers" else _rebuild(),
        "With ddpm, from the checkpoint that this was made of:",
        _block("sh", _ddpm_command(model)),
        "## Data",
        _data(model),
        "## Recipe",
        _table(_recipe(model)),
        "To train one like it:",
        _block("sh", command),
        "## Figures",
        _table({_code(key): f"{model.figures[key]:.5g}" for key in VALIDATED if key in model.figures}),
        f"Checkpoint: SHA-256 {_code(checkpoint_sha256)}.",
        "## Upload",
        "In this folder, with your own names: `hf upload your-name/your-model . .`",
    ]
    return "\n\n".join(parts) + "\n"


def _header(model: Model, form: str) -> str:
    """YAML, of fixed texts only."""
    restricted = model.config.dataset.name in NOTICES
    licence = (
        "license: other\nlicense_name: research-only  # of the images it was trained on"
        if restricted
        else "# license: yours to choose, with an eye on that of the images it was trained on"
    )
    library = "diffusers" if form == "diffusers" else "ddpm"
    task = "" if model.conditional else "pipeline_tag: unconditional-image-generation\n"
    return (
        f"---\n{licence}\nlibrary_name: {library}\n{task}tags:\n- diffusion\n- ddpm\n- image-generation\n---"
    )


def _diffusers(model: Model) -> str:
    steps, T = ddim_steps(model.schedule.num_timesteps), model.schedule.num_timesteps
    clipped = ", use_clipped_model_output=True" if ddim_as_exported(model).params["clip"] == "clip" else ""
    if model.conditional:
        return "\n\n".join([*_conditional(model, steps, clipped), _SAME])
    code = f"""import torch
from diffusers import DDIMPipeline, DDPMPipeline

pipeline = DDIMPipeline.from_pretrained(".")
seed = torch.Generator().manual_seed(0)
images = pipeline(batch_size=4, generator=seed, num_inference_steps={steps}{clipped}).images

pipeline = DDPMPipeline.from_pretrained(".")  # all {T:,} steps, with fresh noise in each
images += pipeline(batch_size=1, generator=seed, num_inference_steps={T}).images"""
    return "\n\n".join(["With diffusers, in this folder:", _block("python", code), _SAME])


_SAME = (
    "DDIM as written here gives the images of ddpm's `sampler=ddim sampler.spacing=trailing` from the same noise. "
    "Take a number of steps that divides the number of timesteps."
)


def _conditional(model: Model, steps: int, clipped: str) -> list[str]:
    channels, size, _ = model.shape
    classes = model.facts.num_classes
    guided = model.config.objective.label_dropout > 0
    output = "unet(x, t, label).sample"
    if guided:
        output = "none + scale * (unet(x, t, label).sample - none)"
    code = f"""import torch
from diffusers import DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("unet")
scheduler = DDIMScheduler.from_pretrained("scheduler")
label = torch.arange({classes})  # 0 to {classes - 1}; {classes} is no label
{f"scale = {SCALE}  # of guidance; 1 is off" if guided else "# trained with a label always: no guidance"}
x = torch.randn(len(label), {channels}, {size}, {size}, generator=torch.Generator().manual_seed(0))
scheduler.set_timesteps({steps})
with torch.no_grad():
    for t in scheduler.timesteps:
"""
    if guided:
        code += f"        none = unet(x, t, torch.full_like(label, {classes})).sample\n"
    code += f"""        output = {output}
        x = scheduler.step(output, t, x{clipped}).prev_sample
images = (x.clamp(-1, 1) + 1) / 2"""
    names = ", ".join(f"{i} {_code(name)}" for i, name in enumerate(model.facts.class_names[:100]))
    words = "No pipeline of diffusers hands labels on, so in this folder, step by step:"
    return [words, _block("python", code), *([f"Labels: {names}."] if names else [])]


def _rebuild() -> str:
    code = """import json
import torch
from safetensors.torch import load_file
from ddpm import Model, build
from ddpm.config.schema import TrainConfig, check
from ddpm.data.info import facts

about = json.load(open("config.json"))
trained, data = check(TrainConfig, about["config"]), facts(about["facts"])
network = build.network(trained.model, trained.objective, data).eval()
network.load_state_dict(load_file("model.safetensors"))
model = Model(network, build.schedule(trained.schedule), trained, data, torch.device("cpu"))
images = model.sample(16, seed=0)  # (16, C, H, W) in [-1, 1]"""
    return "\n\n".join(["With ddpm, in this folder:", _block("python", code)])


def _ddpm_command(model: Model) -> str:
    sampler = ddim_as_exported(model).params
    label = (
        " label=all guidance_scale=2"
        if model.conditional and model.config.objective.label_dropout > 0
        else ""
    )
    return (
        f"ddpm-sample ckpt=<checkpoint> n=16{label} sampler=ddim sampler.spacing=trailing "
        f"sampler.num_steps={sampler['num_steps']} sampler.clip={sampler['clip']}"
    )


def _data(model: Model) -> str:
    facts = model.facts
    text = (
        f"{_code(facts.name)}: {facts.image_size}×{facts.image_size}×{facts.channels}, {facts.levels} levels a "
        f"channel, {facts.num_classes or 'no'} classes."
    )
    notice = NOTICES.get(model.config.dataset.name, "The licence of the images is that of their publishers.")
    return f"{text} {notice}"


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


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"
