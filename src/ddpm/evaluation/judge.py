"""The protocol: from a model to images, from images to an Evaluation. What is compared with what is decided here.

Everything is held against the test images, which no training saw. The same is done for real training images, as many
as there are samples: what they reach is what a perfect model of the training data would.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm import __version__, distributed, sampling
from ddpm.config import Choice
from ddpm.datasets.types import Dataset, Split
from ddpm.evaluation import figures as of
from ddpm.evaluation.features import Features, Projection, features_for, pixel_features
from ddpm.evaluation.likelihood import bits_per_dimension, eps_loss
from ddpm.evaluation.record import Evaluation, Figure
from ddpm.images import to_uint8
from ddpm.samplers import Step
from ddpm.sampling import Guidance, Model
from ddpm.world import ALONE, World

PARTS = ("distance", "neighbours", "memorization", "likelihood", "cas")
SHOWN = 64  # samples on the page


class Clock:
    """Seconds by part; `begin` hears of each part as it starts."""

    def __init__(self, begin: Callable[[str], object] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self.begin = begin

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.begin(part)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


class Drawn(NamedTuple):
    """On rank 0 all images, elsewhere its own share."""

    images: Tensor  # uint8 (n, C, S, S)
    labels: Tensor | None  # int64 (n,), what each was asked to be
    evaluations: float  # of the network, for each image
    num_steps: int


def draw(
    model: Model,
    sampler: Choice,
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
    with distributed.agreed(world):
        y = sampling.labels(model, None, index, guidance)
        num_steps = len(sampling.levels(model, sampler)) - 1
        steps = sampling.generation(model, sampler, index, seed)
        own = index[world.share(n)]
        x, evaluations = sampling.draw_all(model, sampler, guidance, y, own, steps, batch_size, watch, halved)
        images = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous()
    return Drawn(distributed.collected(world, images, world.lengths(n)), y, evaluations, num_steps)


@dataclass(frozen=True, eq=False)
class Bench:
    """All that every set of n images of one dataset is held against, seen once. `real`: the figures of real_…"""

    data: Dataset
    parts: tuple[str, ...]
    n: int
    device: torch.device
    features: Features
    pixels: Projection
    test: of.Seen
    test_split: Split  # those images
    real: Mapping[str, Figure]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]  # that this took

    def see(self, images: Tensor) -> of.Seen:
        """uint8 (N, C, S, S) as features, pixels and classes."""
        seen, projected = self.features.embed(images), self.pixels(images)
        return of.Seen(seen.features, projected, seen.probabilities)


def prepare(
    data: Dataset,
    *,
    n: int,
    parts: tuple[str, ...] = PARTS,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    clock: Clock | None = None,
) -> Bench:
    """Loads the features, sees the test images and as many training images as there will be samples.

    At most n test images, all of them if there are fewer. Raises UserError where there are no features.
    """
    clock = clock or Clock()
    with clock("loading"):
        features, pixels = features_for(data, device, say), pixel_features(data.train.images)
    test_split, train_split = of.some(data.test, "test", n), of.some(data.train, "train", n)
    nothing = of.Seen(torch.empty(0, 0), torch.empty(0, 0), None)
    bench = Bench(data, parts, n, device, features, pixels, nothing, test_split, {}, (), {})
    with clock("real"):
        test, train = bench.see(test_split.images), bench.see(train_split.images)
        bench = replace(bench, test=test)
        real, notes = _compare(bench, train)
        if "distance" in parts:
            real |= of.classes(test, test_split.labels, data.facts.class_names)
    figures = {f"real_{name}": figure for name, figure in real.items()}
    seen = {part: clock.seconds[part] for part in ("loading", "real")}
    return replace(
        bench, real=figures, notes=tuple(f"real training images: {note}" for note in notes), seconds=seen
    )


def _compare(bench: Bench, seen: of.Seen) -> tuple[dict[str, Figure], list[str]]:
    """The figures of what is seen against the test images, and why some are absent."""
    found, notes = dict[str, Figure](), list[str]()
    if "distance" in bench.parts:
        found |= of.distances(seen, bench.test, bench.data.facts.num_classes, notes)
    if "neighbours" in bench.parts:
        found |= of.neighbours(seen, bench.test, notes)
    return found, notes


class Gallery(NamedTuple):
    """What is shown of the images themselves."""

    samples: Tensor  # uint8 (k, C, S, S)
    labels: Tensor | None  # (k,)
    pairs: Tensor  # uint8 (p, 2, C, S, S): a sample and the training image nearest to it
    distances: tuple[float, ...]  # (p,)


class Odds(NamedTuple):
    """What the model itself says of real images."""

    figures: Mapping[str, Figure]
    curves: Mapping[str, Mapping[str, Any]]


def likelihood(
    model: Model, data: Dataset, *, n: int, seed: int, batch_size: int = 256, world: World = ALONE
) -> Odds:
    """Bits per dimension of n test images, and the error in eps on n test and n training images (or all, if fewer)."""
    figures, curves = dict[str, Figure](), dict[str, Mapping[str, Any]]()
    ask = partial(eps_loss, model, n_draws=n, seed=seed, batch_size=batch_size, world=world)
    bits = bits_per_dimension(
        model,
        data.test,
        data.facts.levels,
        n=min(n, len(data.test)),
        seed=seed,
        batch_size=batch_size,
        world=world,
    )
    figures["bits_per_dim"] = Figure(bits.value, error=bits.error, n=bits.n)
    for name, split in (("test", data.test), ("train", data.train)):
        loss = ask(split, n=min(n, len(split)))
        figures["eps_loss" if name == "test" else "eps_loss_train"] = Figure(
            loss.mean, error=loss.error, n=loss.draws
        )
        curves[name] = {key: list(values) for key, values in loss.curve._asdict().items()}
    return Odds(figures, curves)


def measure(
    bench: Bench,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    subject: str,
    seed: int = 0,
    odds: Odds | None = None,
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
    said = [*notes, *of.copies(images, bench.data)]
    with clock("features"):
        seen = bench.see(images)
    with clock("distances"):
        found, more = _compare(bench, seen)
        said += [*more, *bench.notes]
    histogram = dict[str, Any]()
    if "distance" in bench.parts and seen.classes is not None:
        found |= of.classes(seen, labels, facts.class_names)
        names = list(facts.class_names) or [str(k) for k in range(facts.num_classes)]
        shares = {"samples": of.histogram(seen).tolist(), "real": of.histogram(bench.test).tolist()}
        histogram = {"classes": names, **shares}
    remembered, pairs, distances = (
        dict[str, Any](),
        torch.empty(0, 2, *images.shape[1:]).byte(),
        tuple[float, ...](),
    )
    if "memorization" in bench.parts:
        with clock("memorization"):
            ...
    if "cas" in bench.parts and labels is not None:
        with clock("cas"):
            found |= of.classification(images, labels, bench.data, seed, bench.device, said)
    elif "cas" in bench.parts:
        said.append("no cas: it needs images with labels, of a conditional model or in an .npz file")
    if "likelihood" in bench.parts and odds is None:
        said.append("no bits_per_dim, no eps_loss: they are asked of a model, not of images")
    protocol = {
        **protocol_of(bench, len(images)),
        **(about or {}),
        "seconds": _seconds({**bench.seconds, **clock.seconds}),
    }
    evaluation = Evaluation(
        subject,
        {**found, **(odds.figures if odds else {}), **bench.real},
        protocol,
        histogram,
        odds.curves if odds else {},
        remembered,
        tuple(said),
    )
    return evaluation, Gallery(images[:SHOWN], None if labels is None else labels[:SHOWN], pairs, distances)


def protocol_of(bench: Bench, n: int) -> dict[str, Any]:
    """What the figures were made with, and of what."""
    facts, gpu = bench.data.facts, bench.device.type == "cuda"
    return {
        "n": n,
        "dataset": facts.name,
        "image_size": facts.image_size,
        "split": "test",
        "split_images": len(bench.test_split),
        "feature_network": bench.features.name,
        "feature_sha256": bench.features.sha256,
        "feature_dim": bench.features.dim,
        "measure": list(bench.parts),
        "machine": torch.cuda.get_device_name(bench.device) if gpu else _processor(),
        "versions": {"ddpm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _processor() -> str:
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """By part; `measuring` is all but making the images, asking the model and training classifiers."""
    apart = ("sampling", "likelihood", "cas")
    measuring = sum(value for part, value in seconds.items() if part not in apart)
    return {part: round(value, 3) for part, value in {**seconds, "measuring": measuring}.items()}
