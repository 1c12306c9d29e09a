"""Nothing in a step waits for the GPU: traced on fake tensors of a fake one, which know no number they could hand over.

What is left to a real one, where benchmarks/bench_gpu.py looks: kernels that wait inside themselves.
"""

from collections.abc import Callable

import pytest
import torch
from benchmarks.fake_gpu import GPU, NoKernel, Waits, to_gpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm.config.choices import choose_sampler
from ddpm.data.batches import Batches
from ddpm.networks.kernels import group_norm_triton
from ddpm.runtime import randomness_triton
from ddpm.sample import sampling
from ddpm.sample.model import Guidance, Model, denoiser, levels
from ddpm.train import cuda_graph, optimizers
from ddpm.train.state import prepare
from tests.train.test_training import CPU, config, tiny_data


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: torch.where(x > 0, x, torch.zeros(())),
    ],
)
def test_waiting_is_seen(work: Callable[[Tensor], object]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, device=GPU)
        try:
            with Waits() as waits:
                work(x)
        except RuntimeError:  # the size of x[x > 0]
            return
    assert waits.found


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in (
        (group_norm_triton, ("_forward", "_backward")),
        (randomness_triton, ("_normal", "_uniform")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, NoKernel())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "optimizer=muon",
            "model.channels=[8,32]",
            "model.conditional=true",
            "objective.timesteps=stratified",
        ],
        ["objective.timesteps=loss_aware", "trainer.accumulate=3", "model.dropout=0.1"],
        [
            "objective.timesteps=logit_normal",
            "objective.learned_variance=true",
            "trainer.channels_last=false",
        ],
    ],
    ids=str,
)
def test_no_training_step_waits(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    """Over the border of two epochs, too."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # only a GPU's driver can
    fused = optimizers.adamw  # which knows no fake tensors as learning rate
    monkeypatch.setattr(optimizers, "adamw", lambda *all_, lr, **more: fused(*all_, lr=1e-3, **more))
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    data = tiny_data()
    run = prepare(config(*overrides), data, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(run)
        batches = Batches(data.train, 12, 0, GPU)
        steps = cuda_graph.CapturedSteps(run, batches)
        steps.obstacle = "no GPU to capture on"
        monkeypatch.setattr(steps, "_in_side_stream", steps._step)
        with Waits() as waits:
            for run.step in range(5):
                loss, _ = steps.step()
                run.loss_sum += torch.where(loss.isfinite(), loss, 0)
    assert waits.found == []


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_no_sampling_step_waits(name: str) -> None:
    run = prepare(config("model.conditional=true"), tiny_data(), CPU)
    model = Model(run.ema, run.schedule, run.config, run.facts, GPU)
    chosen = choose_sampler(name, {"num_steps": 4})
    path = levels(model, chosen)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(run)
        index = torch.arange(3, device=GPU)
        x = torch.empty(3, *model.shape, device=GPU)
        denoise = denoiser(model, chosen, index, Guidance(2.0))
        steps = sampling.finite(sampling.run(model, chosen, denoise, path, x, index, 0), torch.arange(3))
        with Waits() as waits:
            assert [next(steps).level for _ in path[1:]] == path[1:]
    assert waits.found == []
