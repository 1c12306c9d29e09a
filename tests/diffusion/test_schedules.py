"""Noise schedules against their closed forms, in float64, and the levels between their times."""

import math
from itertools import pairwise

import pytest
import torch

from ddpm.diffusion.schedules import (
    MAX_BETA,
    SCHEDULES,
    Level,
    NoiseSchedule,
    cosine,
    is_noise,
    linear,
    sigmoid,
    straight,
)

CASES = [
    (name, T, zero)
    for name in SCHEDULES
    for T in (2, 4, 10, 100, 1000)
    for zero in ((False, True) if name != "straight" else (False,))
]


def make(name: str, T: int, zero: bool) -> NoiseSchedule:
    return SCHEDULES[name](T, **({"zero_terminal_snr": True} if zero else {}))


def test_linear_is_the_product_of_its_betas() -> None:
    schedule = linear(1000)
    alpha_bar = 1.0
    for t in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert schedule.alpha[t].item() == pytest.approx(math.sqrt(alpha_bar), rel=1e-12)
        assert schedule.sigma[t].item() == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-11)


def test_linear_ends_in_the_same_noise_for_any_number_of_timesteps() -> None:
    for T in (100, 300, 1000, 4000):
        assert linear(T).alpha[-1].item() == pytest.approx(0.0065, rel=0.35)


def test_cosine_and_sigmoid_follow_their_formulas_up_to_the_clipped_last_beta() -> None:
    def of_cosine(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2

    def of_sigmoid(t: float) -> float:
        def s(x: float) -> float:
            return 1 / (1 + math.exp(-x / 0.9))

        return (s(3) - s(-3 + 6 * t)) / (s(3) - s(-3))

    for schedule, alpha_bar in ((cosine(500), of_cosine), (sigmoid(500, tau=0.9), of_sigmoid)):
        for t in range(499):
            assert schedule.alpha[t].item() ** 2 == pytest.approx(alpha_bar((t + 1) / 500), rel=1e-9)
        last = schedule.alpha[-1] ** 2 / schedule.alpha[-2] ** 2
        assert last.item() == pytest.approx(1 - MAX_BETA, rel=1e-9)


def test_straight_is_a_straight_line() -> None:
    schedule = straight(8)
    assert schedule.sigma.tolist() == [(i + 0.5) / 8 for i in range(8)]
    assert (schedule.alpha + schedule.sigma).tolist() == [1.0] * 8


@pytest.mark.parametrize(("name", "T", "zero"), CASES)
def test_every_schedule_goes_from_nearly_clean_to_noise(name: str, T: int, zero: bool) -> None:
    schedule = make(name, T, zero)
    assert (schedule.alpha.diff() < 0).all() and (schedule.sigma.diff() > 0).all()
    if name != "straight":
        assert (schedule.alpha**2 + schedule.sigma**2 - 1).abs().max() < 1e-14
    assert (schedule.alpha[-1] == 0) == zero
    assert is_noise(schedule.at(T - 1)) == (T > 4 or name != "straight")


def test_zero_terminal_snr_is_algorithm_1_and_keeps_the_first() -> None:
    plain, zero = linear(1000), linear(1000, zero_terminal_snr=True)
    first, last = plain.alpha[0], plain.alpha[-1]
    shifted = (plain.alpha - last) * first / (first - last)
    torch.testing.assert_close(zero.alpha, shifted, rtol=1e-13, atol=1e-15)
    assert zero.sigma[0].item() == pytest.approx(plain.sigma[0].item(), rel=1e-14)
    assert zero.lambda_[-1] == -math.inf


@pytest.mark.parametrize(("name", "T", "zero"), CASES)
def test_levels_between_the_times(name: str, T: int, zero: bool) -> None:
    schedule = make(name, T, zero)
    for t in range(T):
        assert schedule.at(t) == Level(t, schedule.alpha[t].item(), schedule.sigma[t].item())
    assert schedule.at(-1) == Level(-1.0, 1.0, 0.0)
    levels = [schedule.at(-1 + T * i / 997) for i in range(998)]
    assert all(a.lambda_ > b.lambda_ for a, b in pairwise(levels))
    for level in levels[1:-1]:
        if level.t > 0 and level.lambda_ > -20:
            assert schedule.at_lambda(level.lambda_).t == pytest.approx(level.t, abs=1e-6)
    for far, end in ((1e4, 0), (math.inf, 0), (-1e4, T - 1), (-math.inf, T - 1)):
        assert schedule.at_lambda(far) == schedule.at(end)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("linear", {"num_timesteps": 0}, "num_timesteps = 0: must be at least 1"),
        ("linear", {"num_timesteps": 10, "beta_start": 0.0}, "beta_start = 0.0"),
        ("linear", {"num_timesteps": 1, "zero_terminal_snr": True}, "num_timesteps = 1"),
        ("cosine", {"num_timesteps": 10, "s": -0.1}, "s = -0.1: must be from 0 to 1"),
        ("sigmoid", {"num_timesteps": 10, "start": 3.0, "end": 3.0}, "need start < end"),
        ("sigmoid", {"num_timesteps": 10, "tau": 0.0}, "tau = 0.0"),
        ("sigmoid", {"num_timesteps": 1000, "tau": 0.01}, "adds no noise at t = 0"),
    ],
)
def test_bad_parameters_are_named(name: str, parameters: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        SCHEDULES[name](**parameters)
    assert "\n" not in str(error.value)
