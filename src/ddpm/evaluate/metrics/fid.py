"""The customary FID: Inception features of samples against those of the training images, neither whitened."""

from functools import lru_cache

import torch
from torch import Tensor

from ddpm.evaluate.features.large import MAX_BATCH, Run
from ddpm.evaluate.metrics.frechet import Gaussian, frechet_distance
from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Found, Reference, Samples

CUSTOMARY = 50_000  # samples


def fid(samples: Samples, reference: Reference) -> Found:
    """Compute the Fréchet inception distance (Heusel et al. 2017) from all training images.

    It is named FID-50k for 50,000 samples and FID-n for n others, as it falls with n. Fewer than 2049 samples make a
    singular covariance, which is allowed.
    """
    n, train = len(samples.images), len(reference.data.train)
    if min(n, train) < 2:
        return Found({}, ["no fid: it needs 2 images"])
    run, sha256 = reference.inception
    value = frechet_distance(moments(run, samples.images), of_train(reference))
    name = "FID-50k" if n == CUSTOMARY else f"FID-{n}"
    return Found({name: Metric(value, n=n, text=f"against {train} training images; Inception {sha256}")})


@lru_cache(maxsize=1)  # the same for all samples
def of_train(reference: Reference) -> Gaussian:
    """Fit a Gaussian to the Inception features of all training images."""
    return moments(reference.inception[0], reference.data.train.images)


def moments(run: Run, images: Tensor) -> Gaussian:
    """Fit a Gaussian to the features of uint8 images (N ≥ 2, C, S, S), a batch of them in memory at a time."""
    first, second = torch.zeros(()).double(), torch.zeros(()).double()
    for part in torch.split(images, MAX_BATCH):
        x = run(part, MAX_BATCH)[0].double()
        first, second = first + x.sum(0), second + x.T @ x
    mean, n = first / len(images), len(images)
    return Gaussian(n, mean, (second - n * mean.outer(mean)) / (n - 1))
