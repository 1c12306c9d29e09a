"""Bits per dimension and the loss in eps: against chains whose bound is known, and their errors by simulation."""

import contextlib
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from ddpm.data.dataset import Split
from ddpm.data.info import DatasetInfo
from ddpm.diffusion.denoiser import Estimate
from ddpm.diffusion.process import PREDICTIONS, posterior, target
from ddpm.diffusion.schedules import NoiseSchedule, cosine, linear, sigmoid, straight
from ddpm.errors import UserError
from ddpm.evaluate.metrics.likelihood import bits_per_dimension, eps_loss
from ddpm.evaluate.metrics.monte_carlo import evaluate, mean_of, root_of_squares, stratified
from ddpm.evaluate.metrics.vlb import Terms, grey_levels, log_probability
from ddpm.runtime import distributed
from ddpm.runtime.world import ALONE, World
from ddpm.sample.model import Model

NAT = math.log(2)
SCHEDULES = {
    "linear": linear(8),
    "cosine": cosine(8),
    "sigmoid": sigmoid(8),
    "straight": straight(8),
    "zero": cosine(8, zero_terminal_snr=True),
}
FIRST_QUICK = [
    schedule if name == "cosine" else pytest.param(schedule, marks=pytest.mark.slow)
    for name, schedule in SCHEDULES.items()
]


class Knows(nn.Module):
    """A network that says its target for an x_0 that a function estimates from (x_t, alpha, sigma, y)."""

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str,
        x_0: Callable[..., Tensor],
        fraction: float | None = None,
    ) -> None:
        super().__init__()
        self.schedule, self.prediction, self.x_0, self.fraction = schedule, prediction, x_0, fraction

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        alpha, sigma = (
            table[t].to(x_t.dtype).view(-1, 1, 1, 1) for table in (self.schedule.alpha, self.schedule.sigma)
        )
        x_0 = self.x_0(x_t, alpha, sigma, y)
        output = target(self.prediction, x_0, (x_t - alpha * x_0) / sigma, alpha, sigma)
        if self.fraction is None:
            return output
        return torch.cat([output, torch.full_like(output, 2 * self.fraction - 1)], 1)


def model(
    schedule: NoiseSchedule,
    x_0: Callable[..., Tensor],
    *,
    size: int = 2,
    prediction: str = "v",
    fraction: float | None = None,
    conditional: bool = False,
    label_dropout: float = 0.0,
) -> Model:
    config: Any = SimpleNamespace(
        model=SimpleNamespace(params={"conditional": conditional}),
        objective=SimpleNamespace(prediction=prediction, label_dropout=label_dropout),
    )
    facts = DatasetInfo("toy", 1, size, 2 if conditional else 0, (), 256)
    network = Knows(schedule, prediction, x_0, fraction)
    return Model(network, schedule, config, facts, torch.device("cpu"))


