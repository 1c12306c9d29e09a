"""Samplers and spacings: exact cases, an ideal denoiser, and the schedulers of diffusers step by step."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm.diffusion.denoiser import Denoiser, Estimate
from ddpm.diffusion.process import posterior
from ddpm.diffusion.samplers import (
    SAMPLERS,
    Step,
    ddim,
    ddim_inverse,
    ddpm,
    dpmpp_2m,
    heun,
    sample_levels,
    unipc,
)
from ddpm.diffusion.schedules import SCHEDULES, Level, NoiseSchedule, cosine, linear, straight
from ddpm.diffusion.spacings import SPACINGS
from ddpm.runtime.randomness import normal
from tests.diffusion.mixture import IdealDenoiser, draw, x_T

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

EVERY = [make(100) for make in SCHEDULES.values()] + [
    SCHEDULES[name](100, zero_terminal_snr=True) for name in ("linear", "cosine", "sigmoid")
]


def noise_like(x: Tensor, seed: int = 0) -> Callable[[int], Tensor]:
    def noise(k: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + k)
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    return noise


def end(steps: Iterator[Step]) -> Tensor:
    *_, last = steps
    return last.x


# Levels.


@pytest.mark.parametrize("schedule", [*EVERY, linear(1), cosine(1), linear(2, zero_terminal_snr=True)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_fall_to_the_clean_image(schedule: NoiseSchedule, spacing: str) -> None:
    T = schedule.num_timesteps
    for num_steps in {1, 2, 3, 4, 7, 10, 50, 99, 100} & set(range(1, T + 1)):
        if spacing == "leading" and num_steps == 1 < T:
            continue
        levels = sample_levels(schedule, num_steps, spacing)
        assert len(levels) == num_steps + 1
        assert levels[-1] == Level(-1.0, 1.0, 0.0)
        assert all(t.t > s.t and t.lambda_ < s.lambda_ for t, s in pairwise(levels))
        if spacing == "leading":
            assert levels[0].t == T * (num_steps - 1) / num_steps and levels[-2].t == 0
        else:
            assert levels[0].t == T - 1
        if spacing in ("linspace", "karras", "logsnr") and num_steps > 1:
            assert levels[-2].t == pytest.approx(0, abs=1e-9)
        if spacing in ("linspace", "leading", "trailing") and num_steps == T:
            assert [level.t for level in levels] == list(range(T - 1, -2, -1))


def test_spacings_are_even_in_what_they_say() -> None:
    schedule = linear(1000)
    lambdas = [level.lambda_ for level in sample_levels(schedule, 20, "logsnr")[1:-1]]
    steps = np.diff(lambdas)
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    roots = [(v.sigma / v.alpha) ** (1 / 3.5) for v in sample_levels(schedule, 20, "karras", rho=3.5)[1:-1]]
    steps = np.diff(roots)
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)


def test_explicit_times_are_taken_as_they_are() -> None:
    times = [99, 70.5, 3]
    assert [level.t for level in sample_levels(EVERY[0], 50, times)] == [*times, -1]


@pytest.mark.parametrize(
    ("num_steps", "spacing", "words"),
    [
        (0, "linspace", "num_steps = 0: must be from 1 to 100"),
        (101, "linspace", "num_steps = 101: must be from 1 to 100"),
        (10, "even", "spacing = even: must be one of linspace, leading"),
        (1, "leading", "spacing = leading"),
        (3, [5, 5, 1], "must fall"),
        (3, [100, 5], "within 0 to 99"),
        (3, [5, -1], "within 0 to 99"),
        (3, [], "a list of times"),
    ],
)
def test_bad_levels_are_refused(num_steps: int, spacing: str | Sequence[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_levels(EVERY[0], num_steps, spacing)


# What every sampler must do.


@pytest.mark.parametrize("schedule", EVERY)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_constant_images_are_found_exactly(name: str, spacing: str, schedule: NoiseSchedule) -> None:
    """If x_0 is known the last step lands on it, whatever came before; all on the way is finite."""
    x_0 = torch.tensor([-0.8, 0.3]).view(2, 1, 1, 1)

    class Knows:
        def __init__(self) -> None:
            self.schedule = schedule

        def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate:
            return Estimate(x_0, (x_t - level.alpha * x_0) / level.sigma)

    for num_steps in (1, 2, 3, 4, 10, 50, 100):
        if spacing == "leading" and num_steps == 1:
            continue
        levels = sample_levels(schedule, num_steps, spacing)
        noise = noise_like(x_0)
        x = levels[0].alpha * x_0 + levels[0].sigma * noise(77)
        steps = list(SAMPLERS[name](Knows(), levels, x, noise))
        assert len(steps) == num_steps
        assert [step.level for step in steps] == levels[1:]
        assert all(step.x.isfinite().all() for step in steps)
        torch.testing.assert_close(steps[-1].x, x_0, rtol=0, atol=1e-6)
        for step in steps[:-1]:  # still x_t = alpha x_0 + sigma eps with an eps of reasonable size
            eps = (step.x - step.level.alpha * x_0) / step.level.sigma
            assert eps.abs().max() < 6


class LastFlag:
    """Notes for which calls `last` was set."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule, self.seen = schedule, list[tuple[float, bool]]()

    def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate:
        self.seen.append((level.t, last))
        return Estimate(0.5 * x_t, x_t)


