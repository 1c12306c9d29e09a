"""What a training tells its user: lines for the screen and for train.log, and a bar on a terminal."""

from typing import TYPE_CHECKING

from ddpm.config.choices import CONFIG_DIR, read_yaml
from ddpm.runtime.console import duration

if TYPE_CHECKING:
    from ddpm.train.state import TrainState


def estimate(run: "TrainState", seconds_per_step: float) -> str:
    """How long the rest will take and, if that is long on a CPU, what would be shorter."""
    seconds = seconds_per_step * (run.max_steps - run.step)
    text = f"about {duration(seconds)} for {run.max_steps - run.step:,} more steps on this {run.device.type}"
    short = CONFIG_DIR / "experiment" / f"{run.facts.name}_cpu.yaml"
    slow = run.device.type == "cpu" and seconds > 900 and short.exists()
    if slow and run.max_steps > read_yaml(short)["trainer"]["max_steps"]:  # else this is the short one
        text += f"; experiment={short.stem} is the short one"
    return text