def split(n: int, levels: int, seed: int, size: int = 2, part: Tensor | None = None) -> Split:
    """Images of independent pixels, their grey levels alike or with the probabilities `part`."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.ones(levels) if part is None else part
    level = torch.multinomial(part, n * size**2, replacement=True, generator=generator)
    return Split((level * 255 / (levels - 1)).round().to(torch.uint8).view(n, 1, size, size), None)


def bayes(levels: int, part: Tensor | None = None) -> Callable[..., Tensor]:
    """E[x_0 | x_t] for pixels that are any of the grey levels."""
    greys = (torch.arange(levels).double() * 255 / (levels - 1)).round() / 127.5 - 1
    prior = torch.ones(levels).double() if part is None else part.double()

    def x_0(x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        off = (x_t[..., None] - alpha[..., None] * greys) / sigma[..., None]
        return (torch.softmax(prior.log() - 0.5 * off.square(), -1) * greys).sum(-1).to(x_t.dtype)

    return x_0


def zero(x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
    return torch.zeros_like(x_t)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("std", [0.004, 0.3, 1e3])
def test_discretized_gaussian_is_that_of_scipy_and_sums_to_1(levels: int, std: float) -> None:
    mean = torch.tensor([-1.3, -1.0, -0.2, 0.004, 1.0], dtype=torch.float64)[:, None]
    grey = torch.linspace(-1, 1, levels, dtype=torch.float64).expand(len(mean), levels)
    p = log_probability(grey, mean.expand_as(grey), std, levels).exp()
    assert torch.allclose(p.sum(1), torch.ones(len(mean)).double(), rtol=0, atol=1e-12)
    edges = np.concatenate([[-np.inf], np.linspace(-1, 1, 2 * levels - 1)[1::2], [np.inf]])
    expected = np.diff(stats.norm.cdf(edges[None], mean.numpy(), std), axis=1)
    assert np.allclose(p.numpy(), expected, rtol=0, atol=1e-12)


def test_far_from_the_mean_the_code_is_long_but_finite() -> None:
    x, mean = torch.tensor([1.0, -1.0]).double(), torch.tensor([-1.0, 1.0]).double()
    log_p = log_probability(x, mean, 0.001, 256)
    z = (2 - 1 / 255) / 0.001  # log of the tail's area: Abramowitz & Stegun 26.2.12
    assert torch.allclose(log_p, torch.tensor(-0.5 * z**2 - math.log(z * math.sqrt(2 * math.pi))).double())


def test_greys_between_the_levels_are_refused() -> None:
    for levels in (2, 16, 17, 256):
        images = (torch.arange(levels) * 255 / (levels - 1)).round().to(torch.uint8)
        assert grey_levels(images, levels).tolist() == list(range(levels))
    with pytest.raises(ValueError, match="levels = 17"):
        grey_levels(torch.tensor([0, 9], dtype=torch.uint8), 17)


@pytest.mark.parametrize(
    ("levels", "std"), [(2, 5.0), (3, 0.5 / stats.norm.ppf(2 / 3)), (4, 2 / 3 / stats.norm.ppf(3 / 4))]
)
def test_a_uniform_model_needs_log2_levels(levels: int, std: float) -> None:
    """With these widths N(0, std^2) cuts into equally probable levels, and the only step has forgotten the image."""
    schedule = NoiseSchedule(torch.tensor([1e-9]).double(), torch.tensor([std]).double())
    bits = bits_per_dimension(model(schedule, zero), split(50, levels, 0), levels, n=50, seed=0)
    assert bits.value == pytest.approx(math.log2(levels), abs=1e-9) and bits.error < 1e-9
    assert (bits.n, bits.evaluations, bits.labelled) == (50, 50, False)


@pytest.mark.parametrize("schedule", FIRST_QUICK, ids=SCHEDULES)
def test_a_model_that_knows_nothing_pays_for_all_that_noising_hides(schedule: NoiseSchedule) -> None:
    """With x_0 = 0 said at every t, terms and prior add up to |x_0|^2 snr_0 / 2: each pays a difference."""
    data = split(300, 17, 1)
    bits = bits_per_dimension(model(schedule, zero), data, 17, n=300, seed=2, draws=1200)
    x = data.images.double() / 127.5 - 1
    snr_0 = (schedule.alpha[0] / schedule.sigma[0]) ** 2
    exact = (0.5 * snr_0 * x.square().mean()).item() / NAT
    found = bits.prior + bits.diffusion
    assert found == pytest.approx(exact, rel=0.01)  # far within the error, which is that of other images too
    std = posterior(schedule.at(1), schedule.at(0)).variance ** 0.5
    decoder = -log_probability(x, torch.zeros_like(x), std, 17).mean().item() / NAT
    assert bits.decoder == pytest.approx(decoder, rel=1e-6)
    assert bits.value == pytest.approx(bits.prior + bits.decoder + bits.diffusion)
    # the ends and the draws of an image err together: the error is that of whole images
    nats = 0.5 * snr_0 * x.square() - log_probability(x, torch.zeros_like(x), std, 17)
    whole = nats.mean(dim=(1, 2, 3)).std().item() / NAT / math.sqrt(300)
    assert bits.error == pytest.approx(whole, rel=0.1)


def joint_bound(schedule: NoiseSchedule, m: float, s: float, fraction: float) -> float:
    """E of the bound without the decoder, for x_0 ~ N(m, s^2) and its ideal denoiser, from whole Gaussians.

    E_q[log q(x_1 … x_T | x_0) - log p(x_1 … x_T)]: of both chains the covariance of all levels at once.
    """
    alpha, sigma, T = schedule.alpha, schedule.sigma, schedule.num_timesteps
    noise = torch.zeros(T, T).double()
    for i in range(T):
        for j in range(i, T):
            noise[i, j] = noise[j, i] = (alpha[j] / alpha[i] if j > i else 1) * sigma[i] ** 2
    q_mean, q_cov = m * alpha, s**2 * alpha[:, None] * alpha + noise
    # the reverse chain is x_{t-1} = a x_t + b + noise: a row for each level, from what the levels above are made of
    rows, p_mean = torch.zeros(T, T).double(), torch.zeros(T).double()
    rows[T - 1, T - 1] = sigma[T - 1]
    for t in range(T - 1, 0, -1):
        step = posterior(schedule.at(t), schedule.at(t - 1))
        gain = alpha[t] * s**2 / (alpha[t] ** 2 * s**2 + sigma[t] ** 2)
        a = step.x_t_factor + step.x_0_factor * gain
        p_mean[t - 1] = a * p_mean[t] + step.x_0_factor * (m - gain * alpha[t] * m)
        rows[t - 1] = a * rows[t]
        variance = step.variance ** (1 - fraction) * step.transition_variance**fraction
        rows[t - 1, t - 1] = variance**0.5
    precision = torch.linalg.inv(rows @ rows.T)
    off = q_mean - p_mean
    both = torch.trace(precision @ q_cov) + off @ precision @ off
    return (0.5 * (both - T + 2 * torch.linalg.slogdet(rows)[1] - torch.linalg.slogdet(noise)[1])).item()


@pytest.mark.parametrize("fraction", [None, 0.3])
@pytest.mark.parametrize("schedule", FIRST_QUICK, ids=SCHEDULES)
def test_gaussian_data_have_the_bound_of_the_chains_own_recursion(
    schedule: NoiseSchedule, fraction: float | None
) -> None:
    """Exactly, with the few nodes of Gauss-Hermite that a quadratic needs in place of random numbers."""
    m, s = 0.1, 0.15
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    node, weight = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    x_0 = (m + s * node).repeat_interleave(3).view(-1, 1, 1, 1)
    eps, both = node.repeat(3).view(-1, 1, 1, 1), (weight[:, None] * weight).flatten()
    terms = Terms(schedule, 256)
    total = both @ terms.prior(x_0)
    for t in range(1, schedule.num_timesteps):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        gain = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        guess = m + gain * (alpha * x_0 + sigma * eps - alpha * m)
        part = None if fraction is None else torch.full_like(guess, fraction)
        nats = terms.middle(x_0, torch.full((9,), t), eps, Estimate(guess, eps, part))
        total += both @ nats
    assert total.item() == pytest.approx(joint_bound(schedule, m, s, fraction or 0.0), rel=1e-9)


@pytest.mark.parametrize(
    ("prediction", "fraction"),
    [*(pytest.param(name, None, marks=pytest.mark.slow) for name in PREDICTIONS), ("v", 0.3)],
)
def test_of_gaussian_images_with_all_that_is_drawn(prediction: str, fraction: float | None) -> None:
    """16 pixels N(0, 0.25^2) in 256 greys: the recursion, and as the decoder a density times the grey's width."""
    schedule, s = linear(100), 0.25
    normal = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * s
    data = Split(((normal + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), None)

    def ideal(x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        return alpha * s**2 / (alpha**2 * s**2 + sigma**2) * x_t

    found = bits_per_dimension(
        model(schedule, ideal, size=4, prediction=prediction, fraction=fraction), data, 256, n=2000, seed=1
    )
    variance = posterior(schedule.at(1), schedule.at(0)).variance
    alpha, sigma = schedule.alpha[0].item(), schedule.sigma[0].item()
    left = s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2)
    decoder = 0.5 * math.log(2 * math.pi * variance) + left / (2 * variance) - math.log(2 / 255)
    exact = (joint_bound(schedule, 0.0, s, fraction or 0.0) + decoder) / NAT
    assert abs(found.value - exact) < 4 * found.error and found.error < 0.01 * exact
    assert found.evaluations <= 6000


def test_the_ideal_model_of_discrete_pixels_comes_close_to_their_entropy() -> None:
    """A bound is not below the code length by the true probabilities, and of many small steps little above."""
    part = torch.tensor([0.6, 0.1, 0.1, 0.2])
    data = split(2000, 4, 3, part=part)
    bits = bits_per_dimension(model(linear(1000), bayes(4, part)), data, 4, n=2000, seed=0, draws=8000)
    shortest = -part[grey_levels(data.images, 4)].log2().mean().item()
    assert bits.error < 0.04 and -3 * bits.error < bits.value - shortest < 0.05 + 3 * bits.error


def exact_figures(m: Model, levels: int, part: Tensor) -> tuple[float, float]:
    """(bits per dimension, loss in eps) of independent pixels with these probabilities, by quadrature at every t."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    greys = (torch.arange(levels).double() * 255 / (levels - 1)).round() / 127.5 - 1
    x_0 = greys.repeat_interleave(150).view(-1, 1, 1, 1)
    eps = torch.tensor(nodes).repeat(levels).view(-1, 1, 1, 1)
    weight = (part.double()[:, None] * torch.tensor(weights / weights.sum())).flatten()
    terms, schedule = Terms(m.schedule, levels), m.schedule
    nats, loss = weight @ terms.prior(x_0), torch.zeros(())
    for t in range(schedule.num_timesteps):
        alpha, sigma = schedule.alpha[t].view(1, 1, 1, 1), schedule.sigma[t].view(1, 1, 1, 1)
        x_t, times = alpha * x_0 + sigma * eps, torch.full((len(x_0),), t)
        guess = m.network.x_0(x_t, alpha, sigma, None)
        estimate = Estimate(guess, (x_t - alpha * guess) / sigma)
        term = (terms.middle if t else terms.decoder)(x_0, times, eps, estimate)
        nats += weight @ term
        loss = loss + weight @ (estimate.eps - eps).square().flatten() / schedule.num_timesteps
    return nats.item() / NAT, loss.item()


@pytest.mark.slow
def test_the_errors_are_as_large_as_they_say() -> None:
    """Many small measurements, of other images each: they scatter around the exact figures by their own errors."""
    levels, part = 5, torch.tensor([0.6, 0.05, 0.1, 0.05, 0.2])
    m = model(cosine(6), bayes(levels, part))
    bits, loss = exact_figures(m, levels, part)
    off = []
    for seed in range(120):
        data = split(100, levels, 1000 + seed, part=part)
        found = bits_per_dimension(m, data, levels, n=100, seed=seed, draws=256)
        eps = eps_loss(m, data, n_draws=256, seed=seed)
        off.append([(found.value - bits) / found.error, (eps.mean - loss) / eps.error])
    z = torch.tensor(off)
    assert ((z.abs() < 1.96).double().mean(0) > 0.88).all()  # of 0.95, or one more error in 60
    assert (z.square().mean(0).sqrt() > 0.8).all() and (z.square().mean(0).sqrt() < 1.25).all()
    assert (z.mean(0).abs() < 4 / math.sqrt(120)).all(), z.mean(0)


def test_batches_and_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    m, data = model(cosine(20), bayes(17)), split(60, 17, 0)
    one = bits_per_dimension(m, data, 17, n=50, seed=3, draws=101)
    assert bits_per_dimension(m, data, 17, n=50, seed=3, draws=101, batch_size=7) == pytest.approx(one)
    assert bits_per_dimension(m, data, 17, n=50, seed=4, draws=101).value != one.value
    draws = stratified(0, "any", 10, torch.arange(60), torch.ones(20).double())
    measure = Terms(m.schedule, 17).decoder
    whole = evaluate(m, data, draws, measure, labelled=False, batch_size=256, world=ALONE)
    monkeypatch.setattr(distributed, "all_gather_columns", lambda world, part, n: part)
    monkeypatch.setattr(distributed, "raise_on_all_ranks", lambda world: contextlib.nullcontext())
    shares = [
        evaluate(m, data, draws, measure, labelled=False, batch_size=2, world=World(rank, 12))
        for rank in range(12)  # two of them have nothing to do
    ]
    assert torch.allclose(torch.cat(shares), whole)


def test_batches_are_halved_where_memory_runs_out() -> None:
    m, data = model(cosine(20), bayes(17)), split(60, 17, 0)
    draws = stratified(0, "any", 50, torch.arange(60), torch.ones(20).double())
    options: Any = {"labelled": False, "batch_size": 32, "world": ALONE}
    whole = evaluate(m, data, draws, Terms(m.schedule, 17).decoder, **options)
    network, asked = m.network, list[int]()

    def room_for(most: int) -> None:
        def forward(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            asked.append(len(x_t))
            if len(x_t) > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate much")
            out: Tensor = network(x_t, t, y)
            return out

        object.__setattr__(m, "network", forward)

    room_for(9)
    assert torch.equal(evaluate(m, data, draws, Terms(m.schedule, 17).decoder, **options), whole)
    assert asked == [32, 16, *[8] * 6, 2]
    room_for(0)
    with pytest.raises(UserError, match="out of memory on cpu, even for 1 image"):
        evaluate(m, data, draws, Terms(m.schedule, 17).decoder, **options)


def test_every_image_serves_and_the_draws_are_spread() -> None:
    probability = torch.tensor([0.0, 0.5, 0.25, 0.25], dtype=torch.float64)
    draws = stratified(5, "any", 1000, torch.arange(300) * 2, probability)
    assert set(draws.image.bincount()[::2].tolist()) == {3, 4} and draws.image.unique().tolist()[-1] == 598
    assert (draws.t.bincount() - 1000 * probability).abs().max() <= 1
    f = torch.tensor([9.0, 1.0, 10.0, 100.0]).double()
    assert (draws.weight * f[draws.t]).mean().item() == pytest.approx(111, rel=0.01)


def test_what_t_alone_explains_is_no_error() -> None:
    draws = stratified(0, "any", 4000, torch.arange(4000), torch.ones(1000).double())
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    mean, additions = mean_of(draws, draws.t.double() + noise, 4000)
    assert mean == pytest.approx(499.5, abs=0.1)
    within = math.sqrt((1 + 8**2 / 12) / 4000)  # the noise, and the width of 32 draws: 8 of t
    assert root_of_squares(additions) == pytest.approx(within, rel=0.05)


def test_the_curve_and_its_mean_are_of_the_same_draws() -> None:
    m, data = model(linear(200), bayes(17)), split(500, 17, 0)
    test = eps_loss(m, data, n_draws=4000, seed=0)
    assert len(test.curve.t) == len(test.curve.error) == 20 and test.draws == 4000 and test.n == 500
    assert test.mean == pytest.approx(sum(test.curve.eps_mse) / 20, rel=1e-9)
    assert test.curve.t[0] == 4.5 and test.curve.t[-1] == 194.5
    assert sorted(test.curve.lambda_, reverse=True) == list(test.curve.lambda_)
    other = eps_loss(m, split(500, 17, 1), n_draws=4000, seed=1)
    assert abs(test.mean - other.mean) < 4 * math.hypot(test.error, other.error)


def test_the_curve_has_no_lambda_where_nothing_is_left_of_the_image() -> None:
    dark = cosine(10, zero_terminal_snr=True)
    curve = eps_loss(model(dark, zero), split(320, 17, 0), n_draws=320, seed=0).curve
    assert curve.lambda_[-1] == -math.inf and math.isfinite(curve.eps_mse[-1])
    plain = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert plain["lambda_"][-1] is None and plain["lambda_"][:-1] == list(curve.lambda_[:-1])
    assert plain["eps_mse"] == list(curve.eps_mse) and None not in plain["error"]


def test_conditional_models_get_the_labels() -> None:
    """A network that knows the image from its label, and takes the wrong one without."""

    def by_label(x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        known = torch.zeros(len(x_t)) if y is None else y
        return (2.0 * known - 1).view(-1, 1, 1, 1).expand_as(x_t)

    labels = torch.arange(40) % 2
    images = (labels * 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    data = Split(images, labels)
    m = model(cosine(8), by_label, conditional=True, label_dropout=0.1)
    bits = bits_per_dimension(m, data, 256, n=40, seed=0, draws=64)
    assert bits.labelled and bits.diffusion == pytest.approx(0, abs=1e-6)
    with_labels = eps_loss(m, data, n_draws=64, seed=0)
    without = eps_loss(m, data, n_draws=64, seed=0, labelled=False)
    assert with_labels.labelled and with_labels.mean == pytest.approx(0, abs=1e-6)
    assert not without.labelled and without.mean > 0.1
    with pytest.raises(UserError, match="label_dropout=0"):
        eps_loss(model(cosine(8), by_label, conditional=True), data, seed=0, labelled=False)
    with pytest.raises(UserError, match="conditional=true"):
        eps_loss(model(cosine(8), by_label), data, seed=0, labelled=True)


def test_what_cannot_be_measured_is_named() -> None:
    def nan(x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        return torch.where(alpha < 0.5, math.nan, x_t)

    data = split(10, 17, 0)
    with pytest.raises(UserError, match=r"at t = \d+ are not finite"):
        bits_per_dimension(model(cosine(8), nan), data, 17, n=10, seed=0)
    with pytest.raises(ValueError, match="n = 1"):
        bits_per_dimension(model(cosine(8), zero), data, 17, n=1, seed=0)
    with pytest.raises(ValueError, match="the model makes"):
        eps_loss(model(cosine(8), zero, size=3), data, seed=0)
