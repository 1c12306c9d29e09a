"""ddpm-export: a checkpoint as a folder that other tools load, with a model card."""

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.cli import app
from ddpm.config.choices import choices
from ddpm.config.overrides import as_overrides
from ddpm.config.schema import NOT_PART_OF_THE_EXPERIMENT, ExportConfig, to_dict
from ddpm.config.tables import uses_plugin
from ddpm.errors import UserError, printable
from ddpm.io.files import reason, write_atomically

if TYPE_CHECKING:
    from ddpm.sample.model import Model


def main() -> None:
    app.run("export", ExportConfig, export)


def export(config: ExportConfig) -> None:
    """The whole command for one checked config."""
    import torch

    from ddpm.checkpoint import locate, verify
    from ddpm.export.formats import FORMATS
    from ddpm.export.model_card import card
    from ddpm.sample.model import load

    path, notes = locate.newest_good(locate.find(config.ckpt), check=verify.examine)
    model, meta = load(path, torch.device("cpu"), config.ema)
    files = FORMATS[config.format](model)
    text = card(model, config.format, config.ema, meta.sha256, training_command(model))
    files["README.md"] = text.encode()
    with _folder(Path(config.out)) as out:
        for name, data in files.items():
            (out / name).parent.mkdir(exist_ok=True)
            write_atomically(out / name, data)
        checked = _check(model, out) if config.format == "diffusers" else None
    for line in [*notes, *(str(out / name) for name in files), *([checked] if checked else [])]:
        print(printable(line))


def _check(model: "Model", out: Path) -> str:
    """Both tools' images from the same noise. Raises UserError where they are not the same."""
    from ddpm.export import crosscheck
    from ddpm.export.formats import ddim_steps

    try:
        import diffusers
    except (ImportError, RuntimeError):
        return "the folder is complete; to see that both tools draw the same images: pip install diffusers"
    try:
        difference = crosscheck.largest_difference(model, out)
    except Exception as error:  # of other people's code
        raise UserError(f"diffusers {diffusers.__version__} cannot load what was written: {error}") from None
    if not difference <= crosscheck.ALLOWED:
        raise UserError(
            f"diffusers {diffusers.__version__} draws other images from {out} than ddpm: largest difference "
            f"{difference:.2g} in [-1, 1]; nothing was kept"
        )
    return (
        f"checked with diffusers {diffusers.__version__}: {crosscheck.IMAGES} images from the same noise, "
        f"{ddim_steps(model.schedule.num_timesteps)} steps of DDIM: largest difference {difference:.1e} in [-1, 1]"
    )


def training_command(model: "Model") -> str:
    """The shortest `ddpm-train` that composes the same config; paths are left for the reader to fill in."""
    from ddpm.config import hydra

    config = to_dict(model.config)
    begin = [f"dataset={_file('dataset', config)}", f"objective={config['objective']['prediction']}"]
    path = "path" in config["dataset"]
    given = ["dataset.path=here"] if path else []
    default = hydra.compose("train", begin + given)
    for group in ("model", "schedule", "sampler"):
        if default[group]["name"] != config[group]["name"]:
            begin.append(f"{group}={_file(group, config)}")
    default = hydra.compose("train", begin + given)
    chosen = {group for group, value in config.items() if isinstance(value, dict) and "name" in value}
    changed = []
    for override in as_overrides(
        {key: config[key] for key in config if key not in NOT_PART_OF_THE_EXPERIMENT}
    ):
        key, _, value = override.partition("=")
        group, _, name = key.rpartition(".")
        if key in ("trainer.resume", "trainer.init_from", "dataset.path") or key in chosen:
            continue
        was = default[group][name] if group else default[name]
        is_now = config[group][name] if group else config[name]
        if was != is_now:
            changed.append(f"{key}={value}")
    blanks = {
        "plugins=<module>": uses_plugin(config),
        "dataset.path=<images>": path,
        "trainer.init_from=<checkpoint>": model.config.trainer.init_from is not None,
    }
    words = [*(blank for blank, wanted in blanks.items() if wanted), *map(shlex.quote, begin + changed)]
    return " ".join(["ddpm-train", *words])


def _file(group: str, config: dict[str, Any]) -> str:
    return next(file for file, content in choices(group).items() if content["name"] == config[group]["name"])


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A new or empty folder, which goes again, with the parents made for it, if not all can be written."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"out={out}: exists already, and is no empty folder; choose another name")
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make out={out}: {reason(error)}") from None
    try:
        yield out
    except BaseException as error:
        for inside in [] if missing else out.iterdir():
            shutil.rmtree(inside, ignore_errors=True) if inside.is_dir() else inside.unlink(missing_ok=True)
        if missing:
            shutil.rmtree(out, ignore_errors=True)
        for parent in missing[1:]:
            with suppress(OSError):  # by now it may hold another export
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {out}: {reason(error)}") from None
        raise
