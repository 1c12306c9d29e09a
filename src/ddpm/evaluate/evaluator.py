"""The protocol: from a model to images, from images to an Evaluation.

The same is done for real training images, as many as there are samples: what they reach is what a perfect model of the
training data would.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.config.choices import Component
from ddpm.diffusion.samplers import Step
from ddpm.errors import UserError
from ddpm.evaluate import provenance
from ddpm.evaluate.metrics.registry import METRICS, NEEDS, ON_ALL_RANKS
from ddpm.evaluate.provenance import Clock
from ddpm.evaluate.record import Evaluation, Metric
from ddpm.evaluate.reference import Found, Reference, Samples, copies
from ddpm.io.images import to_uint8
from ddpm.runtime import distributed
from ddpm.runtime.world import ALONE, World
from ddpm.sample import model as sample_model
from ddpm.sample import sampling
from ddpm.sample.model import Guidance, Model

SHOWN = 64  # samples on the page


class Drawn(NamedTuple):
    """All images on rank 0; on other ranks their share."""

    images: Tensor  # uint8 (n, C, S, S)
    labels: Tensor | None  # int64 (n,), what each was asked to be
    evaluations: float  # of the network, for each image
    num_steps: int


def draw(
    model: Model,
    sampler: Component,
    *,
    n: int,
    seed: int,
    guidance: Guidance | None = None,
    batch_size: int = 256,
    world: World = ALONE,
    watch: Callable[[Tensor, Step], object] = lambda places, step: None,
    halved: Callable[[int, int], object] = lambda left, size: None,
) -> Drawn:
    """Draw images 0 … n-1 of a seed, of all classes alike (image i of class i mod K), spread over the processes.

    They are those of `ddpm-sample`. Raises UserError.
    """
    index, guidance = torch.arange(n), guidance or Guidance()
    with distributed.raise_on_all_ranks(world):
        y = sample_model.labels(model, None, index, guidance)
        num_steps = len(sample_model.levels(model, sampler)) - 1
        steps = sampling.generation(model, sampler, index, seed)
        own = index[world.share(n)]
        x, evaluations = sampling.draw_all(model, sampler, guidance, y, own, steps, batch_size, watch, halved)
        images = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous()
    return Drawn(distributed.gather_to_rank_zero(world, images, world.lengths(n)), y, evaluations, num_steps)


def prepare(reference: Reference, clock: Clock) -> None:
    """Load the features where a metric needs them, before samples are drawn. Raises UserError where there are none."""
    for part in filter(None, map(NEEDS.get, reference.parts)):
        with clock("loading"):
            try:
                getattr(reference, part)
            except UserError as error:
                others = ",".join(name for name in METRICS if name not in NEEDS)
                raise UserError(f"{error} (measure=[{others}] needs no features)") from None


class Gallery(NamedTuple):
    """What is shown of the images themselves."""

    samples: Tensor  # uint8 (k, C, S, S)
    pairs: Tensor  # uint8 (p, 2, C, S, S): a sample and the training image nearest to it, closest first


def compute(samples: Samples, clock: Clock, *, on_all_ranks: bool) -> list[Found]:
    """Compute those of the reference's metrics that all processes compute together, or those of rank 0."""
    found = list[Found]()
    for name in samples.reference.parts:
        if (name in ON_ALL_RANKS) is on_all_ranks:
            with clock(name):
                result = METRICS[name](samples, samples.reference)
            found.append(result if isinstance(result, Found) else Found({name: Metric(float(result))}))
    return found


def measure(
    samples: Samples,
    *,
    subject: str,
    unguided: Samples | None = None,
    on_all_ranks: Sequence[Found] | None = None,
    about: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    clock: Clock | None = None,
) -> tuple[Evaluation, Gallery]:
    """Compute all metrics of `samples`, and of `unguided`, the same drawn without guidance, those of images.

    `on_all_ranks` is what `compute` found with all processes (None: it is computed here); `about` (where the images are
    from) goes into the evaluation as it is. Raises ValueError for images that do not fit the data.
    """
    reference, images, clock = samples.reference, samples.images, clock or Clock()
    data = reference.data
    if images.dtype != torch.uint8 or images.shape[1:] != data.test.images.shape[1:] or not len(images):
        raise ValueError(
            f"images: {images.dtype} {tuple(images.shape)} do not fit those of {data.facts.name}"
        )
    if on_all_ranks is None:
        on_all_ranks = compute(samples, clock, on_all_ranks=True)
    with clock("copies"):
        said = [*notes, *copies(images, reference)]
    values, details = dict[str, Metric](), dict[str, Any]()
    for each in (*on_all_ranks, *compute(samples, clock, on_all_ranks=False)):
        values |= each.values
        details |= each.details
        said += each.notes
    plain = dict[str, Metric]()
    if unguided is not None:
        with clock("unguided"):
            for each in compute(unguided, Clock(), on_all_ranks=False):
                plain |= {key: value for key, value in each.values.items() if not key.startswith("real_")}
    made_with = {**_protocol(samples), **(about or {}), "seconds": provenance.seconds(clock.seconds)}
    evaluation = Evaluation(subject, values, made_with, plain, notes=tuple(said), **details)
    pairs, train = evaluation.memorization.get("pairs", []), data.train.images
    both = [images[[pair["sample"] for pair in pairs]], train[[pair["train"] for pair in pairs]]]
    return evaluation, Gallery(images[:SHOWN], torch.stack(both, dim=1))


def _protocol(samples: Samples) -> dict[str, Any]:
    """Describe what the metrics are of, and what with."""
    reference, facts = samples.reference, samples.reference.data.facts
    about = {
        "n": len(samples.images),
        "dataset": facts.name,
        "image_size": facts.image_size,
        "split": "test",
        "split_images": len(reference.split),
        "test_sha256": provenance.sha256(reference.data.test.images),
        "measure": list(reference.parts),
        "machine": provenance.machine(reference.device),
        "versions": provenance.versions(),
    }
    if reference.embeds:
        features = reference.embedder.features
        about |= {
            "feature_network": features.name,
            "feature_sha256": features.sha256,
            "feature_dim": features.dim,
        }
    return about
