"""The protocol: from a model to images, from images to an Evaluation.

The same is done for real training images, as many as there are samples: what they reach is what a perfect model of the
training data would.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.config.choices import Component
from ddpm.data.dataset import Dataset
from ddpm.diffusion.samplers import Step
from ddpm.errors import UserError
from ddpm.evaluate import provenance
from ddpm.evaluate.metrics.registry import METRICS, OF_MODEL, OF_REAL
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
    """On rank 0 all images, elsewhere its own share."""

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
    guidance_scale: float = 1.0,
    batch_size: int = 256,
    world: World = ALONE,
    watch: Callable[[Tensor, Step], object] = lambda places, step: None,
    halved: Callable[[int, int], object] = lambda left, size: None,
) -> Drawn:
    """Images 0 … n-1 of a seed, of all classes alike (image i of class i mod K), spread over the processes.

    Those that `ddpm-sample` draws. Raises UserError.
    """
    index, guidance = torch.arange(n), Guidance(guidance_scale)
    with distributed.raise_on_all_ranks(world):
        y = sample_model.labels(model, None, index, guidance)
        num_steps = len(sample_model.levels(model, sampler)) - 1
        steps = sampling.generation(model, sampler, index, seed)
        own = index[world.share(n)]
        x, evaluations = sampling.draw_all(model, sampler, guidance, y, own, steps, batch_size, watch, halved)
        images = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous()
    return Drawn(distributed.gather_to_rank_zero(world, images, world.lengths(n)), y, evaluations, num_steps)


def prepare(
    data: Dataset,
    *,
    n: int,
    parts: tuple[str, ...] = (*METRICS, *OF_MODEL),
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    clock: Clock | None = None,
) -> Reference:
    """Load the features and compute the metrics of real images: as many training images as samples, n.

    Takes at most n test images, all of them if there are fewer. Raises UserError where there are no features.
    """
    clock, reference = clock or Clock(), Reference(data, parts, n, device, say)
    with clock("real"):
        _ = reference.split, reference.fingerprints
    if known := [OF_REAL[name] for name in parts if name in OF_REAL]:
        with clock("loading"):
            try:
                _ = reference.embedder
            except UserError as error:
                others = ",".join(name for name in (*METRICS, *OF_MODEL) if name not in OF_REAL)
                raise UserError(f"{error} (measure=[{others}] needs no features)") from None
        with clock("real"):
            for of_real in known:
                found = of_real(reference)
                reference.real |= {f"real_{name}": value for name, value in found.values.items()}
                reference.notes += [f"real images: {note}" for note in found.notes]
    reference.seconds |= {part: clock.seconds[part] for part in ("loading", "real") if part in clock.seconds}
    return reference


class Gallery(NamedTuple):
    """What is shown of the images themselves."""

    samples: Tensor  # uint8 (k, C, S, S)
    labels: Tensor | None  # (k,)
    pairs: Tensor  # uint8 (p, 2, C, S, S): a sample and the training image nearest to it, closest first


def ask_model(
    model: Model | None,
    data: Dataset,
    parts: Sequence[str],
    *,
    n: int,
    seed: int,
    batch_size: int = 256,
    world: World = ALONE,
    clock: Clock | None = None,
) -> list[Found]:
    """Compute those of `parts` that need the model itself, on all processes together."""
    clock, found = clock or Clock(), list[Found]()
    for name in parts:
        if name in OF_MODEL:
            with clock(name):
                found.append(OF_MODEL[name](model, data, n=n, seed=seed, batch_size=batch_size, world=world))
    return found


def measure(
    reference: Reference,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    subject: str,
    seed: int = 0,
    of_model: Sequence[Found] | None = None,
    about: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    clock: Clock | None = None,
) -> tuple[Evaluation, Gallery]:
    """Compute all metrics of uint8 images (n, C, S, S), which `labels` (n,) say what class each was meant to show.

    `of_model` is what `ask_model` found (None: there is no model); `about` (where the images are from) goes into the
    evaluation as it is. The seed is the classifier's. Raises ValueError for images that do not fit the data.
    """
    data, parts, clock, about = reference.data, reference.parts, clock or Clock(), about or {}
    if images.dtype != torch.uint8 or images.shape[1:] != data.test.images.shape[1:] or not len(images):
        raise ValueError(
            f"images: {images.dtype} {tuple(images.shape)} do not fit those of {data.facts.name}"
        )
    with clock("copies"):
        said = [*notes, *copies(images, reference)]
    if of_model is None:
        of_model = ask_model(None, data, parts, n=len(images), seed=seed)
    samples = Samples(images, labels, reference, seed, about.get("guidance_scale", 1))
    if any(name in OF_REAL for name in parts):
        with clock("features"):
            _ = samples.embedded
    found = list(of_model)
    for name in parts:
        if name in METRICS:
            with clock("distances" if name in OF_REAL else name):
                result = METRICS[name](samples, reference)
            found.append(result if isinstance(result, Found) else Found({name: Metric(float(result))}))
    values, details = dict[str, Metric](), dict[str, Any]()
    for each in found:
        values |= each.values
        details |= each.details
        said += each.notes
    taken = provenance.seconds({**reference.seconds, **clock.seconds})
    made_with = {**_protocol(reference, len(images)), **about, "seconds": taken}
    said += reference.notes
    evaluation = Evaluation(subject, {**values, **reference.real}, made_with, notes=tuple(said), **details)
    return evaluation, _gallery(samples, evaluation)


def _gallery(samples: Samples, evaluation: Evaluation) -> Gallery:
    images, train, labels = samples.images, samples.reference.data.train.images, samples.labels
    pairs = evaluation.memorization.get("pairs", [])
    both = torch.stack(
        [images[[pair["sample"] for pair in pairs]], train[[pair["train"] for pair in pairs]]], dim=1
    )
    return Gallery(images[:SHOWN], None if labels is None else labels[:SHOWN], both)


def _protocol(reference: Reference, n: int) -> dict[str, Any]:
    """Describe what the metrics are of, and what with."""
    facts = reference.data.facts
    about = {
        "n": n,
        "dataset": facts.name,
        "image_size": facts.image_size,
        "split": "test",
        "split_images": len(reference.split),
        "test_sha256": provenance.sha256(reference.data.test.images),
    }
    if reference.embeds:
        features = reference.embedder.features
        about |= {
            "feature_network": features.name,
            "feature_sha256": features.sha256,
            "feature_dim": features.dim,
        }
    return {
        **about,
        "measure": list(reference.parts),
        "machine": provenance.machine(reference.device),
        "versions": provenance.versions(),
    }
