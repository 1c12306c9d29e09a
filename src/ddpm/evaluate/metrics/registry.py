"""The tables of metrics. `measure=[…]` names their members; `ddpm.register` adds to METRICS."""

from collections.abc import Callable

from ddpm.evaluate.metrics import distance, prdc
from ddpm.evaluate.metrics.cas import cas
from ddpm.evaluate.metrics.likelihood import likelihood
from ddpm.evaluate.metrics.memorization import copied
from ddpm.evaluate.reference import Found, Reference, Samples

# Computed from samples, by rank 0. A single number is stored under the metric's own name.
METRICS: dict[str, Callable[[Samples, Reference], Found | float]] = {
    "distance": distance.distance,
    "neighbours": prdc.neighbours,
    "memorization": copied,
    "cas": cas,
}

# Of these the values of real training images are computed once, before any samples are drawn.
OF_REAL: dict[str, Callable[[Reference], Found]] = {
    "distance": distance.of_real,
    "neighbours": prdc.of_real,
}

# Asked of the model itself, by all processes together. Without a model they return a note.
OF_MODEL: dict[str, Callable[..., Found]] = {"likelihood": likelihood}
