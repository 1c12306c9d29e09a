"""Training the networks behind features and classification: one loop, a function of images, labels and seed alone."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data.dataset import Split
from ddpm.evaluate.features.network import (
    FeatureNetwork,
    dimensions,
    initialise,
    reconstruction_head,
    repeatable,
    spread_out,
    unit,
    whitening,
)
from ddpm.io.cache import Arrays
from ddpm.runtime.randomness import permutation

BATCH_SIZE = 128
WARMUP = 0.1  # of the steps
WEIGHT_DECAY = 0.01
RECONSTRUCTION = 10.0  # weight of a squared error of pixels in 0 … 1 beside the cross-entropy
WHITENED_ON = 20_000  # images, spread over the training images: enough for this many moments


class Recipe(NamedTuple):
    """Steps of 128 images, and the largest learning rate."""

    steps: int
    lr: float


def train_features(split: Split, num_classes: int, recipe: Recipe, seed: int, device: torch.device) -> Arrays:
    """Train a feature network and its whitening. Returns the arrays that `extractor.load` reads.

    Weights are rounded to float16 before the whitening is computed, so that nothing is lost in the file.
    """
    assert split.labels is not None
    channels, image_size = split.images.shape[1:3]
    network = FeatureNetwork(channels, image_size, num_classes)
    head = reconstruction_head(network.num_moments, channels, image_size)
    fit(network, split.images, split.labels, recipe, seed, device, head)
    network.half().float()
    few = split.images[spread_out(len(split), WHITENED_ON)]
    moments, _ = run(network, few, device)
    mean, matrix = whitening(moments, dimensions(len(split)))
    weights = {name: value.half().cpu().numpy() for name, value in network.state_dict().items()}
    return {**weights, "whitening.mean": mean.numpy(), "whitening.matrix": matrix.numpy()}


def fit(
    network: FeatureNetwork,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    head: nn.Module | None = None,
) -> None:
    """Minimize cross-entropy, plus the squared error of the head's images where there is a head; AdamW, in place.

    images uint8 (N, C, S, S), labels int64 (N,). The images stay as they are: an augmentation (blur, noise) or
    softened labels would teach the network not to see what its features are there to see.
    """
    modules = nn.ModuleList([network] if head is None else [network, head])
    initialise(modules, seed, "features_init")
    modules.to(device)
    modules.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(modules.parameters(), weight_decay=WEIGHT_DECAY)
    with repeatable():
        for step, index in enumerate(batches(len(images), recipe.steps, seed)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * pace((step + 0.5) / recipe.steps)
            x = unit(images[index], device)
            moments, logits = network(x)
            loss = F.cross_entropy(logits, labels[index].to(device))
            if head is not None:
                loss = loss + RECONSTRUCTION * F.mse_loss(head(moments), x.flatten(1))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def pace(part: float) -> float:
    """Return the share of the learning rate after this part of the steps: linear warm-up, then cosine to 0."""
    return min(part / WARMUP, 0.5 + 0.5 * math.cos(math.pi * max(0.0, part - WARMUP) / (1 - WARMUP)))


def batches(n: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of each step's images: a new order for every pass, whose last, smaller batch is left out."""
    size = min(BATCH_SIZE, n)
    each = n // size
    for step in range(steps):
        if step % each == 0:
            order = permutation(seed, "features_order", step // each, n)
        start = step % each * size
        yield order[start : start + size]


@torch.inference_mode()
def run(
    network: FeatureNetwork, images: Tensor, device: torch.device, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Compute moments (N, M) and logits (N, num_classes) of uint8 images, float32 on the CPU."""
    with repeatable():
        parts = [network(unit(part, device)) for part in torch.split(images, batch_size)]
    return tuple(torch.cat([part[i] for part in parts]).cpu() for i in range(2))  # type: ignore[return-value]
