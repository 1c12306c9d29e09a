"""Features of large networks, by the libraries that keep them: Inception (torch-fidelity), DINOv2 (transformers)."""

import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm.data.info import DatasetInfo
from ddpm.errors import UserError, install_hint
from ddpm.evaluate.features.network import repeatable
from ddpm.io.files import reason

Run = Callable[[Tensor, int], tuple[Tensor, None]]
MAX_BATCH = 50  # images; each becomes 299×299 or 224×224, and a batch of hundreds takes gigabytes
LAYER = "2048"  # the pooled features before the logits, those of the usual FID
SIDE = 224  # pixels, of DINOv2's images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained


def inception(facts: DatasetInfo, device: torch.device, say: Callable[[str], None]) -> tuple[Run, str]:
    """Images uint8 (N, 1 or 3, S, S) → float32 (N, 2048), and the SHA-256 of the weights.

    The network of the usual FID (Heusel et al. 2017), as torch-fidelity has it: it resizes to 299×299 by itself; grey
    images are repeated three times. Raises UserError where torch-fidelity is absent, the weights cannot be downloaded,
    or images are not grey or RGB.
    """
    _check_channels(facts)
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            f"dataset {facts.name}: its features come from Inception, which needs torch-fidelity: "
            + install_hint("inception")
        ) from None
    say("Inception features by torch-fidelity: its weights (95 MB) are downloaded at their first use")
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", [LAYER])
    except Exception as error:  # of urllib, or of whatever reads a damaged file
        raise UserError(f"torch-fidelity cannot get the Inception weights: {reason(error)}") from error
    return _run(model, lambda images: model(images)[0], device), _hash(model)


def dinov2(facts: DatasetInfo, device: torch.device, folder: str) -> tuple[Run, str]:
    """Images uint8 (N, 1 or 3, S, S) → the class token (N, d) of DINOv2 (Oquab et al. 2023), and its SHA-256.

    `folder` holds config.json and model.safetensors, as transformers saves them; no code in it is run, and nothing is
    downloaded. Images are resized to 224×224 (bicubic); grey ones are repeated three times. Raises UserError where
    transformers is absent, the folder does not hold this network, or images are not grey or RGB.
    """
    _check_channels(facts)
    try:
        from transformers import Dinov2Model
    except ImportError:
        raise UserError(f"features=dinov2 needs transformers: {install_hint('dinov2')}") from None
    safe = {"use_safetensors": True, "local_files_only": True, "attn_implementation": "eager"}
    why = "there is no such folder"
    if os.path.isdir(folder):
        try:
            model, found = Dinov2Model.from_pretrained(folder, output_loading_info=True, **safe)
            why = f"it lacks the weights {min(found['missing_keys'])}" if found["missing_keys"] else ""
        except Exception as error:  # of many kinds, for files of many kinds
            why = reason(error)
    if why:
        raise UserError(f"features_path={folder}: holds no DINOv2 of transformers: {why}")
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def embed(images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        token: Tensor = model(pixel_values=(x - mean) / std).pooler_output
        return token

    return _run(model, embed, device), _hash(model)


def _check_channels(facts: DatasetInfo) -> None:
    if facts.channels not in (1, 3):
        raise UserError(
            f"dataset {facts.name}: no features for images of {facts.channels} channels; allowed: 1 or 3"
        )


def _run(model: Any, embed: Callable[[Tensor], Tensor], device: torch.device) -> Run:
    """Embed uint8 images (N, 1 or 3, S, S) in batches, as RGB."""
    model.to(device).eval()

    @torch.inference_mode()
    def run(images: Tensor, batch_size: int) -> tuple[Tensor, None]:
        with repeatable():
            parts = [
                embed(part.expand(-1, 3, -1, -1).contiguous().to(device)).float().cpu()
                for part in torch.split(images, min(batch_size, MAX_BATCH))
            ]
        return torch.cat(parts), None

    return run


def _hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