@pytest.mark.parametrize("name", SAMPLERS)
def test_last_is_said_at_the_last_level_alone_and_heun_alone_asks_twice(name: str) -> None:
    denoiser, x = LastFlag(EVERY[0]), torch.zeros(1, 1, 1, 1)
    levels = sample_levels(EVERY[0], 5, "trailing")
    end(SAMPLERS[name](denoiser, levels, x, noise_like(x)))
    times = [level.t for level in levels[:-1]]
    if name == "heun":
        times = [times[0], *(t for t in times[1:] for _ in range(2))]
    assert [t for t, _ in denoiser.seen] == times
    assert [last for _, last in denoiser.seen] == [False] * (len(times) - 1) + [True]


def test_bad_options_are_named() -> None:
    levels, x = sample_levels(EVERY[0], 3), torch.zeros(1, 1, 1, 1)
    for sampler, options, words in (
        (SAMPLERS["ddpm"], {"variance": "medium"}, "variance = medium: must be one of small, large, learned"),
        (SAMPLERS["ddpm"], {"variance": "learned"}, "has learned none"),
        (SAMPLERS["ddim"], {"eta": 1.5}, "eta = 1.5: must be from 0 to 1"),
        (SAMPLERS["dpmpp_2m_sde"], {"eta": -0.5}, "eta = -0.5"),
        (SAMPLERS["heun"], {"churn": -1.0}, "churn = -1.0: must be at least 0"),
        (SAMPLERS["unipc"], {"order": 4}, "order = 4: must be from 2 to 3"),
    ):
        with pytest.raises(ValueError, match=words):
            end(sampler(IdealDenoiser(EVERY[0]), levels, x, noise_like(x), **options))


@pytest.mark.parametrize("schedule", EVERY)
def test_ddim_with_eta_1_is_ddpm(schedule: NoiseSchedule) -> None:
    x = x_T(draw(64, 0), schedule.at(99), 1)
    levels = sample_levels(schedule, 13, "trailing")
    both = zip(
        ddpm(IdealDenoiser(schedule), levels, x, noise_like(x)),
        ddim(IdealDenoiser(schedule), levels, x, noise_like(x), eta=1.0),
        strict=True,
    )
    for a, b in both:
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-10)


# A Gaussian, whose moments every sampler must return.


def gaussian(schedule: NoiseSchedule) -> Callable[..., Estimate]:
    """The ideal denoiser of two correlated pixels N(mean, covariance)."""
    mean = torch.tensor([0.3, -0.5], dtype=torch.float64)
    covariance = torch.tensor([[0.2, 0.1], [0.1, 0.15]], dtype=torch.float64)

    def denoise(x_t: Tensor, level: Level, last: bool = False) -> Estimate:
        a, s = level.alpha, level.sigma
        marginal = a**2 * covariance + s**2 * torch.eye(2, dtype=torch.float64)
        gain = a * covariance @ torch.linalg.inv(marginal)
        x_0 = mean + (x_t - a * mean) @ gain.T
        return Estimate(x_0, (x_t - a * x_0) / s)

    denoise.schedule, denoise.mean, denoise.covariance = schedule, mean, covariance  # type: ignore[attr-defined]
    return denoise


