"""Out of memory: one line with what would have fitted, and smaller chunks where nothing else changes."""

import gc
import math
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.cli import sample_run
from ddpm.config.choices import Component, choose_sampler
from ddpm.diffusion.samplers import Step
from ddpm.diffusion.schedules import Level
from ddpm.errors import UserError
from ddpm.runtime import memory
from ddpm.sample import sampling
from ddpm.sample.model import Guidance, Model, denoiser
from ddpm.train import interruptible
from ddpm.train.state import prepare
from tests.train.test_training import CPU, config, tiny_data

GIB = 2**30
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_the_batch_that_fits_is_found_from_two_small_ones() -> None:
    """A network of 1 GiB with 10 MiB an image: (0.9 · 11 GiB - 1 GiB) / 10 MiB."""

    def peak(n: int) -> int:
        return GIB + n * 10 * 2**20

    assert memory.largest_batch(peak, 11 * GIB, 10_000) == pytest.approx(911, abs=1)
    assert memory.largest_batch(peak, 11 * GIB, 64) == 32  # the line is wrong: 64 has just failed
    assert (
        memory.largest_batch(peak, 11 * GIB, 911) == 455 and memory.largest_batch(peak, 11 * GIB, 912) == 911
    )
    assert memory.largest_batch(peak, 11 * GIB, 2) == 1 and memory.largest_batch(peak, 11 * GIB, 1) is None
    assert memory.largest_batch(peak, GIB // 2, 64) == 1


def test_where_not_one_image_fits_there_is_no_batch() -> None:
    def peak(n: int) -> int:
        raise OUT_OF_MEMORY

    def broken(n: int) -> int:
        raise RuntimeError("something else")

    assert memory.largest_batch(peak, GIB, 64) is None
    with pytest.raises(RuntimeError, match="something else"):
        memory.largest_batch(broken, GIB, 64)


def test_only_lack_of_memory_counts_as_such() -> None:
    assert memory.is_exhausted(OUT_OF_MEMORY) and memory.is_exhausted(MemoryError())
    assert memory.is_exhausted(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"))
    for words in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
        "GET was unable to find an engine to",
    ):
        assert memory.is_exhausted(RuntimeError(words))
    assert not memory.is_exhausted(RuntimeError("shape mismatch")) and not memory.is_exhausted(ValueError())


def test_training_says_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is a fake that holds 20 MiB and takes 1 MiB an image; trial and message are real."""
    run = prepare(config("trainer.batch_size=64"), tiny_data(), CPU)
    run.device = torch.device("cuda")
    taken: list[int] = []
    trial = train_trial(run)
    monkeypatch.setattr("ddpm.train.loop.trial", lambda run, n: (taken.append(n), trial(n)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**20, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: taken[-1] * 2**20)
    assert str(interruptible._out_of_memory(run)) == (
        "out of memory on cuda with trainer.batch_size=64 trainer.accumulate=1; about 18 images fit at once: "
        "trainer.accumulate=4 keeps the batch, trainer.batch_size=18 makes a smaller one"
    )
    assert taken == [1, 4]


def train_trial(run: Any) -> Any:
    """The real trial, on the CPU."""
    from ddpm.train.loop import trial

    def on_cpu(n: int) -> None:
        device, run.device = run.device, CPU
        trial(run, n)
        run.device = device

    return on_cpu


@pytest.fixture
def model(tmp_path: Path) -> Model:
    run = prepare(config("schedule.num_timesteps=10"), tiny_data(), CPU)
    return Model(run.ema, run.schedule, run.config, run.facts, CPU)


def drawn(model: Model, n: int, batch_size: int) -> torch.Tensor:
    from ddpm.config import hydra
    from ddpm.config.schema import SampleConfig, check
    from ddpm.sample import tasks

    overrides = ["ckpt=x", f"n={n}", f"batch_size={batch_size}", "sampler=ddim", "sampler.num_steps=3"]
    wanted = check(SampleConfig, hydra.compose("sample", overrides))
    return sample_run.draw(wanted, model, tasks.make(wanted, model)).x


def test_sampling_halves_its_chunk_and_draws_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = drawn(model, 11, 11)
    sizes, forward = [], model.network.forward

    def small(x: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) > 3:
            raise OUT_OF_MEMORY
        return forward(x, *others)

    monkeypatch.setattr(model.network, "forward", small)
    assert (drawn(model, 11, 11) - whole).abs().max() < 1e-5
    assert sorted(set(sizes)) == [2, 3, 5, 11] or sorted(set(sizes)) == [1, 2, 5, 11]
    assert "batch_size=5, which changes no image" in capsys.readouterr().out
    monkeypatch.setattr(model.network, "forward", lambda *_: (_ for _ in ()).throw(OUT_OF_MEMORY))
    with pytest.raises(UserError, match="even for 1 image at a time"):
        drawn(model, 2, 2)


def test_samples_that_are_not_finite_are_named_with_their_step(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, forward, calls = torch.tensor([4, 9, 17]), model.network.forward, []

    def spoilt(x: torch.Tensor, *others: Any) -> torch.Tensor:
        out = forward(x, *others).clone()
        calls.append(len(calls))
        if len(calls) == 2:
            out[1] = float("nan")
        return out

    monkeypatch.setattr(model.network, "forward", spoilt)
    sampler = Component("ddim", {"num_steps": 4, "spacing": "linspace", "rho": 7.0, "clip": "clip"})
    sampler = Component("ddim", {**sampler.params, "dynamic_percentile": 0.99, "eta": 0.0})
    denoise = denoiser(model, sampler, None, Guidance())
    with pytest.raises(UserError, match=r"not finite from sampling step 2 of 4 on: image 9;"):
        sampling.last(sampling.finite(sampling.draw(model, sampler, denoise, index, 0), index))


@pytest.mark.slow
def test_no_step_of_sampling_leaves_anything_behind() -> None:
    """Nothing that grows with their number; and of images that break at different steps all are named."""

    def steps() -> Iterator[Step]:
        for number in range(1, 41):
            x = torch.zeros(4, 1, 2, 2)
            x[1, 0, 0, 1] = math.inf if number == 30 else 0.0  # for one step only
            x[2] = math.nan if number >= 20 else 0.0
            yield Step(x, x, level)

    level, index, alive = Level(0, 1.0, 0.0), torch.tensor([4, 9, 17, 20]), []
    with pytest.raises(UserError, match=r"not finite from sampling step 20 of 40 on: image 9, 17;"):
        for _ in sampling.finite(steps(), index):
            alive.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
    assert len(alive) == 40 and alive[-1] - alive[1] < 10


def test_weights_are_cast_to_low_precision_once(model: Model) -> None:
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._to_copy.default and id(args[0]) in weights
            return func(*args, **(kwargs or {}))

    model.network.requires_grad_()  # as that of a checkpoint
    weights = {id(parameter) for parameter in model.network.parameters()}

    low, places, guidance = replace(model, precision=torch.bfloat16), torch.arange(2), Guidance()

    def casts(num_steps: int) -> int:
        sampler = choose_sampler("ddim", {"num_steps": num_steps})
        steps = sampling.generation(low, sampler, places, 0)
        with Casts() as seen:
            sampling.draw_all(
                low, sampler, guidance, None, places, steps, 2, lambda *_: None, lambda *_: None
            )
        return seen.count

    assert casts(1) == casts(5) > 0


def test_memory_that_is_freed_is_kept_where_glibc_is() -> None:
    """What that gains in a step, benchmarks/bench_recipe.py measures: it depends on where blocks happen to lie."""
    assert memory.keep_freed() == (platform.libc_ver()[0] == "glibc")
