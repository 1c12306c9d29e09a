"""Choose the sampler of a command where none is typed."""

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config import hydra
from ddpm.config.overrides import as_overrides, typed_value
from ddpm.config.schema import SCHEMAS, check
from ddpm.errors import printable
from ddpm.runtime.world import world
from ddpm.sample import sampler_file

BACKWARDS = ("reconstruct", "interpolate")  # tasks that want no fresh noise


def overrides(program: str, typed: list[str]) -> list[str]:
    """Return the overrides that choose the default sampler; none if a sampler or no checkpoint is typed.

    The file sampler.yaml beside the checkpoint wins over the sampler of the training. Print a line if it is used.
    Raises UserError.
    """
    ckpt = typed_value(typed, "ckpt")
    if ckpt in (None, "null") or typed_value(typed, "sampler") is not None:
        return []
    others = [override for override in typed if not override.lstrip("+~").startswith("sampler")]
    check(SCHEMAS[program], hydra.compose(program, others))  # their mistakes come before those of a file
    path, (meta, _), _ = locate.read_wanted(ckpt, checkpoint.read_meta)
    trained = checkpoint.config(path, meta)
    if typed_value(typed, "task") in BACKWARDS:
        return ["sampler=ddim", "sampler.spacing=logsnr"]
    sampler, file = sampler_file.default(trained, path.parent)
    if file is not None and world().first:
        print(printable(f"sampler={sampler.name} as in {file}; sampler=… takes another"), flush=True)
    return as_overrides({"sampler": sampler.to_dict()})
