"""Steps from tables on the device, as a CUDA graph takes them: here on the CPU, where the graph itself is left out."""

import pytest
import torch

from ddpm.data.batches import Batches
from ddpm.errors import UserError
from ddpm.runtime.world import World
from ddpm.train import cuda_graph
from ddpm.train.cuda_graph import CapturedSteps
from ddpm.train.state import TrainState, prepare
from ddpm.train.step import train_step
from tests.train.test_training import CPU, config, tiny_data

SETTINGS = [
    [],
    ["optimizer=muon", "model.channels=[32,32]", "model.conditional=true", "objective.timesteps=stratified"],
    ["objective.timesteps=loss_aware", "model.dropout=0.2", "trainer.accumulate=3"],
    ["objective.timesteps=logit_normal", "objective.learned_variance=true", "optimizer.decay=cosine"],
]


def trained(run: TrainState, *, tables: bool, steps: int = 8) -> list[float]:
    batches = Batches(tiny_data().train, run.config.trainer.batch_size, run.config.seed, CPU)
    from_tables, losses = CapturedSteps(run, batches), []
    for run.step in range(steps):
        loss, _ = from_tables.step() if tables else train_step(run, *batches.batch(run.step))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("overrides", SETTINGS, ids=str)
def test_tables_train_as_the_host_does(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    """The same images, noise, times and masks; rates and averages to the rounding of float32."""
    monkeypatch.setattr(cuda_graph, "ROWS", 3)  # over the border of two tables, and of two epochs
    plain, other = (prepare(config(*overrides), tiny_data(), CPU) for _ in range(2))
    expected, found = trained(plain, tables=False), trained(other, tables=True)
    assert found[0] == expected[0] and found == pytest.approx(expected, rel=1e-4)
    for a, b in zip([*plain.parameters, *plain.averages], [*other.parameters, *other.averages], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert len(set(expected)) == len(expected)


def test_a_loss_that_is_not_finite_is_noted_with_its_step() -> None:
    run = prepare(config("optimizer.lr=1e30", "trainer.grad_clip=1e30"), tiny_data(), CPU)
    trained(run, tables=True, steps=6)
    step, loss, norm = run.first_nonfinite.tolist()
    assert 1 < step <= 6 and not (torch.tensor([loss, norm]).isfinite().all())


def test_what_cannot_be_captured() -> None:
    batches = Batches(tiny_data().train, 12, 0, CPU)
    for overrides, reason in (
        (["trainer.accumulate=2"], "is split into parts"),
        (["trainer.precision=fp16"], "fp16"),
        ([], "there is no GPU"),
        (["trainer.cuda_graph=false"], "trainer.cuda_graph=false"),
    ):
        run = prepare(config(*overrides), tiny_data(), CPU)
        assert reason in CapturedSteps(run, batches).obstacle
        if overrides != ["trainer.cuda_graph=false"]:
            run.config = config(*overrides, "trainer.cuda_graph=true")
            with pytest.raises(UserError, match=r"trainer.cuda_graph=true: steps cannot be captured: "):
                CapturedSteps(run, batches)
    run = prepare(config("trainer.compile=true"), tiny_data(), torch.device("cpu"))
    run.device = torch.device("cuda")
    assert cuda_graph._obstacle(run) == "the network is compiled (trainer.compile=true)"
    run.config = config("trainer.compile=true", "trainer.cuda_graph=true")
    with pytest.raises(UserError, match=r"^trainer.cuda_graph=true: .*: the network is compiled"):
        cuda_graph._obstacle(run)
    run = prepare(config(), tiny_data(), torch.device("cpu"))
    run.world = World(0, 2)
    assert "several processes" in CapturedSteps(run, batches).obstacle


@pytest.mark.parametrize("setting", ["auto", "true"])
def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """By itself the training goes on without, and says so; asked for it ends with one line."""
    run = prepare(config(), tiny_data(), CPU)
    batches = Batches(tiny_data().train, run.config.trainer.batch_size, 0, CPU)
    steps = CapturedSteps(run, batches)
    run.config, steps.obstacle = config(f"trainer.cuda_graph={setting}"), ""

    class Graph:
        def __init__(self, *graph: object) -> None: ...

        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    for run.step in range(cuda_graph.WARM_UP):
        steps.step()
    run.step += 1
    if setting == "true":
        with pytest.raises(
            UserError, match="cannot be captured: operation not permitted when stream is capturing;"
        ):
            steps.step()
        return
    loss, _ = steps.step()
    assert loss.isfinite() and steps.graph is None
    assert steps.take_note().endswith("not captured: operation not permitted when stream is capturing")
    assert steps.take_note() == ""
