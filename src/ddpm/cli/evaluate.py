"""ddpm-eval: draw images from a checkpoint, or take others, and say how good they are."""

import sys

from ddpm.cli import app
from ddpm.cli.eval_keys import before_typed, check_keys
from ddpm.config import hydra
from ddpm.config.schema import EvalConfig
from ddpm.runtime.world import world


def main() -> None:
    sys.argv[1:] = [_with_paths(argument) for argument in sys.argv[1:]]
    app.run("eval", EvalConfig, evaluate, sweep=_study, defaults=before_typed)


def _study(typed: list[str]) -> None:
    from ddpm.cli import study

    study.study(typed)


def _with_paths(argument: str) -> str:
    """compare=[a,b], whose items are paths, each in quotes."""
    key, _, value = argument.partition("=")
    if key != "compare" or not value or value == "null":
        return argument
    items = value[1:-1].split(",") if value[:1] == "[" and value[-1:] == "]" else [value]
    return (
        f"compare=[{','.join(hydra.quoted(item.strip(' ' + chr(39) + chr(34))) for item in items if item)}]"
    )


def evaluate(config: EvalConfig) -> None:
    """The whole command for one checked config.

    Of several processes (torchrun) each draws its share of the images and asks the model about its share of the real
    ones; rank 0 measures the rest, and writes.
    """
    check_keys(config)
    if config.compare is not None:
        from ddpm.evaluate import record, table

        print(table.table(record.read_all(config.compare)))
        return
    from ddpm.evaluate import run as judging
    from ddpm.runtime import device as runtime_device
    from ddpm.runtime import memory
    from ddpm.runtime.distributed import process_group

    own = world()
    memory.keep_freed()
    runtime_device.set_up_cuda()
    device = runtime_device.device(config.device, own)
    with process_group(own, device):
        (judging.of_images if config.ckpt is None else judging.of_model)(config, own, device)
