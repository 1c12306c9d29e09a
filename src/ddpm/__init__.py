"""Train, sample and judge denoising diffusion models on small images."""

from ddpm.plugins import register

__all__ = ["register"]
__version__ = "0.1.0"
