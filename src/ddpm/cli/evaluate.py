"""ddpm-eval: draw images from a checkpoint, or read given ones, and measure how good they are."""

import sys

from ddpm.cli import app
from ddpm.cli.eval_keys import before_typed, check_keys
from ddpm.cli.study import study
from ddpm.config.overrides import quoted
from ddpm.config.schema import EvalConfig
from ddpm.evaluate import record, table


def main() -> None:
    sys.argv[1:] = [_with_paths(argument) for argument in sys.argv[1:]]
    app.run("eval", EvalConfig, evaluate, sweep=study, defaults=before_typed)


def _with_paths(argument: str) -> str:
    """Quote each path of compare=[a,b]."""
    key, _, value = argument.partition("=")
    if key != "compare" or not value or value == "null":
        return argument
    items = value[1:-1].split(",") if value[:1] == "[" and value[-1:] == "]" else [value]
    paths = [quoted(item.strip(" '\"")) for item in items if item]
    return f"compare=[{','.join(paths)}]"


def evaluate(config: EvalConfig) -> None:
    """Run the command for one checked config. Raises UserError."""
    check_keys(config)
    if config.compare is not None:
        print(table.table(record.read_all(config.compare)))
        return
    from ddpm.evaluate import run

    run.evaluate(config)
