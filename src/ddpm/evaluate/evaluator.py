"""The protocol: from a model to images, from images to an Evaluation. What is compared with what is decided here.

Everything is held against the test images, which no training saw. The same is done for real training images, as many
as there are samples: what they reach is what a perfect model of the training data would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ddpm.config.choices import Component
from ddpm.data.dataset import Dataset, Split
from ddpm.diffusion.samplers import Step
from ddpm.errors import UserError
from ddpm.evaluate import figures as of
from ddpm.evaluate import provenance
from ddpm.evaluate.features.extractor import Features, Projection, features_for, pixel_features
from ddpm.evaluate.metrics.likelihood import bits_per_dimension, eps_loss
from ddpm.evaluate.metrics.memorization import memorization
from ddpm.evaluate.provenance import Clock
from ddpm.evaluate.record import Evaluation, Figure
from ddpm.io.images import to_uint8
from ddpm.runtime import distributed
from ddpm.runtime.world import ALONE, World
from ddpm.sample import model as sample_model
from ddpm.sample import sampling
from ddpm.sample.model import Guidance, Model

PARTS = ("distance", "neighbours", "memorization", "likelihood", "cas")
SHOWN = 64  # samples on the page
ENOUGH = 2500  # images for an error of about half a per cent in bits per dimension


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


class Embedder(NamedTuple):
    """What images are seen with."""

    features: Features
    pixels: Projection

    def see(self, images: Tensor) -> of.Seen:
        """uint8 (N, C, S, S) as features, pixels and classes."""
        seen = self.features.embed(images)
        return of.Seen(seen.features, self.pixels(images), seen.probabilities)


@dataclass(frozen=True, eq=False)
class Reference:
    """All that every set of images of one dataset is held against, seen once. `real`: the figures of real_…

    `eyes` and `test` (those images, seen) are None where no part needs features.
    """

    data: Dataset
    parts: tuple[str, ...]
    device: torch.device
    split: Split  # the test images
    known: of.Known  # the images of data.test and data.train, to the bit
    eyes: Embedder | None = None
    test: of.Seen | None = None
    real: Mapping[str, Figure] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)  # that this took


def prepare(
    data: Dataset,
    *,
    n: int,
    parts: tuple[str, ...] = PARTS,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    clock: Clock | None = None,
) -> Reference:
    """Loads the features, sees the test images and as many training images as there will be samples, n.

    At most n test images, all of them if there are fewer. Raises UserError where there are no features.
    """
    clock = clock or Clock()
    with clock("real"):
        bench = Reference(data, parts, device, of.some(data.test, "test", n), of.known(data))
    if not {"distance", "neighbours"} & set(parts):
        return replace(bench, seconds={"real": clock.seconds["real"]})
    with clock("loading"):
        try:
            eyes = Embedder(features_for(data, device, say), pixel_features(data.train.images))
        except UserError as error:
            raise UserError(f"{error} (measure=[memorization,likelihood,cas] needs no features)") from None
    with clock("real"):
        test = eyes.see(bench.split.images)
        bench = replace(bench, eyes=eyes, test=test)
        real, notes = _compare(bench, eyes.see(of.some(data.train, "train", n).images), test)
        if "distance" in parts:
            real |= of.classes(test, bench.split.labels, data.facts.class_names)
    return replace(
        bench,
        real={f"real_{name}": figure for name, figure in real.items()},
        notes=tuple(f"real images: {note}" for note in notes),
        seconds={part: clock.seconds[part] for part in ("loading", "real")},
    )


def _compare(bench: Reference, seen: of.Seen, test: of.Seen) -> tuple[dict[str, Figure], list[str]]:
    """The figures of what is seen against the test images, and why some are absent."""
    found, notes = dict[str, Figure](), list[str]()
    if "distance" in bench.parts:
        found |= of.distances(seen, test, bench.data.facts.num_classes, notes)
    if "neighbours" in bench.parts:
        found |= of.neighbours(seen, test, notes)
    return found, notes


class Gallery(NamedTuple):
    """What is shown of the images themselves."""

    samples: Tensor  # uint8 (k, C, S, S)
    labels: Tensor | None  # (k,)
    pairs: Tensor  # uint8 (p, 2, C, S, S): a sample and the training image nearest to it, closest first


class Likelihood(NamedTuple):
    """What the model itself says of real images."""

    figures: Mapping[str, Figure]
    curves: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()


def likelihood(
    model: Model, data: Dataset, *, n: int, seed: int, batch_size: int = 256, world: World = ALONE
) -> Likelihood:
    """Bits per dimension of test images, and the error in eps on n test images (or all) and on training images.

    Bits and training images make do with `ENOUGH` of the n: the network's evaluations are most of what judging costs.
    What cannot be had is left out, with a note that says why: the images that were drawn are worth keeping.
    """
    if min(n, len(data.test), len(data.train)) < 2:
        return Likelihood({}, {}, ("no bits_per_dim, no eps_loss: they need 2 images",))
    common = _Common(seed=seed, batch_size=batch_size, world=world)
    figures, curves, notes = dict[str, Figure](), dict[str, Mapping[str, Any]](), list[str]()
    try:
        bits = bits_per_dimension(model, data.test, data.facts.levels, n=min(n, ENOUGH), **common)
        figures["bits_per_dim"] = Figure(bits.value, error=bits.error, n=bits.n)
    except (UserError, ValueError) as error:
        notes.append(f"no bits_per_dim: {error}")
    for name, figure, k in (("test", "eps_loss", n), ("train", "eps_loss_train", min(n, ENOUGH))):
        split: Split = getattr(data, name)
        try:
            loss = eps_loss(model, split, n=min(k, len(split)), n_draws=k, **common)
        except UserError as error:
            notes.append(f"no {figure}: {error}")
            continue
        figures[figure] = Figure(loss.mean, error=loss.error, n=loss.draws)
        curves[name] = loss.curve.to_dict()
    return Likelihood(figures, curves, tuple(notes))


class _Common(TypedDict):
    seed: int
    batch_size: int
    world: World


def measure(
    bench: Reference,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    subject: str,
    seed: int = 0,
    odds: Likelihood | None = None,
    about: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    clock: Clock | None = None,
) -> tuple[Evaluation, Gallery]:
    """All figures of uint8 images (n, C, S, S), which `labels` (n,) say what class each was meant to show.

    `odds` and `about` (where the images are from) go into the evaluation as they are. The seed is the classifier's.
    Raises ValueError for images that do not fit the data.
    """
    facts, clock = bench.data.facts, clock or Clock()
    if images.dtype != torch.uint8 or images.shape[1:] != bench.data.test.images.shape[1:] or not len(images):
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)} do not fit those of {facts.name}")
    with clock("copies"):
        copies = of.copies(images, bench.known)
    said = [*notes, *copies, *(odds.notes if odds else ())]
    found, histogram = dict[str, Figure](), dict[str, Any]()
    if bench.eyes is not None and bench.test is not None:
        with clock("features"):
            seen = bench.eyes.see(images)
        with clock("distances"):
            found, more = _compare(bench, seen, bench.test)
        said += [*more, *bench.notes]
        if "distance" in bench.parts and seen.probabilities is None and facts.num_classes:
            said.append(f"no figures of classes: the features {bench.eyes.features.name} know none")
        if "distance" in bench.parts and seen.probabilities is not None:
            found |= of.classes(seen, labels, facts.class_names)
            histogram = {
                "classes": list(facts.class_names) or [str(k) for k in range(facts.num_classes)],
                "samples": of.histogram(seen).tolist(),
                "real": of.histogram(bench.test).tolist(),
            }
    remembered, pairs = dict[str, Any](), torch.empty(0, 2, *images.shape[1:], dtype=torch.uint8)
    if "memorization" in bench.parts:
        with clock("memorization"):
            copied = memorization(images, bench.data.train.images, bench.split.images)
        found |= of.copied(copied)
        said += copied.notes
        remembered = {
            **asdict(copied),
            "samples": copied.samples._asdict(),
            "test": copied.test._asdict(),
            "pairs": [pair._asdict() for pair in copied.pairs],
        }
        both = [(images[pair.sample], bench.data.train.images[pair.train]) for pair in copied.pairs]
        pairs = torch.stack([torch.stack(each) for each in both])
    guidance = (about or {}).get("guidance_scale", 1)
    if "cas" in bench.parts and guidance != 1:
        said.append(f"no cas: it is asked at guidance_scale=1, these are drawn at {guidance:g}")
    elif "cas" in bench.parts and labels is not None:
        with clock("cas"):
            found |= of.classification(images, labels, bench.data, seed, bench.device, said)
    elif "cas" in bench.parts:
        said.append("no cas: it needs images with labels, of a conditional model or in an .npz file")
    if "likelihood" in bench.parts and odds is None:
        said.append("no bits_per_dim, no eps_loss: they are asked of a model, not of images")
    taken = provenance.seconds({**bench.seconds, **clock.seconds})
    made_with = {**_protocol(bench, len(images)), **(about or {}), "seconds": taken}
    evaluation = Evaluation(
        subject,
        {**found, **(odds.figures if odds else {}), **bench.real},
        made_with,
        histogram,
        odds.curves if odds else {},
        remembered,
        tuple(said),
    )
    return evaluation, Gallery(images[:SHOWN], None if labels is None else labels[:SHOWN], pairs)


def _protocol(bench: Reference, n: int) -> dict[str, Any]:
    """What the figures are of, and what with."""
    facts, eyes = bench.data.facts, bench.eyes
    features = (
        {}
        if eyes is None
        else {
            "feature_network": eyes.features.name,
            "feature_sha256": eyes.features.sha256,
            "feature_dim": eyes.features.dim,
        }
    )
    return {
        "n": n,
        "dataset": facts.name,
        "image_size": facts.image_size,
        "split": "test",
        "split_images": len(bench.split),
        "test_sha256": provenance.sha256(bench.data.test.images),
        **features,
        "measure": list(bench.parts),
        "machine": provenance.machine(bench.device),
        "versions": provenance.versions(),
    }
