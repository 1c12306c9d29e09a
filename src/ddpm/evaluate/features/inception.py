"""Inception features by torch-fidelity (extra `inception`), for images that no small network here was made for."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm.data.info import DatasetInfo
from ddpm.errors import UserError, install_hint
from ddpm.evaluate.features.network import repeatable
from ddpm.io.files import reason

Run = Callable[[Tensor, int], tuple[Tensor, None]]
MAX_BATCH = 50  # images; each becomes 299×299, and a batch of hundreds takes gigabytes
LAYER = "2048"  # the pooled features before the logits, those of the usual FID


def network(facts: DatasetInfo, device: torch.device, say: Callable[[str], None]) -> tuple[Run, str]:
    """Images uint8 (N, 1 or 3, S, S) → float32 (N, 2048), and the SHA-256 of the weights.

    The network of the usual FID (Heusel et al. 2017), as torch-fidelity has it: it resizes to 299×299 by itself; grey
    images are repeated three times. The features are used as all others are, whitened by PCA on the training images to
    at most 32 directions, so that the floor formula holds: the distances are therefore not those published as FID.
    Raises UserError where torch-fidelity is absent, the weights cannot be downloaded, or images are not grey or RGB.
    """
    if facts.channels not in (1, 3):
        raise UserError(
            f"dataset {facts.name}: no features for images of {facts.channels} channels; allowed: 1 or 3"
        )
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(
            f"dataset {facts.name}: its features come from Inception, which needs torch-fidelity: "
            + install_hint("inception")
        ) from None
    say("Inception features by torch-fidelity: its weights (95 MB) are downloaded at their first use")
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", [LAYER]).to(device).eval()
    except Exception as error:  # of urllib, or of whatever reads a damaged file
        raise UserError(f"torch-fidelity cannot get the Inception weights: {reason(error)}") from error

    @torch.inference_mode()
    def run(images: Tensor, batch_size: int) -> tuple[Tensor, None]:
        with repeatable():
            parts = [
                model(part.expand(-1, 3, -1, -1).contiguous().to(device))[0]
                for part in torch.split(images, min(batch_size, MAX_BATCH))
            ]
        return torch.cat(parts).float().cpu(), None

    return run, _hash(model)


def _hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
