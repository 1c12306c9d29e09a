"""Stateless random numbers: distribution, independence, and that each image's numbers are its own."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm.runtime.randomness import key, normal, permutation, seed_generators, uniform


def test_normal_moments_and_tails() -> None:
    x = normal(0, "a", 0, torch.arange(20_000), (1, 5, 5)).double().flatten()
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * math.sqrt(variance / n)
    for z in (1.0, 2.0, 3.0):
        p = math.erfc(z / math.sqrt(2))
        assert abs((x.abs() > z).double().mean() - p) < 5 * math.sqrt(p / n)


def test_normal_is_uncorrelated_across_pixels_images_steps_and_seeds() -> None:
    index = torch.arange(4000)
    a = normal(0, "a", 0, index, (64,)).double()
    covariance = a.T @ a / len(a)
    assert (covariance - torch.eye(64)).abs().max() < 6 / math.sqrt(len(a))
    n = a.numel()
    for other in (
        a.roll(1, 0),
        normal(0, "a", 1, index, (64,)),
        normal(1, "a", 0, index, (64,)),
        normal(0, "b", 0, index, (64,)),
    ):
        assert abs((a * other.double()).mean()) < 5 / math.sqrt(n)


def test_image_depends_on_its_index_alone() -> None:
    whole = normal(3, "x", 7, torch.arange(10), (1, 3, 3))
    assert torch.equal(whole[4:6], normal(3, "x", 7, torch.tensor([4, 5]), (1, 3, 3)))
    assert torch.equal(uniform(3, "x", 7, torch.arange(10))[9:], uniform(3, "x", 7, torch.tensor([9])))


def test_uniform_is_flat_and_half_open() -> None:
    u = uniform(0, "u", 0, torch.arange(100_000))
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 95  # chi-square, 49 degrees of freedom: p < 1e-4


def test_splitmix_reference() -> None:
    """The generator's published output: Steele, Lea & Flood's SplitMix64 from state 0 begins with these words."""
    from ddpm.runtime.randomness import _GOLDEN, _mix

    words = _mix(torch.arange(1, 4) * _GOLDEN)
    assert [w % 2**64 for w in words.tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_permutation_and_key() -> None:
    p = permutation(0, "order", 0, 1000)
    assert torch.equal(p.sort().values, torch.arange(1000))
    assert torch.equal(p, permutation(0, "order", 0, 1000)) and not torch.equal(
        p, permutation(0, "order", 1, 1000)
    )
    keys = {key(seed, stream, step) for seed in range(20) for stream in "ab" for step in range(20)}
    assert len(keys) == 800


def test_generators_are_seeded_as_by_manual_seed() -> None:
    torch.manual_seed(-(2**63))
    expected = torch.rand(5)
    seed_generators(-(2**63), torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


def test_triton_draws_the_same_numbers() -> None:
    """Uniform ones bit for bit. By Triton's interpreter, which has to be chosen before the module is imported."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "tests.runtime.triton_worker"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
