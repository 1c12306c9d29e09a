"""Classification accuracy score: how well a classifier that saw only these images knows the real ones."""

from dataclasses import replace
from functools import lru_cache

from ddpm.data.dataset import Split
from ddpm.evaluate.features.network import FeatureNetwork
from ddpm.evaluate.features.training import Recipe, fit, run
from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Found, Reference, Samples, choose, proportion

RECIPE = Recipe(steps=600, lr=4e-3)  # 7 or 8 passes over 10,000 images
PER_CLASS = 10  # images of each class to train a classifier with


def cas(samples: Samples, reference: Reference) -> Found:
    """Compute the classification accuracy score on all test images, and that of as many real training images."""
    train, k = reference.data.train, reference.data.facts.num_classes
    if samples.labels is None:
        return Found({}, ["no cas: it needs images with labels, of a conditional model or in an .npz file"])
    n = min(len(samples.images), len(train))
    if n < PER_CLASS * k:
        return Found({}, [f"no cas: it needs {PER_CLASS * k} images with labels, there are {n}"])
    own = Split(samples.images[:n], samples.labels[:n])
    score = accuracy_score(own, reference, samples.seed)
    return Found({"cas": score, "real_cas": of_real(reference, n, samples.seed)})


@lru_cache(maxsize=1)  # the same for all samples
def of_real(reference: Reference, n: int, seed: int) -> Metric:
    """Compute the score of n training images."""
    return accuracy_score(choose(reference.data.train, "cas", n), reference, seed)


def accuracy_score(train: Split, reference: Reference, seed: int) -> Metric:
    """Return the accuracy on the test images of a classifier trained on `train` (Ravuri & Vinyals 2019, *CAS*).

    Given synthetic images to train on, with the labels they were sampled for, it falls short of what as many real ones
    give by what they lack: likeness, variety, the right label. The network, the steps (600 of 128 images) and the order
    are the same whatever the images are.
    """
    test, facts = reference.data.test, reference.data.facts
    assert train.labels is not None and test.labels is not None
    network = FeatureNetwork(facts.channels, facts.image_size, facts.num_classes)
    fit(network, train.images, train.labels, RECIPE, seed, reference.device)
    _, logits = run(network, test.images, reference.device)
    return replace(proportion(logits.argmax(dim=1) == test.labels), n=len(train))
