"""ddpm-sample: draw images from a checkpoint alone."""

import time

from ddpm.cli import app
from ddpm.config.schema import SampleConfig


def main() -> None:
    app.run("sample", SampleConfig, sample, defaults=_default_sampler)


def _default_sampler(typed: list[str]) -> list[str]:
    from ddpm.cli import default_sampler

    return default_sampler.overrides("sample", SampleConfig, typed)


def sample(config: SampleConfig) -> None:
    """Run the command for one checked config. Raises UserError."""
    started = time.perf_counter()
    from ddpm.cli import sample_run

    sample_run.run(config, started)
