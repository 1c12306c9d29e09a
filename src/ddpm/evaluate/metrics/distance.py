"""Distances between the distributions of samples and of test images, and what a classifier says of the samples."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ddpm.evaluate.metrics.frechet import (
    class_frechet,
    frechet_distance,
    frechet_floor,
    frechet_interval,
    gaussian,
    kid,
)
from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Embedded, Found, Reference, Samples, proportion

PER_DIMENSION = 4  # images for each dimension: with fewer, neither distance nor floor means much
FEWEST = 50  # images for KID
CONFIDENT = 0.95  # probability of the likeliest class


def distance(samples: Samples, reference: Reference) -> Found:
    """Compute Fréchet distances, KID and, where the features know classes, the statistics of these."""
    facts, embedded = reference.data.facts, samples.embedded
    found = distances(embedded, reference.test, facts.num_classes).beside(of_real(reference))
    if embedded.probabilities is None:
        name = reference.embedder.features.name
        absent = [f"no figures of classes: the features {name} know none"] if facts.num_classes else []
        return Found(found.values, [*found.notes, *absent])
    histogram = {
        "classes": list(facts.class_names) or [str(k) for k in range(facts.num_classes)],
        "samples": class_shares(embedded).tolist(),
        "real": class_shares(reference.test).tolist(),
    }
    values = {**found.values, **class_metrics(embedded, samples.labels, facts.class_names)}
    return Found(values, found.notes, {"histogram": histogram})


@lru_cache(maxsize=1)  # the same for all samples
def of_real(reference: Reference) -> Found:
    """Compute the distances of training images from the test images, and the classes of the test images."""
    facts = reference.data.facts
    found = distances(reference.train, reference.test, facts.num_classes)
    classes = class_metrics(reference.test, reference.split.labels, facts.class_names)
    return Found({**found.values, **classes}, found.notes)


def distances(x: Embedded, test: Embedded, num_classes: int) -> Found:
    """Compute Fréchet distances, over all and within classes, in features and in pixels, and KID."""
    values, notes = dict[str, Metric](), list[str]()
    n = min(len(x.features), len(test.features))
    for name, a, b in (("", x.features, test.features), ("pixel_", x.pixels, test.pixels)):
        needed = PER_DIMENSION * a.shape[1]
        if n < needed:
            notes.append(f"no {name}fd: it needs {needed} images on either side, there are {n}")
            continue
        total, interval = frechet_distance(gaussian(a), gaussian(b)), frechet_interval(a, b)
        values[f"{name}fd"] = Metric(total, floor=frechet_floor(len(a), len(b), a.shape[1]), n=n)
        values[f"{name}fd_excess"] = Metric(*interval, floor=total - interval.value, n=n)
    if x.classes is not None and test.classes is not None and n > 1:
        within = class_frechet(x.features, x.classes, test.features, test.classes, num_classes)
        if not within:
            notes.append("no class_fd_excess: no class has enough images")
        else:
            excess = sum(each.distance - each.floor for each in within.values()) / len(within)
            floor = sum(each.floor for each in within.values()) / len(within)
            values["class_fd_excess"] = Metric(excess, floor=floor, n=n)
            if left := ", ".join(str(k) for k in range(num_classes) if k not in within):
                notes.append(f"class_fd_excess is without the classes {left}, which have too few images")
    if n >= FEWEST:
        value, error = kid(x.features, test.features)
        values["kid"] = Metric(value, error=error, n=n)
    else:
        notes.append(f"no kid: it needs {FEWEST} images on either side, there are {n}")
    return Found(values, notes)


def class_metrics(x: Embedded, meant: Tensor | None, names: Sequence[str]) -> dict[str, Metric]:
    """Compute classifier confidence, accuracy on the labels `meant`, and the rarest and most frequent class."""
    if x.probabilities is None or x.classes is None:
        return {}
    shares = class_shares(x)
    confident = x.probabilities.max(1).values >= CONFIDENT
    values = {"confident": proportion(confident, f"p ≥ {CONFIDENT}")}
    if meant is not None:
        values["right_class"] = proportion(x.classes == meant)
    for name, which in (
        ("rarest_class", int(shares.argmin())),
        ("most_frequent_class", int(shares.argmax())),
    ):
        text = names[which] if names else str(which)
        values[name] = Metric(shares[which].item(), n=len(x.classes), text=text)
    return values


def class_shares(x: Embedded) -> Tensor:
    """Return the share of each class, float64 (num_classes,)."""
    assert x.probabilities is not None and x.classes is not None
    counts = torch.bincount(x.classes, minlength=x.probabilities.shape[1])
    return counts.double() / len(x.classes)
