"""Turn an old pickled checkpoint (.pt) that you trust into a .safetensors file that ddpm reads.

Only weights are taken, by torch's restricted reader (`weights_only=True`), which runs no code of the file. A pickle
does not say what network they belong to, so LIKE names a ddpm checkpoint of the same one for the rest: train it for
one step with the right settings (`ddpm-train … trainer.max_steps=1`). SOURCE holds a state dict, or a dict with one
under "ema", "model" or "state_dict".
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.errors import CheckpointError, printable

PARTS = ("ema", "model", "state_dict")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the .pt file")
    parser.add_argument("like", metavar="LIKE", help="a ddpm checkpoint or run folder of the same network")
    parser.add_argument("out", type=Path, metavar="OUT", help="the .safetensors file to write")
    args = parser.parse_args()
    try:
        like, _ = locate.newest_good(locate.find(args.like))
        convert(args.source, like, args.out)
    except CheckpointError as error:
        sys.exit(f"error: {printable(str(error))}")
    print(f"{args.out}: weights of {args.source}, all else of {like}")


def convert(source: Path, like: Path, out: Path) -> None:
    """The file's average (or, where it has but one set, that) as both model and ema. Raises CheckpointError."""
    meta, tensors = checkpoint.load(like, "model")
    wanted = checkpoint.part(tensors, "model")
    held = read_pickle(source)
    sets = {part: held[part] for part in PARTS if isinstance(held.get(part), Mapping)} or {"ema": held}
    ema = _fitted(sets.get("ema", next(iter(sets.values()))), wanted, source)
    model = _fitted(sets.get("model", ema), wanted, source)
    both = {f"model.{name}": tensor for name, tensor in model.items()}
    both |= {f"ema.{name}": tensor for name, tensor in ema.items()}
    checkpoint.save(out, both, replace(meta, figures={}, versions={"converted from": source.name}))


def read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed pickle makes it raise almost anything
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as weights alone: {line}") from None
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path} holds no dict of weights")
    return held


def _fitted(found: Mapping[str, Any], wanted: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The weights under the network's names, as float32; `module.`, which DDP puts in front, is left out."""
    found = {str(name).removeprefix("module."): value for name, value in found.items()}
    for name in sorted(wanted.keys() | found.keys()):
        has, needs = found.get(name), wanted.get(name)
        if not isinstance(has, Tensor) or needs is None or has.shape != needs.shape:
            shapes = [tuple(each.shape) if isinstance(each, Tensor) else "nothing" for each in (has, needs)]
            raise CheckpointError(f"{source} does not fit: '{name}' is {shapes[0]}, needs {shapes[1]}")
    return {name: found[name].to(needs.dtype) for name, needs in wanted.items()}


if __name__ == "__main__":
    main()
