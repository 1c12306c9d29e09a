"""The algebra: noising, posterior, predictions, weights, the loss with a learned variance, the denoiser."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.objective import WEIGHTS, losses, make_objective, sigmoid, vlb_terms
from ddpm.diffusion.process import PREDICTIONS, add_noise, invert, posterior, target
from ddpm.diffusion.schedules import SCHEDULES, Level, NoiseSchedule, cosine, linear, straight

SIMPLE = [linear(100), cosine(100), SCHEDULES["sigmoid"](100), straight(100)]
ZERO = linear(100, zero_terminal_snr=True)


class Says(nn.Module):
    """A network that answers what a function says."""

    def __init__(self, answer: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return self.answer(x, t, y)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noised_images_have_the_moments_of_q() -> None:
    eps, n = randn(200_000), 200_000
    for schedule in SIMPLE:
        for t in (0, 50, 99):
            alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
            x_t = add_noise(torch.tensor(0.7), eps, alpha, sigma)
            assert abs(x_t.mean() - 0.7 * alpha) < 5 * sigma / math.sqrt(n)
            assert abs(x_t.var() / sigma**2 - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("schedule", [*SIMPLE, ZERO])
def test_posterior_is_bayes_rule(schedule: NoiseSchedule) -> None:
    """q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0): precisions add, means are weighted by them."""
    for t, s in ((1, 0), (50, 49), (99, 98), (99, 0), (70.3, 12.8)):
        a, b = schedule.at(t), schedule.at(s)
        q = posterior(a, b)
        step = a.alpha / b.alpha
        step_variance = a.sigma**2 - step**2 * b.sigma**2
        precision = step**2 / step_variance + 1 / b.sigma**2
        assert q.transition_variance == pytest.approx(step_variance, rel=1e-10)
        assert q.variance == pytest.approx(1 / precision, rel=1e-10)
        assert q.x_t_factor == pytest.approx(step / step_variance / precision, rel=1e-10)
        assert q.x_0_factor == pytest.approx(b.alpha / b.sigma**2 / precision, rel=1e-10)
    onto_clean = posterior(schedule.at(3), schedule.at(-1))
    assert (onto_clean.x_t_factor, onto_clean.variance) == (0, 0)
    assert onto_clean.x_0_factor == pytest.approx(1, rel=1e-15)


def test_posterior_of_neighbours_keeps_its_digits() -> None:
    schedule = linear(100_000)
    q = posterior(schedule.at(1), schedule.at(0))
    beta = 1e-6 + (2e-4 - 1e-6) / 99_999
    assert q.transition_variance == pytest.approx(beta, rel=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [*SIMPLE, ZERO])
def test_predictions_are_inverted_at_every_level(prediction: str, schedule: NoiseSchedule) -> None:
    x_0, eps = randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1)
    for level in (schedule.at(t) for t in (0, 1, 40.5, 98, 99)):
        if prediction == "eps" and level.alpha == 0:
            continue
        said = target(prediction, x_0, eps, level.alpha, level.sigma)
        x_t = add_noise(x_0, eps, level.alpha, level.sigma)
        got = invert(prediction, said, x_t, level.alpha, level.sigma)
        torch.testing.assert_close(got[0], x_0, rtol=0, atol=1e-11)
        torch.testing.assert_close(got[1], eps, rtol=0, atol=1e-11)


def x_0_weight(name: str, schedule: NoiseSchedule) -> Tensor:
    """The published weights as they stand in the papers, on the squared error of x_0."""
    snr = (schedule.alpha / schedule.sigma) ** 2
    log_snr = snr.log()
    slope = torch.empty_like(snr)
    slope[1:-1] = (log_snr[2:] - log_snr[:-2]) / 2
    slope[0], slope[-1] = (log_snr[1] - log_snr[0]) / 2, (log_snr[-1] - log_snr[-2]) / 2
    return {
        "uniform": snr,
        "min_snr": torch.minimum(snr, torch.tensor(5.0)),
        "p2": snr * (1 + snr) ** -0.5,
        "sigmoid": 0.5 * -slope * len(snr) * snr / (1 + torch.exp(log_snr - 2)),
    }[name]


@pytest.mark.parametrize("weight", [name for name in WEIGHTS if name != "plain"])
@pytest.mark.parametrize("schedule", SIMPLE)
def test_a_weight_means_the_same_for_every_prediction(weight: str, schedule: NoiseSchedule) -> None:
    """For the same error in x_0: the same loss, and the same gradient with respect to the estimate of x_0."""
    t = torch.tensor([0, 20, 60, 99])
    x_0, eps = randn(4, 1, 3, 3).float(), randn(4, 1, 3, 3, seed=1).float()
    alpha, sigma = (table[t].float().view(-1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))
    x_t = add_noise(x_0, eps, alpha, sigma)
    for prediction in PREDICTIONS:
        error = (0.1 * randn(4, 1, 3, 3, seed=2)).float().requires_grad_()
        wrong_x_0 = x_0 + error
        said = target(prediction, wrong_x_0, (x_t - alpha * wrong_x_0) / sigma, alpha, sigma)
        objective = make_objective(schedule, "cpu", prediction=prediction, weight=weight, p2_gamma=0.5)
        loss = losses(Says(lambda x, t, y, said=said: said), objective, x_0, t, eps, None)
        w = x_0_weight(weight, schedule)[t]
        squared = error.detach().double().square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(loss.double() / w, squared, rtol=3e-3, atol=0)  # float32 at t = 0 and 99
        (gradient,) = torch.autograd.grad(loss.sum(), error)
        wanted = 2 * error.detach().double() / 9
        torch.testing.assert_close(gradient.double() / w.view(-1, 1, 1, 1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_sigmoid_weight_sums_to_its_integral_over_log_snr(name: str) -> None:
    """The mean over t of w(log snr) (-d log snr / dt) / 2 on the error of eps; its integral has a closed form."""
    schedule = SCHEDULES[name](1000)
    snr = (schedule.alpha / schedule.sigma) ** 2
    log_snr = snr.log()
    high, low = log_snr[0].item() - 2, log_snr[-1].item() - 2
    integral = 0.5 * ((high - math.log1p(math.exp(high))) - (low - math.log1p(math.exp(low))))
    assert (sigmoid(snr) / snr).mean().item() == pytest.approx(integral, rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_plain_is_the_bare_squared_error(prediction: str) -> None:
    objective = make_objective(cosine(100), "cpu", prediction=prediction, weight="plain")
    assert (objective.weight == 1).all()
    x_0, eps, t = randn(5, 2, 3, 3).float(), randn(5, 2, 3, 3, seed=1).float(), torch.arange(5) * 20
    alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (objective.alpha, objective.sigma))
    loss = losses(Says(lambda x, t, y: 0.3 * x), objective, x_0, t, eps, None)
    answer = 0.3 * (alpha * x_0 + sigma * eps)
    wanted = (answer - target(prediction, x_0, eps, alpha, sigma)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize(
    ("schedule", "parameters", "words"),
    [
        (ZERO, {"prediction": "eps", "weight": "uniform"}, "prediction = eps: says nothing of x_0"),
        (ZERO, {"prediction": "v", "weight": "uniform"}, "is 0 for prediction = v at t = 99"),
        (ZERO, {"prediction": "v", "weight": "min_snr"}, "weight = min_snr: is 0"),
        (ZERO, {"prediction": "flow", "weight": "p2"}, "weight = p2: is 0"),
        (ZERO, {"prediction": "x_0", "weight": "sigmoid"}, "weight = sigmoid: is"),
        (SIMPLE[0], {"prediction": "noise", "weight": "plain"}, "prediction = noise: must be one of eps"),
        (SIMPLE[0], {"prediction": "v", "weight": "snr"}, "weight = snr: must be one of plain"),
        (SIMPLE[0], {"prediction": "v", "weight": "min_snr", "min_snr_gamma": 0.0}, "min_snr_gamma = 0.0"),
        (SIMPLE[0], {"prediction": "v", "weight": "p2", "p2_gamma": -1.0}, "p2_gamma = -1.0"),
        (SIMPLE[0], {"prediction": "v", "weight": "plain", "vlb_weight": 0.0}, "vlb_weight = 0.0"),
        (linear(1), {"prediction": "v", "weight": "sigmoid"}, "num_timesteps must be at least 2"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    schedule: NoiseSchedule, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make_objective(schedule, "cpu", **parameters)


def test_zero_terminal_snr_can_be_trained_with_plain_weights() -> None:
    for prediction in ("x_0", "v", "flow"):
        objective = make_objective(ZERO, "cpu", prediction=prediction, weight="plain", learned_variance=True)
        tables = [value for value in vars(objective).values() if isinstance(value, Tensor)]
        assert len(tables) == 5 and all(table.isfinite().all() for table in tables)


# Data N(0, c^2): everything about the reverse process is known.


def reverse_variance(schedule: NoiseSchedule, c: float) -> tuple[Tensor, Tensor]:
    """(Var[x_0 | x_t], Var[x_{t-1} | x_t]) at each t, with the clean image before t = 0."""
    alpha, sigma = schedule.alpha, schedule.sigma
    x_0_variance = c**2 * sigma**2 / (alpha**2 * c**2 + sigma**2)
    levels = [schedule.at(t) for t in range(-1, schedule.num_timesteps)]
    q = [posterior(t, s) for s, t in pairwise(levels)]
    spread = torch.tensor([step.variance for step in q], dtype=torch.float64)
    factor = torch.tensor([step.x_0_factor for step in q], dtype=torch.float64)
    return x_0_variance, spread + factor**2 * x_0_variance


def exact_fraction(schedule: NoiseSchedule, c: float) -> Tensor:
    """Where Var[x_{t-1} | x_t] lies between the posterior's and the transition's variance, in logarithms."""
    _, variance = reverse_variance(schedule, c)
    fraction = torch.zeros(schedule.num_timesteps, dtype=torch.float64)
    for t in range(1, schedule.num_timesteps):
        q = posterior(schedule.at(t), schedule.at(t - 1))
        log_range = math.log(q.transition_variance / q.variance)
        fraction[t] = math.log(variance[t].item() / q.variance) / log_range
    return fraction


@pytest.mark.parametrize("schedule", [*SIMPLE, linear(100, zero_terminal_snr=True)])
@pytest.mark.parametrize("c", [0.2, 0.7, 1.0])
def test_bound_of_the_ideal_model_is_the_entropy_of_the_data(schedule: NoiseSchedule, c: float) -> None:
    """With the exact mean and variance p is the true reverse process, so the bound is tight:
    L_0 + sum L_t + L_T = E[-log p(x_0)] = log(2 pi e c^2) / 2 (Ho et al. 2020, eq. 5).
    """
    objective = make_objective(schedule, "cpu", prediction="x_0", weight="plain", learned_variance=True)
    x_0_variance, variance = reverse_variance(schedule, c)
    t = torch.arange(schedule.num_timesteps)
    shape = (-1, 1, 1, 1)
    fraction = exact_fraction(schedule, c)
    assert fraction.min() > -1e-9
    if (schedule.alpha**2 + schedule.sigma**2 - 1).abs().max() < 1e-9:  # variance-preserving, and c at most 1
        assert fraction.max() < 1 + 1e-6
    terms = vlb_terms(objective, x_0_variance.view(shape), fraction.view(shape), t).flatten()
    assert terms[0] == 0 and (terms >= -1e-7).all()
    first = 0.5 * math.log(2 * math.pi * math.e * variance[0].item())
    last_alpha, last_sigma = schedule.alpha[-1].item(), schedule.sigma[-1].item()
    prior = 0.5 * math.log((last_alpha**2 * c**2 + last_sigma**2) / last_sigma**2)
    entropy = 0.5 * math.log(2 * math.pi * math.e * c**2)
    assert first + terms.sum().item() + prior == pytest.approx(entropy, abs=2e-5)
    worse = vlb_terms(objective, x_0_variance.view(shape), 0.9 * fraction.view(shape), t).sum()
    assert worse > terms.sum() + 1e-4


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_learned_variance_finds_the_known_one(prediction: str) -> None:
    c, T, schedule = 0.5, 10, cosine(10)
    x_0, eps = c * randn(4000, 1, 1, 1).float(), randn(4000, 1, 1, 1, seed=1).float()
    t = torch.arange(4000) % T
    learned = nn.Parameter(torch.zeros(T))
    alpha, sigma = schedule.alpha.float(), schedule.sigma.float()

    def answer(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        a, s = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        ideal = a * c**2 / (a**2 * c**2 + s**2) * x
        mean = target(prediction, ideal, (x - a * ideal) / s, a, s)
        return torch.cat([mean, learned[t].view(-1, 1, 1, 1)], dim=1)

    network = Says(answer)
    network.learned = learned
    objective = make_objective(schedule, "cpu", prediction=prediction, weight="plain", learned_variance=True)
    optimizer = torch.optim.Adam([learned], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        losses(network, objective, x_0, t, eps, None).mean().backward()
        optimizer.step()
    got = ((learned.detach() + 1) / 2).double()
    log_range = objective.vlb_log_range.double()
    ratio = torch.exp((got - exact_fraction(schedule, c)) * log_range)[1:]  # learned over true variance
    assert (ratio - 1).abs().max() < 0.15  # 400 images for each t: 5 standard errors of a variance are 0.35
    assert learned[0] == 0  # no gradient at t = 0, where the variance is fixed


def test_the_bound_does_not_move_the_mean() -> None:
    mean = nn.Parameter(torch.zeros(8, 1, 1, 1))
    network = Says(lambda x, t, y: torch.cat([mean, 0.4 * torch.ones_like(mean)], dim=1))
    x_0, eps, t = randn(8, 1, 1, 1).float(), randn(8, 1, 1, 1, seed=1).float(), torch.arange(8) * 10
    gradients = []
    for learned_variance in (False, True):
        objective = make_objective(
            SIMPLE[1], "cpu", prediction="v", weight="plain", learned_variance=learned_variance
        )
        loss = losses(network, objective, x_0, t, eps, None)
        gradients.append(torch.autograd.grad(loss.sum(), mean)[0])
    assert torch.equal(*gradients)


# The denoiser: clipping and guidance.


def denoiser(answer: Callable[..., Tensor], **options: Any) -> Denoiser:
    return Denoiser(Says(answer), SIMPLE[1], "x_0", **options)


LEVEL = Level(10.0, 0.8, 0.6)


def test_clipping_keeps_x_t_consistent() -> None:
    x_t = randn(3, 1, 4, 4).float()
    for clip, last in (("none", False), ("clip", False), ("dynamic", False), ("dynamic", True)):
        x_0, eps, fraction = denoiser(lambda x, t, y: 3 * x, clip=clip)(x_t, LEVEL, last=last)
        torch.testing.assert_close(LEVEL.alpha * x_0 + LEVEL.sigma * eps, x_t)
        assert fraction is None
        assert (x_0.abs().max() <= 1) == (clip != "none")
        if clip == "dynamic" and not last:
            largest = torch.quantile((3 * x_t).abs().flatten(1), 0.995, dim=1).view(-1, 1, 1, 1)
            torch.testing.assert_close(x_0, (3 * x_t).clamp(-largest, largest) / largest)
        elif clip != "none":
            torch.testing.assert_close(x_0, (3 * x_t).clamp(-1, 1))


def test_dynamic_threshold_leaves_images_within_the_range_alone() -> None:
    x_t = 0.9 * torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(denoiser(lambda x, t, y: x, clip="dynamic")(x_t, LEVEL).x_0, x_t)


def by_label(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    assert y is not None
    return (y.float() / 10).view(-1, 1, 1, 1) * torch.ones_like(x) + 0.1 * x


def test_guidance_is_one_batch_of_both() -> None:
    y, x_t = torch.tensor([1, 2, 3]), randn(3, 1, 2, 2).float()
    sizes = []

    def answer(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        sizes.append(len(x))
        assert (t == LEVEL.t).all()
        return by_label(x, t, y)

    cond, null = by_label(x_t, y, y), by_label(x_t, y, torch.full_like(y, 10))
    for scale, evaluations in ((1.0, 1), (0.0, 1), (2.5, 2)):
        guided = denoiser(answer, y=y, null_label=10, guidance_scale=scale, clip="none")
        torch.testing.assert_close(guided(x_t, LEVEL).x_0, null + scale * (cond - null))
        assert guided.evaluations == evaluations
    assert sizes == [3, 3, 6]


def test_guidance_interval_is_in_sigma_over_alpha() -> None:
    y, x_t = torch.tensor([1, 2, 3]), randn(3, 1, 2, 2).float()
    cond, null = by_label(x_t, y, y), by_label(x_t, y, torch.full_like(y, 10))
    pure_noise = Level(99.0, 0.0, 1.0)
    for interval, level, inside in (
        ((0.7, 0.8), LEVEL, True),
        ((0.0, 0.7), LEVEL, False),
        ((0.8, math.inf), LEVEL, False),
        ((0.8, math.inf), pure_noise, True),
        ((0.0, 100.0), pure_noise, False),
    ):
        options: dict[str, Any] = {"y": y, "null_label": 10, "guidance_interval": interval, "clip": "none"}
        guided = denoiser(by_label, guidance_scale=3.0, **options)
        torch.testing.assert_close(guided(x_t, level).x_0, null + 3 * (cond - null) if inside else cond)
        assert guided.evaluations == (2 if inside else 1)


def test_guidance_rescale_restores_the_standard_deviation() -> None:
    x_t, y = randn(3, 1, 4, 4).float(), torch.tensor([1, 2, 3])

    def answer(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return x * (1 + 0.1 * y.view(-1, 1, 1, 1)) if y is not None else x

    options: dict[str, Any] = {"y": y, "null_label": 0, "guidance_scale": 4.0, "clip": "none"}
    plain, full, half = (
        denoiser(answer, guidance_rescale=part, **options)(x_t, LEVEL).x_0.std(dim=(1, 2, 3))
        for part in (0.0, 1.0, 0.5)
    )
    torch.testing.assert_close(full, answer(x_t, y, y).std(dim=(1, 2, 3)))
    torch.testing.assert_close(half, (plain + full) / 2)
    assert (plain > full).all()


def test_learned_variance_comes_from_the_conditional_half() -> None:
    y, x_t = torch.tensor([1, 2, 3]), randn(3, 1, 2, 2).float()

    def answer(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        only_cond = (y < 10).float().view(-1, 1, 1, 1)
        return torch.cat([by_label(x, t, y), -0.5 * only_cond * torch.ones_like(x)], dim=1)

    estimate = denoiser(answer, y=y, null_label=10, guidance_scale=3.0, guidance_rescale=0.7)(x_t, LEVEL)
    assert estimate.fraction is not None
    torch.testing.assert_close(estimate.fraction, torch.full_like(x_t, 0.25))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": "hard"}, "clip = hard: must be one of none, clip, dynamic"),
        ({"dynamic_percentile": 99.5}, "dynamic_percentile = 99.5: must be from 0 to 1"),
        ({"guidance_scale": -1.0}, "guidance_scale = -1.0: must be at least 0"),
        ({"guidance_scale": 2.0}, "guidance_scale = 2.0: needs labels"),
        ({"guidance_rescale": 1.5}, "guidance_rescale = 1.5"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        denoiser(by_label, **options)


def test_what_cannot_be_inverted_is_not_finite_and_no_crash() -> None:
    """As with tensors: whoever draws then says which image is not finite."""
    x = torch.ones(1, 1, 2, 2)
    x_0, _ = invert("eps", x, x, 0.0, 1.0)
    assert not x_0.isfinite().any()
