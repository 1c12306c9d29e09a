"""Timesteps: the distribution each promises, independence of how a batch is split, and unbiased losses."""

import math

import pytest
import torch

from ddpm.diffusion.timesteps import HISTORY, TIMESTEPS, empty_history, updated_history

T = 50


def filled_history() -> torch.Tensor:
    noise = torch.rand(T, HISTORY, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0.1, 3, T)[:, None]


@pytest.mark.parametrize("name", TIMESTEPS)
@pytest.mark.parametrize("num_timesteps", [1, 2, T, 1000])
def test_any_part_of_a_batch_draws_what_the_whole_draws(name: str, num_timesteps: int) -> None:
    history = empty_history(num_timesteps, "cpu").fill_(1.0)
    index = torch.arange(37)
    t, weight = TIMESTEPS[name](5, 7, index, 37, num_timesteps, history=history)
    assert (t.dtype, weight.dtype) == (torch.int64, torch.float32)
    assert t.min() >= 0 and t.max() < num_timesteps
    parts = [TIMESTEPS[name](5, 7, i, 37, num_timesteps, history=history) for i in index.flip(0).split(5)]
    assert torch.equal(torch.cat([t for t, _ in parts]).flip(0), t)
    assert torch.equal(torch.cat([weight for _, weight in parts]).flip(0), weight)
    if num_timesteps > 2:
        assert not torch.equal(TIMESTEPS[name](5, 8, index, 37, num_timesteps, history=history)[0], t)


def test_uniform_is_uniform() -> None:
    n = 100_000
    t, weight = TIMESTEPS["uniform"](0, 0, torch.arange(n), n, T)
    assert ((torch.bincount(t, minlength=T) - n / T) ** 2 / (n / T)).sum() < 95  # 49 degrees: p < 1e-4
    assert (weight == 1).all()


@pytest.mark.parametrize(("batch_size", "num_timesteps"), [(50, 50), (25, 50), (128, 1000), (333, 1000)])
def test_stratified_puts_one_into_each_slice(batch_size: int, num_timesteps: int) -> None:
    for step in range(20):
        t, _ = TIMESTEPS["stratified"](0, step, torch.arange(batch_size), batch_size, num_timesteps)
        place = torch.arange(batch_size)
        assert (t >= place * num_timesteps // batch_size).all()
        assert (t <= ((place + 1) * num_timesteps - 1) // batch_size).all()
    if batch_size == num_timesteps:
        assert torch.equal(t, place)


def test_stratified_is_uniform_over_many_steps() -> None:
    steps = [TIMESTEPS["stratified"](0, step, torch.arange(16), 16, T)[0] for step in range(5000)]
    counts = torch.bincount(torch.cat(steps), minlength=T)
    n = 16 * 5000
    assert ((counts - n / T) ** 2 / (n / T)).sum() < 95


def test_logit_normal_has_its_quantiles() -> None:
    n = 100_000
    t, _ = TIMESTEPS["logit_normal"](
        0, 0, torch.arange(n), n, 1000, logit_normal_mean=0.5, logit_normal_std=0.8, min_snr_gamma=5.0
    )
    for z, below in ((-1.0, 0.158655), (0.0, 0.5), (1.0, 0.841345)):
        cut = 1000 / (1 + math.exp(-(0.5 + 0.8 * z)))
        assert abs((t < cut).double().mean() - below) < 5 * math.sqrt(below * (1 - below) / n) + 0.001


def test_loss_aware_is_unbiased_and_follows_the_losses() -> None:
    n, history = 400_000, filled_history()
    t, weight = TIMESTEPS["loss_aware"](0, 0, torch.arange(n), n, T, history=history)
    importance = history.double().square().mean(1).sqrt()
    share = 0.999 * importance / importance.sum() + 0.001 / T
    counts = torch.bincount(t, minlength=T)
    assert ((counts - n * share) ** 2 / (n * share)).sum() < 95
    torch.testing.assert_close(weight.double(), 1 / (T * share[t]), rtol=1e-5, atol=0)
    f = torch.linspace(1, 2, T).double().exp()  # any function of t has the mean it has under uniform times
    values = weight * f[t]
    assert abs(values.mean() - f.mean()) < 5 * values.std() / math.sqrt(n)
    least = TIMESTEPS["uniform"](0, 0, torch.arange(n), n, T)[0]
    mean_loss = importance[:, None]
    assert (weight.double() * mean_loss[t, 0]).std() < 0.1 * mean_loss[least, 0].std()  # what it is for


def test_loss_aware_is_uniform_until_every_time_is_known() -> None:
    history = filled_history()
    history[3, 0] = torch.nan
    t, weight = TIMESTEPS["loss_aware"](0, 0, torch.arange(20_000), 20_000, T, history=history)
    torch.testing.assert_close(weight, torch.ones_like(weight))
    assert ((torch.bincount(t, minlength=T) - 400) ** 2 / 400).sum() < 95


def test_history_keeps_the_last_ten_of_each_time_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    history = empty_history(6, "cpu")
    naive: list[list[float]] = [[] for _ in range(6)]
    for _ in range(12):
        t = torch.randint(0, 6, (40,), generator=generator) ** 2 // 6  # some times far more often than others
        loss = torch.rand(40, generator=generator)
        loss[5], loss[6] = torch.nan, torch.inf
        before = history.clone()
        new = updated_history(history, t, loss)
        assert torch.equal(history.nan_to_num(-1), before.nan_to_num(-1))  # a pure function
        history = new
        for at, value in zip(t.tolist(), loss.tolist(), strict=True):
            if math.isfinite(value):
                naive[at].append(value)
        wanted = [[math.nan] * (HISTORY - len(x[-HISTORY:])) + x[-HISTORY:] for x in naive]
        torch.testing.assert_close(history, torch.tensor(wanted), equal_nan=True, rtol=0, atol=0)
    assert history.isnan().any(dim=1).tolist() == [len(x) < HISTORY for x in naive]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TIMESTEPS)
def test_on_a_gpu_nothing_waits_and_all_is_deterministic(name: str) -> None:
    index, history = torch.arange(64, device="cuda"), filled_history().cuda()
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        t, weight = TIMESTEPS[name](0, 0, index, 64, T, history=history)
        history = updated_history(history, t, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    on_cpu, _ = TIMESTEPS[name](0, 0, index.cpu(), 64, T, history=filled_history())
    assert (t.cpu() == on_cpu).double().mean() > 0.95  # but for the rounding of cos, exp and of the shares
    assert history.isfinite().all()
