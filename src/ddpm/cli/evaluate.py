"""ddpm-eval: draw images from a checkpoint, or read given ones, and measure how good they are."""

from ddpm.cli import command
from ddpm.cli.eval_keys import before_typed, check_keys
from ddpm.cli.study import study
from ddpm.config.schema import EvalConfig
from ddpm.evaluate import record, table


def main(arguments: list[str]) -> None:
    command.run("eval", arguments, evaluate, sweep=study, defaults=before_typed)


def evaluate(config: EvalConfig) -> None:
    """Run the command for one checked config. Raises UserError."""
    check_keys(config)
    if config.compare is not None:
        print(table.table(record.read_all(config.compare)))
        return
    from ddpm.evaluate import run

    run.evaluate(config)
