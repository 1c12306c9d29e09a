"""Choose the sampler and the guidance of a command where none is typed."""

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config import hydra
from ddpm.config.overrides import as_overrides, typed_value
from ddpm.config.schema import SCHEMAS, check
from ddpm.errors import printable
from ddpm.runtime.world import world
from ddpm.sample import sampler_file

BACKWARDS = ("reconstruct", "interpolate")  # tasks that want no fresh noise, and no guidance


def overrides(program: str, typed: list[str]) -> list[str]:
    """Return the overrides that choose the default sampler and guidance; none without a checkpoint.

    A typed sampler replaces that of the training, for which the file sampler.yaml beside the checkpoint counts first (a
    line is printed if it is used); a typed guidance_scale replaces the guidance of the training. Raises UserError.
    """
    ckpt = typed_value(typed, "ckpt")
    if ckpt in (None, "null"):
        return []
    of_sampler = [each for each in typed if each.lstrip("+~").startswith("sampler")]
    chosen = typed_value(typed, "sampler") is not None
    others = typed if chosen else [each for each in typed if each not in of_sampler]
    check(SCHEMAS[program], hydra.compose(program, others))  # their mistakes come before those of a file
    path, (meta, _), _ = locate.read_wanted(ckpt, checkpoint.read_meta)
    trained, found = checkpoint.config(path, meta), list[str]()
    backwards = typed_value(typed, "task") in BACKWARDS
    if typed_value(typed, "guidance_scale") is None and not backwards:
        found = as_overrides(sampler_file.recommended_guidance(trained))
    if chosen:
        return found
    if backwards:
        return ["sampler=ddim", "sampler.spacing=logsnr"]
    sampler, file = sampler_file.default(trained, path.parent)
    if file is not None and world().first:
        print(printable(f"sampler={sampler.name} as in {file}; sampler=… takes another"), flush=True)
    return found + as_overrides({"sampler": sampler.to_dict()})
