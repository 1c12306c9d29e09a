"""ddpm-sample: draw images from a checkpoint alone."""

import time
from functools import partial

from ddpm.cli import command, default_sampler
from ddpm.config.schema import SampleConfig


def main(arguments: list[str]) -> None:
    command.run("sample", arguments, sample, defaults=partial(default_sampler.overrides, "sample"))


def sample(config: SampleConfig) -> None:
    """Run the command for one checked config. Raises UserError."""
    started = time.perf_counter()
    from ddpm.cli import sample_run

    sample_run.run(config, started)
