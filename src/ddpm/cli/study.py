"""ddpm-eval -m: compare settings of one checkpoint's sampler."""

import itertools
from dataclasses import replace

from ddpm.cli import eval_keys
from ddpm.config import hydra
from ddpm.config.overrides import typed_value
from ddpm.config.schema import EvalConfig, check
from ddpm.config.unused import refuse_unused
from ddpm.errors import UserError
from ddpm.runtime.world import world

# What a setting may change, beside the sampler's keys.
SWEPT = ("sampler", "guidance_scale", "guidance_rescale", "guidance_interval")
MEASURED = ["measure=[distance,neighbours]"]  # where `measure` is not typed
MAX_SETTINGS = 1000


def study(typed: list[str]) -> None:
    """Run a multirun of ddpm-eval. Raises UserError before anything is drawn where one setting is wrong."""
    settings, varied = _settings(typed)
    from ddpm.cli import study_run

    study_run.run(settings, varied)


def _settings(typed: list[str]) -> tuple[list[EvalConfig], list[str]]:
    """Return the checked config of every setting, and the keys that differ among them. Raises UserError."""
    if world().size > 1:  # by whatever launcher
        raise UserError("-m measures one setting after the other in one process: leave torchrun out")
    for override in typed:
        if override.lstrip("+~").startswith("hydra"):
            raise UserError(f"{override}: a study loads model and data once, in one process; leave it out")
    if typed_value(typed, "ckpt") is None:
        raise UserError("ckpt is needed: -m compares settings of one checkpoint's sampler (ckpt=…)")
    with hydra.parsed("eval", typed) as parsed:
        varied = [each.get_key_element().lstrip("+") for each in parsed if each.is_sweep_override()]
        values = {each.get_key_element(): hydra.unrolled(each) for each in parsed}
    for key in varied:
        if key not in SWEPT and not key.startswith("sampler."):
            raise UserError(f"{key}: -m varies the sampler and guidance; compare=[…] compares all else")
    jobs = [list(job) for job in itertools.islice(itertools.product(*values.values()), MAX_SETTINGS + 1)]
    if len(jobs) > MAX_SETTINGS:
        raise UserError(f"more than {MAX_SETTINGS:,} settings; allowed: {MAX_SETTINGS:,}")
    before = MEASURED + eval_keys.before_typed(jobs[0])  # what is not swept, and so the same for all
    settings, taken = list[EvalConfig](), list[list[str]]()
    for job in jobs:
        config: EvalConfig = check(EvalConfig, hydra.compose("eval", before + job))
        eval_keys.check_keys(config)
        if config.guidance_scale == 1:  # where the other keys of guidance have no effect
            config = replace(config, guidance_rescale=0.0, guidance_interval=None)
        if config in settings:
            if config.guidance_scale == 1 and {"guidance_rescale", "guidance_interval"} & {*varied}:
                continue
            same = [each for each in job if each.partition("=")[0].lstrip("+") in varied]
            raise UserError(f"two settings are the same: {', '.join(same)}")
        settings.append(config)
        taken.append(job)
    refuse_unused(zip(taken, settings, strict=True))
    measure = settings[0].measure
    if "distance" not in measure or "likelihood" in measure:
        raise UserError(f"measure=[{','.join(measure)}]: -m compares by distance; likelihood has no sampler")
    return settings, varied
