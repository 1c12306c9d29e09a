"""The table of metrics: what `measure=[…]` names. `ddpm.register("metric")` adds to it."""

from collections.abc import Callable

from ddpm.evaluate.metrics.cas import cas
from ddpm.evaluate.metrics.distance import distance
from ddpm.evaluate.metrics.fid import fid
from ddpm.evaluate.metrics.likelihood import likelihood
from ddpm.evaluate.metrics.memorization import memorized
from ddpm.evaluate.metrics.prdc import neighbours
from ddpm.evaluate.reference import Found, Reference, Samples

# A single number is stored under the metric's own name.
METRICS: dict[str, Callable[[Samples, Reference], Found | float]] = {
    "distance": distance,
    "neighbours": neighbours,
    "memorization": memorized,
    "likelihood": likelihood,
    "cas": cas,
    "fid": fid,
}

# What of a Reference is loaded before any samples are drawn.
NEEDS = {"distance": "embedder", "neighbours": "embedder", "fid": "inception"}
ON_ALL_RANKS = {"likelihood"}  # computed by all processes together; the others by rank 0