@pytest.mark.parametrize(
    ("name", "tolerance"), [("ddim", 0.02), ("heun", 0.002), ("dpmpp_2m", 0.003), ("unipc", 0.001)]
)
@pytest.mark.parametrize("schedule", [cosine(1000), straight(1000)])
def test_ideal_denoiser_of_a_gaussian_returns_its_moments(
    name: str, tolerance: float, schedule: NoiseSchedule
) -> None:
    """The steps are linear in x, so that noise of exactly unit moments shows them without sampling error."""
    denoiser = gaussian(schedule)
    z = torch.randn(500, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = z - z.mean(0)
    flat = z.view(500, 2)
    z = (flat @ torch.linalg.inv(torch.linalg.cholesky(flat.T @ flat / 500)).T).view(500, 1, 1, 2)
    levels = sample_levels(schedule, 100, "logsnr")
    x = end(SAMPLERS[name](denoiser, levels, levels[0].sigma * z, noise_like(z))).view(500, 2)
    torch.testing.assert_close(x.mean(0), denoiser.mean, rtol=0, atol=tolerance)
    got = (x - x.mean(0)).T @ (x - x.mean(0)) / 500
    torch.testing.assert_close(got, denoiser.covariance, rtol=0, atol=tolerance)


def test_ancestral_sampling_with_the_learned_variance_is_exact_for_a_gaussian() -> None:
    """With the true variance of p(x_{t-1} | x_t) even 8 coarse steps return the data's; "small" and "large"
    do not (Nichol & Dhariwal 2021, section 3.1). What remains is the last step, which returns the mean.
    """
    c, T, n, schedule = 0.5, 8, 200_000, cosine(8)

    def denoise(x_t: Tensor, level: Level, last: bool = False) -> Estimate:
        a, s = level.alpha, level.sigma
        x_0 = a * c**2 / (a**2 * c**2 + s**2) * x_t
        before = schedule.at(level.t - 1)
        fraction = 0.0
        if before.sigma > 0:
            q = posterior(level, before)
            variance = q.variance + q.x_0_factor**2 * c**2 * s**2 / (a**2 * c**2 + s**2)
            fraction = math.log(variance / q.variance) / math.log(q.transition_variance / q.variance)
        return Estimate(x_0, (x_t - a * x_0) / s, torch.full_like(x_t, fraction))

    denoise.schedule = schedule  # type: ignore[attr-defined]
    first, noisiest = schedule.at(0), schedule.at(T - 1)
    gain = first.alpha * c**2 / (first.alpha**2 * c**2 + first.sigma**2)
    wanted = gain * first.alpha * c**2  # the variance of E[x_0 | x_t] at t = 0
    z = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = math.sqrt((noisiest.alpha * c) ** 2 + noisiest.sigma**2) * z
    levels = sample_levels(schedule, T)
    got = {
        variance: end(ddpm(denoise, levels, x, noise_like(x), variance=variance)).var().item()
        for variance in ("small", "learned", "large")
    }
    assert got["learned"] == pytest.approx(wanted, rel=5 * math.sqrt(2 / n))
    assert got["small"] < 0.97 * wanted and got["large"] > 1.03 * wanted


def test_churn_keeps_the_marginals_and_stops_at_the_noisiest_level() -> None:
    schedule, n = linear(100), 20_000
    x_0 = draw(n, 0)
    x = x_T(x_0, schedule.at(99), 1)
    levels = sample_levels(schedule, 40, "karras")
    seen: list[float] = []

    class Watch(IdealDenoiser):
        def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate:
            seen.append(level.t)
            return super().__call__(x_t, level, last)

    quiet = end(heun(IdealDenoiser(schedule), levels, x, noise_like(x)))
    churned = end(heun(Watch(schedule), levels, x, noise_like(x), churn=20.0))
    assert max(seen) == 99 and len(set(seen)) > 60  # levels that are not among the 40
    assert (churned - quiet).abs().mean() > 0.05
    for power in (1, 2):
        assert abs((churned**power).mean() - (x_0**power).mean()) < 0.02
    bounded = end(heun(IdealDenoiser(schedule), levels, x, noise_like(x), churn=20.0, churn_min=1e5))
    assert torch.equal(bounded, quiet)


def test_heun_without_cap_is_algorithm_1_of_karras() -> None:
    """In their variables y = x / alpha, over sigma / alpha; over steps of h > ln 2, too, where the cap acts."""
    schedule = linear(1000)
    ideal, x = IdealDenoiser(schedule), x_T(draw(64, 0), schedule.at(999), 1)
    levels = sample_levels(schedule, 8, "karras")
    assert sum(s.lambda_ - t.lambda_ > math.log(2) for t, s in pairwise(levels[:-1])) > 2

    y = x / levels[0].alpha
    for t, s in pairwise(levels):
        t_i, t_next = t.sigma / t.alpha, s.sigma / s.alpha
        d_i = (y - ideal(t.alpha * y, t).x_0) / t_i
        y_next = y + (t_next - t_i) * d_i
        if t_next > 0:
            slope = (y_next - ideal(s.alpha * y_next, s).x_0) / t_next
            y_next = y + (t_next - t_i) * (d_i + slope) / 2
        y = y_next
    got = end(heun(ideal, levels, x, noise_like(x), cap=False))
    torch.testing.assert_close(got, y, rtol=0, atol=1e-10)
    assert (end(heun(ideal, levels, x, noise_like(x))) - y).abs().max() > 0.01


# The inverse of DDIM.


@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000), straight(1000)])
def test_ddim_inverse_returns_the_image(schedule: NoiseSchedule) -> None:
    x_0, ideal = draw(256, 3), IdealDenoiser(schedule)
    levels = sample_levels(schedule, 50, "logsnr")

    def there_and_back(x_0: Tensor, **options: int) -> Tensor:
        noise = end(ddim_inverse(ideal, levels, x_0, **options))
        assert 0.8 < noise.std() < 1.2
        return (end(ddim(ideal, levels, noise, noise_like(noise))) - x_0).abs().flatten()

    assert there_and_back(x_0).max() < 1e-5
    assert ideal.calls == 50 * (15 + 1)
    assert there_and_back(x_0.float()).max() < 2e-5  # rounding alone
    assert there_and_back(x_0, iterations=2).max() > 1e-2  # what the refinement is for


