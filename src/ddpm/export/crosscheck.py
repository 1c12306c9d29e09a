"""An exported folder, loaded with diffusers, against the model it was made from. The one module that imports it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.export.formats import ddim_as_exported, unet_config
from ddpm.sample.model import Guidance, Model, denoiser, levels
from ddpm.sample.sampling import last, run

IMAGES = 4
ALLOWED = 0.02  # of images in [-1, 1]; a mistake makes other images altogether


def largest_difference(model: Model, folder: Path) -> float:
    """Between the images of both tools, in [-1, 1], from the same noise (DDIM with eta = 0).

    Raises ImportError where diffusers is not installed, and what diffusers raises if it cannot load the folder.
    """
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    noise = torch.randn(IMAGES, *model.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(IMAGES) % model.facts.num_classes if model.conditional else None
    difference = ours(model, noise, labels) - theirs(diffusers, model, folder, noise, labels).clamp(-1, 1)
    return difference.abs().max().item()


@torch.inference_mode()
def ours(model: Model, x_T: Tensor, y: Tensor | None) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] from x_T, in the steps that the exported folder's DDIM takes."""
    sampler = ddim_as_exported(model)
    denoise = denoiser(model, sampler, y, Guidance())
    steps = run(model, sampler, denoise, levels(model, sampler), x_T, torch.arange(len(x_T)), seed=0)
    return last(steps).clamp(-1, 1)


def theirs(diffusers: Any, model: Model, folder: Path, noise: Tensor, labels: Tensor | None) -> Tensor:
    """By the pipeline where there is one. It draws its noise from the generator, the same as here."""
    steps: int = ddim_as_exported(model).params["num_steps"]
    local = {"local_files_only": True, "low_cpu_mem_usage": False}
    if labels is None:
        assert (
            diffusers.DDPMPipeline.from_pretrained(folder, **local).unet.config.sample_size == model.shape[1]
        )
        pipeline = diffusers.DDIMPipeline.from_pretrained(folder, **local)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            batch_size=len(noise),
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=steps,
            use_clipped_model_output=True,
            output_type="np",  # "pt" is not the same in all versions
        ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", **local)
    assert unet.config.num_class_embeds == unet_config(model)["num_class_embeds"]
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    scheduler.set_timesteps(steps)
    x = noise
    with torch.inference_mode():
        for t in scheduler.timesteps:
            output = unet(x, t, labels).sample
            x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    return x
