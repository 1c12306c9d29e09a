"""Classification accuracy score: how well a classifier that saw only these images knows the real ones."""

import torch
from torch import Tensor

from ddpm.evaluate.features.network import FeatureNetwork
from ddpm.evaluate.features.training import Recipe, fit, run
from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Found, Reference, Samples, choose, proportion

RECIPE = Recipe(steps=600, lr=4e-3)  # 7 or 8 passes over 10,000 images
PER_CLASS = 10  # images of each class to train a classifier with


def cas(samples: Samples, reference: Reference) -> Found:
    """Compute the classification accuracy score on all test images, and that of as many real training images."""
    train, test, k = reference.data.train, reference.data.test, reference.data.facts.num_classes
    if samples.guidance_scale != 1:
        note = f"no cas: it is asked at guidance_scale=1, these are drawn at {samples.guidance_scale:g}"
        return Found({}, [note])
    if samples.labels is None:
        return Found({}, ["no cas: it needs images with labels, of a conditional model or in an .npz file"])
    n = min(len(samples.images), len(train))
    if n < PER_CLASS * k:
        return Found({}, [f"no cas: it needs {PER_CLASS * k} images with labels, there are {n}"])
    real = choose(train, "cas", n)
    assert real.labels is not None and test.labels is not None
    values = dict[str, Metric]()
    for name, x, y in (
        ("cas", samples.images[:n], samples.labels[:n]),
        ("real_cas", real.images, real.labels),
    ):
        score = accuracy_score(x, y, test.images, test.labels, k, samples.seed, reference.device)
        values[name] = Metric(score.value, error=score.error, n=n)
    return Found(values)


def accuracy_score(
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    num_classes: int,
    seed: int,
    device: torch.device,
) -> Metric:
    """Return the accuracy on the test images of a classifier trained on the others (Ravuri & Vinyals 2019, *CAS*).

    Images uint8 (N, C, S, S), labels int64 (N,). Given synthetic images to train on, with the labels they were sampled
    for, it falls short of what as many real ones give by what they lack: likeness, variety, the right label. The
    network, the steps (600 of 128 images) and the order are the same whatever the images are.
    """
    channels, image_size = train_images.shape[1:3]
    network = FeatureNetwork(channels, image_size, num_classes)
    fit(network, train_images, train_labels, RECIPE, seed, device)
    _, logits = run(network, test_images, device)
    return proportion(logits.argmax(dim=1) == test_labels)
