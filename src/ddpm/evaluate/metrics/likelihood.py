"""Likelihood: bits per dimension, and the error in eps over the noise levels."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm.data.dataset import Split
from ddpm.diffusion.denoiser import Estimate
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.errors import UserError
from ddpm.evaluate.metrics.monte_carlo import GROUP, Draws, evaluate, mean_of, root_of_squares, stratified
from ddpm.evaluate.metrics.vlb import Terms, grey_levels
from ddpm.evaluate.record import Metric
from ddpm.evaluate.reference import Found, Reference, Samples
from ddpm.io.images import normalise
from ddpm.runtime.randomness import permutation
from ddpm.runtime.world import ALONE, World
from ddpm.sample.model import Model

DRAWS = 3584  # network evaluations for all terms between the ends
BINS = 20  # of t
EPS_DRAWS = 10_000
ENOUGH = 2500  # images for an error of about half a per cent in bits per dimension


def likelihood(samples: Samples, reference: Reference) -> Found:
    """Compute the model's bits per dimension of test images, and its error in eps on test and training images.

    The error on test images is that of n of them, as many as there are samples, or of all. The others make do with
    `ENOUGH` of the n: the network's evaluations are most of what an evaluation costs. What cannot be had is left out,
    with a note that says why.
    """
    model, data, n = samples.model, reference.data, reference.n
    if model is None:
        return Found({}, ["no bits_per_dim, no eps_loss: they are asked of a model, not of images"])
    if min(n, len(data.test), len(data.train)) < 2:
        return Found({}, ["no bits_per_dim, no eps_loss: they need 2 images"])
    common: Any = {"seed": samples.seed, "batch_size": samples.batch_size, "world": samples.world}
    values, curves, notes = dict[str, Metric](), dict[str, Mapping[str, Any]](), list[str]()
    try:
        bits = bits_per_dimension(model, data.test, data.facts.levels, n=min(n, ENOUGH), **common)
        values["bits_per_dim"] = Metric(bits.value, error=bits.error, n=bits.n)
    except (UserError, ValueError) as error:
        notes.append(f"no bits_per_dim: {error}")
    for name, split, key, k in (
        ("test", data.test, "eps_loss", n),
        ("train", data.train, "eps_loss_train", min(n, ENOUGH)),
    ):
        try:
            loss = eps_loss(model, split, n=min(k, len(split)), n_draws=k, **common)
        except UserError as error:
            notes.append(f"no {key}: {error}")
            continue
        values[key] = Metric(loss.mean, error=loss.error, n=loss.draws)
        curves[name] = loss.curve.to_dict()
    return Found(values, notes, {"curves": curves})


class Bits(NamedTuple):
    """A bound in bits per dimension, value = prior + decoder + diffusion, with its standard error."""

    value: float
    error: float  # over images and draws
    prior: float
    decoder: float
    diffusion: float
    n: int  # images
    labelled: bool  # given each image's label: a bound of p(x | y)
    evaluations: int  # of the network, one image each


def bits_per_dimension(
    model: Model,
    data: Split,
    levels: int,
    *,
    n: int,
    seed: int,
    draws: int = DRAWS,
    batch_size: int = 256,
    world: World = ALONE,
) -> Bits:
    """Compute the variational bound of the model's chain over all T steps on n of the images (all, if there are fewer).

    Ho et al. 2020, eq. 5: the KL divergence of q(x_T | x_0) from the noise that sampling starts with, in closed form;
    that of each posterior q(x_{t-1} | x_t, x_0) from the model's step, by stratified sampling of t; and the code length
    of the grey `levels` at t = 0, for every image.
    The estimate of x_0 is clipped to [-1, 1]: the bound of the chain that clips. The variance of a step is the
    posterior's, or the learned one. Conditional models get the labels.
    Raises ValueError for n < 2 and images not of these levels, UserError where the network's answers are not finite.
    """
    grey_levels(data.images, levels)
    images = _chosen(model, data, n, seed)
    how: Any = {"labelled": model.conditional, "batch_size": batch_size, "world": world}
    terms = Terms(model.schedule, levels)
    ends = Draws(seed, "bits/ends", images, torch.zeros_like(images), torch.ones(len(images)).double())
    decoder = evaluate(model, data, ends, terms.decoder, **how)
    prior = terms.prior(normalise(data.images[images]))
    additions = torch.zeros(len(data)).double()
    off = prior + decoder - (prior + decoder).mean()
    additions[images] = off / math.sqrt(len(images) * (len(images) - 1))
    diffusion, evaluations = 0.0, len(images)
    if model.schedule.num_timesteps > 1:
        middle = stratified(seed, "bits/middle", draws, images, terms.proposal())
        values = evaluate(model, data, middle, terms.middle, **how)
        diffusion, more = mean_of(middle, values * middle.weight, len(data))
        additions += more
        evaluations += draws
    unit = 1 / (math.log(2) * math.prod(model.shape))
    error = unit * root_of_squares(additions)
    first, last, diffusion = unit * prior.mean().item(), unit * decoder.mean().item(), unit * diffusion
    total = first + last + diffusion
    return Bits(total, error, first, last, diffusion, len(images), model.conditional, evaluations)


class Curve(NamedTuple):
    """Mean squared error in eps in bins of t, each with its standard error and the middle of its t and lambda."""

    t: tuple[float, ...]
    lambda_: tuple[float, ...]
    eps_mse: tuple[float, ...]
    error: tuple[float, ...]

    def to_dict(self) -> dict[str, list[float | None]]:
        """Return plain data for JSON, which has no infinity: lambda is None where alpha = 0."""
        return {
            key: [value if math.isfinite(value) else None for value in values]
            for key, values in self._asdict().items()
        }


class EpsLoss(NamedTuple):
    """Mean squared error in eps at uniform t, with its standard error over images and draws."""

    mean: float
    error: float
    curve: Curve
    n: int  # images
    draws: int  # network evaluations
    labelled: bool  # with the images' labels


def eps_loss(
    model: Model,
    data: Split,
    *,
    n: int | None = None,
    n_draws: int = EPS_DRAWS,
    seed: int,
    labelled: bool | None = None,
    batch_size: int = 256,
    world: World = ALONE,
) -> EpsLoss:
    """Compute the loss L_simple (Ho et al. 2020, eq. 14) from whatever the network predicts.

    The mean over images and all t alike of the squared error in eps, a pixel. Each of n images (None: all) serves at
    least once. `labelled`: with the labels (None: if the model is conditional), else as without any.
    Raises ValueError for n < 2, UserError for labels that the model cannot take or do without.
    """
    labelled = model.conditional if labelled is None else labelled
    if labelled and not model.conditional:
        raise UserError("labels need a model trained with model.conditional=true; this one was not")
    if model.conditional and not labelled and model.config.objective.label_dropout == 0:
        raise UserError(
            "this model was trained with objective.label_dropout=0 and knows no images without label"
        )
    images = _chosen(model, data, len(data) if n is None else n, seed)
    alike = torch.ones(model.schedule.num_timesteps, dtype=torch.float64)
    draws = stratified(seed, "eps_loss", max(n_draws, len(images)), images, alike)
    values = evaluate(model, data, draws, _eps_errors, labelled=labelled, batch_size=batch_size, world=world)
    mean, additions = mean_of(draws, values, len(data))
    curve = _curve(model.schedule, draws, values, len(data))
    return EpsLoss(mean, root_of_squares(additions), curve, len(images), draws.n, labelled)


def _eps_errors(x_0: Tensor, t: Tensor, eps: Tensor, estimate: Estimate) -> Tensor:
    return (estimate.eps - eps).double().square().mean(dim=(1, 2, 3))


def _curve(schedule: NoiseSchedule, draws: Draws, values: Tensor, num_images: int) -> Curve:
    T = schedule.num_timesteps
    bins = max(1, min(BINS, T, draws.n // GROUP))
    bin_ = draws.t * bins // T
    points = []
    for k in range(bins):
        inside = bin_ == k
        part = draws._replace(image=draws.image[inside], t=draws.t[inside], weight=draws.weight[inside])
        mean, additions = mean_of(part, values[inside], num_images)
        middle = (-(-k * T // bins) + -(-(k + 1) * T // bins) - 1) / 2
        points.append((middle, schedule.at(middle).lambda_, mean, root_of_squares(additions)))
    return Curve(*zip(*points, strict=True))


def _chosen(model: Model, data: Split, n: int, seed: int) -> Tensor:
    """Draw n images at random, all where there are no more."""
    if tuple(data.images.shape[1:]) != model.shape:
        raise ValueError(f"images {tuple(data.images.shape[1:])}, but the model makes {model.shape}")
    if min(n, len(data)) < 2:
        raise ValueError(f"n = {n}: at least 2 images, to have an error")
    return permutation(seed, "likelihood", 0, len(data))[:n].sort().values