def test_ddim_inverse_is_as_good_where_only_some_images_converge() -> None:
    """Equal steps of t make the first ones so long that between the bumps two x_t lead to the same x_s."""
    schedule, x_0 = linear(1000), draw(256, 3)
    ideal, levels = IdealDenoiser(schedule), sample_levels(schedule, 50, "trailing")
    errors = []
    for iterations in (2, 40):
        noise = end(ddim_inverse(ideal, levels, x_0, iterations=iterations))
        errors.append((end(ddim(ideal, levels, noise, noise_like(noise))) - x_0).abs().flatten())
    usual, refined = errors
    assert (refined < 1e-5).double().mean() > 0.9 > 0.1 > (usual < 1e-5).double().mean()
    assert refined.max() <= usual.max()


def test_ddim_inverse_falls_back_to_the_usual_guess_where_iterations_run_away() -> None:
    class Wild:
        schedule = cosine(100)

        def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate:
            """Calm for the first image, far from any contraction for the second."""
            speed = torch.tensor([0.1, 500.0]).view(2, 1, 1, 1)
            x_0 = torch.sin(speed * x_t)
            return Estimate(x_0, (x_t - level.alpha * x_0) / level.sigma)

    wild, x_0 = Wild(), torch.tensor([0.05, 0.4]).view(2, 1, 1, 1)
    levels = sample_levels(wild.schedule, 2, [60, 20])[:2]  # one step, between two noise levels
    usual, refined = (end(ddim_inverse(wild, levels, x_0, iterations=n)) for n in (2, 40))

    def misfit(x_t: Tensor) -> Tensor:
        s = levels[1]
        x_0_t, eps, _ = wild(x_t, levels[0])
        return (s.alpha * x_0_t + s.sigma * eps - x_0).abs().flatten()

    assert misfit(refined)[0] < 1e-5 < misfit(usual)[0]
    assert misfit(refined)[1] <= misfit(usual)[1] + 1e-6
    assert refined.isfinite().all()


# Against diffusers, with the same table and times, clipping off, and an ideal denoiser in float64.

