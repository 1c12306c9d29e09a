"""Load an exported folder with diffusers and compare its images. The one module that imports diffusers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.errors import UserError
from ddpm.export.formats import ddim_as_exported
from ddpm.sample.model import Guidance, Model, denoiser, levels
from ddpm.sample.sampling import last, run

IMAGES = 4
ALLOWED = 0.02  # of images in [-1, 1]; a mistake makes other images altogether


def check(model: Model, folder: Path) -> str:
    """Compare both tools' images from the same noise. Returns a line for the user.

    Raises UserError where diffusers cannot load the folder or draws other images.
    """
    try:
        import diffusers
    except (ImportError, RuntimeError):
        return "the folder is complete; to see that both tools draw the same images: pip install diffusers"
    version = diffusers.__version__
    try:
        difference = largest_difference(model, folder)
    except Exception as error:  # of other people's code
        raise UserError(f"diffusers {version} cannot load what was written: {error}") from None
    if not difference <= ALLOWED:
        raise UserError(
            f"diffusers {version} draws other images from the folder than ddpm: largest difference {difference:.2g} "
            "in [-1, 1]; nothing was kept"
        )
    return (
        f"checked with diffusers {version}: {IMAGES} images from the same noise, "
        f"{ddim_as_exported(model).params['num_steps']} steps of DDIM: largest difference {difference:.1e} in [-1, 1]"
    )


def largest_difference(model: Model, folder: Path) -> float:
    """Return the largest difference between both tools' images in [-1, 1] from the same noise (DDIM with eta = 0)."""
    noise = torch.randn(IMAGES, *model.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(IMAGES) % model.facts.num_classes if model.conditional else None
    difference = ours(model, noise, labels) - theirs(model, folder, noise, labels)
    return difference.abs().max().item()


@torch.inference_mode()
def ours(model: Model, x_T: Tensor, y: Tensor | None) -> Tensor:
    """Draw images (N, C, H, W) in [-1, 1] from x_T in the steps that the exported folder's DDIM takes."""
    sampler = ddim_as_exported(model)
    denoise = denoiser(model, sampler, y, Guidance())
    steps = run(model, sampler, denoise, levels(model, sampler), x_T, torch.arange(len(x_T)), seed=0)
    return last(steps).clamp(-1, 1)


@torch.inference_mode()
def theirs(model: Model, folder: Path, x: Tensor, y: Tensor | None) -> Tensor:
    """Draw the same with the folder's network and scheduler. Raises what diffusers raises if it cannot load them."""
    import diffusers

    library: Any = diffusers
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    local = {"local_files_only": True}
    if y is None:
        library.DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **local)
    unet = library.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False, **local)
    scheduler = library.DDIMScheduler.from_pretrained(folder / "scheduler", **local)
    scheduler.set_timesteps(ddim_as_exported(model).params["num_steps"])
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, y).sample, t, x, use_clipped_model_output=True).prev_sample
    return x.clamp(-1, 1)