TIMES = [950, 820, 700, 590, 490, 400, 310, 230, 160, 100, 60, 30]


def scheduler(kind: str, schedule: NoiseSchedule, **options: Any) -> Any:
    theirs = getattr(diffusers, kind)(num_train_timesteps=1000, prediction_type="epsilon", **options)
    theirs.alphas_cumprod = schedule.alpha**2
    if hasattr(theirs, "alpha_t"):
        theirs.alpha_t, theirs.sigma_t = schedule.alpha, schedule.sigma
        theirs.lambda_t = schedule.lambda_
    return theirs


def theirs_and_ours(
    theirs: Any, sampler: Callable[..., Iterator[Step]], schedule: NoiseSchedule, noisy: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """x after each step of both, each on its own path."""
    ideal = IdealDenoiser(schedule)
    times = [int(t) for t in theirs.timesteps]
    levels = sample_levels(schedule, 1, times)
    x = x_T(draw(64, 0), levels[0], 1)
    noise = noise_like(x)
    ours = [step.x for step in sampler(ideal, levels, x, noise)]
    pairs = []
    for k, t in enumerate(times):
        eps = ideal(x, schedule.at(t)).eps
        options = {"variance_noise": noise(k)} if noisy else {}
        x = theirs.step(eps, theirs.timesteps[k], x, **options).prev_sample.double()
        pairs.append((x, ours[k]))
    return pairs


SOLVERS = [linear(1000), cosine(1000)]


@pytest.mark.parametrize("schedule", SOLVERS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_that_of_diffusers(
    schedule: NoiseSchedule, variance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last step: for times that end above t = 0 diffusers' "fixed_large" adds noise to the clean
    image itself. Ours never does: z = 0 in the last line of Ho et al. 2020, algorithm 2.
    """
    theirs = scheduler("DDPMScheduler", schedule, clip_sample=False, variance_type=f"fixed_{variance}")
    theirs.set_timesteps(timesteps=TIMES)
    count = iter(range(100))
    x = draw(64, 0)
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **options: noise_like(x)(next(count)))
    pairs = theirs_and_ours(theirs, partial(ddpm, variance=variance), schedule)
    for a, b in pairs[:-1]:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SOLVERS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_that_of_diffusers(schedule: NoiseSchedule, eta: float) -> None:
    theirs = scheduler("DDIMScheduler", schedule, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    step = theirs.step
    theirs.step = lambda *args, **options: step(*args, eta=eta, **options)
    for a, b in theirs_and_ours(theirs, partial(ddim, eta=eta), schedule, noisy=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SOLVERS)
@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpmpp_2m_is_that_of_diffusers(schedule: NoiseSchedule, kind: str) -> None:
    theirs = scheduler("DPMSolverMultistepScheduler", schedule, algorithm_type=kind, lower_order_final=True)
    theirs.set_timesteps(timesteps=TIMES)
    stochastic = kind.startswith("sde")
    ours = SAMPLERS["dpmpp_2m_sde" if stochastic else "dpmpp_2m"]
    for a, b in theirs_and_ours(theirs, ours, schedule, noisy=stochastic):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)  # their sigmas and steps are float32


@pytest.mark.parametrize("schedule", SOLVERS)
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_is_that_of_diffusers(schedule: NoiseSchedule, order: int) -> None:
    """Up to the first step that is 1.5 times as long as the one before, where ours lowers the order; of order
    3 up to the last two, where diffusers does (`lower_order_final`), whatever the number of steps.
    """
    theirs = scheduler("UniPCMultistepScheduler", schedule, solver_order=order)
    theirs.set_timesteps(20)
    lambdas = [schedule.at(int(t)).lambda_ for t in theirs.timesteps]
    stride = np.diff(lambdas)[1:] / np.diff(lambdas)[:-1]
    assert (stride[:-1] < 1.5).all() and stride[-1] > 1.5
    for a, b in theirs_and_ours(theirs, partial(unipc, order=order), schedule)[:-2]:
        torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("schedule", SOLVERS)
def test_heun_is_that_of_diffusers(schedule: NoiseSchedule) -> None:
    """Theirs works on x / alpha and asks the network twice; both are EDM's algorithm 1 while h <= log 2."""
    times = [int(schedule.at_lambda(-3 + 0.45 * i).t) for i in range(15)]
    theirs = scheduler("HeunDiscreteScheduler", schedule)
    theirs.set_timesteps(timesteps=times)
    theirs.sigmas = theirs.sigmas.double()
    levels = sample_levels(schedule, 1, times)
    assert all(s.lambda_ - t.lambda_ < math.log(2) for t, s in pairwise(levels[:-1]))
    ideal = IdealDenoiser(schedule)
    x = x_T(draw(64, 0), levels[0], 1)
    ours = [step.x for step in heun(ideal, levels, x, noise_like(x))]
    scaled, k = x / levels[0].alpha, 0
    for j, t in enumerate(theirs.timesteps):
        level = schedule.at(t.item())
        scaled = theirs.step(ideal(scaled * level.alpha, level).eps, t, scaled).prev_sample
        if j % 2 == 1 or j == len(theirs.timesteps) - 1:
            torch.testing.assert_close(scaled * levels[k + 1].alpha, ours[k], rtol=2e-5, atol=2e-5)
            k += 1
    assert k == len(times)


def test_where_ours_differs_ours_is_nearer_to_the_truth() -> None:
    """Steps far longer than the one before (the cosine's last, for equal steps of t) make the published rules
    run past both ends. Ours extrapolate no further than stated in `heun` and LONGEST_STRIDE.
    """
    schedule = cosine(1000)
    ideal, times = IdealDenoiser(schedule), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    x = x_T(draw(64, 0), schedule.at(999), 1)  # as in `theirs_and_ours`
    truth = end(heun(ideal, sample_levels(schedule, 500, "karras"), x, noise_like(x)))

    def error(result: Tensor) -> float:
        return (result - truth).square().mean().sqrt().item()

    theirs = scheduler("DPMSolverMultistepScheduler", schedule, lower_order_final=False)
    theirs.set_timesteps(timesteps=times)
    published, ours = theirs_and_ours(theirs, dpmpp_2m, schedule)[-1]
    plain = end(ddim(ideal, sample_levels(schedule, 1, times), x, noise_like(x)))
    levels = sample_levels(schedule, 1, times)
    for sampler in (dpmpp_2m, heun, unipc, partial(unipc, order=3)):
        assert error(end(sampler(ideal, levels, x, noise_like(x)))) < 1.3 * error(plain)
    assert error(ours) < 0.7 * error(published)
    scaled = x / levels[0].alpha
    for t, s in pairwise(levels):  # EDM's rule as published, in its own variables
        eps = ideal(scaled * t.alpha, t).eps
        stride = s.sigma / s.alpha - t.sigma / t.alpha
        euler = scaled + stride * eps
        scaled = euler if s.sigma == 0 else scaled + stride * (eps + ideal(euler * s.alpha, s).eps) / 2
    assert error(scaled) > 5 * error(end(heun(ideal, levels, x, noise_like(x))))


# Images depend on their own index alone.


class Net(nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return torch.tanh(x * (1 + t.view(-1, 1, 1, 1) / 100))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_in_any_batch(name: str) -> None:
    schedule = cosine(50)

    def sample(index: Tensor) -> Tensor:
        levels = sample_levels(schedule, 10)
        x = normal(0, "x_T", 0, index, (1, 3, 3))
        denoiser = Denoiser(Net(), schedule, "v")
        return end(SAMPLERS[name](denoiser, levels, x, lambda k: normal(0, "sampler", k, index, (1, 3, 3))))

    whole = sample(torch.arange(9))
    assert torch.equal(sample(torch.tensor([7, 2])), whole[[7, 2]])
    assert whole.std() > 0.1


@pytest.mark.slow
def test_the_whole_matrix() -> None:
    """Every schedule × sampler × spacing × number of steps; writes docs/samplers.md."""
    script = Path(__file__).parents[2] / "scripts" / "verify_samplers.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_waits_for_the_gpu(name: str) -> None:
    schedule, index = cosine(50), torch.arange(4, device="cuda")
    denoiser, levels = Denoiser(Net(), schedule, "v"), sample_levels(schedule, 10)

    def noise(k: int) -> Tensor:
        return normal(0, "sampler", k, index, (1, 3, 3))

    x = noise(99)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = end(SAMPLERS[name](denoiser, levels, x, noise))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()
