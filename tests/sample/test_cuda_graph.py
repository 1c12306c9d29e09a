"""Network calls as a CUDA graph replays them: here on the CPU, with a graph that runs what was captured again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ddpm.config.choices import choose_sampler
from ddpm.sample import sampling
from ddpm.sample.cuda_graph import CapturedCalls
from ddpm.sample.model import Guidance, Model
from ddpm.train.state import prepare
from tests.train.test_training import CPU, config, tiny_data


class Graph:
    """In place of torch.cuda's graph and the context that captures one: `again` runs the calls anew."""

    made: ClassVar[list["Graph"]] = []
    error: str = ""
    again: Callable[[], None]

    def __init__(self, graph: "Graph | None" = None, **options: str) -> None:
        if graph is None:
            Graph.made.append(self)
            self.replays = 0

    def __enter__(self) -> None:
        if Graph.error:
            raise RuntimeError(Graph.error)

    def __exit__(self, *error: object) -> None: ...

    def replay(self) -> None:
        self.replays += 1
        self.again()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(Graph, "error", "")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    capture = CapturedCalls._capture

    def captured(self: CapturedCalls, shapes: Any, given: list[Tensor]) -> None:
        capture(self, shapes, given)
        if (found := self.calls[shapes]) is not None:
            graph, inputs, output = found
            y = inputs[2] if len(inputs) > 2 else None
            graph.again = lambda: output.copy_(self.network(inputs[0], inputs[1], y))  # type: ignore[attr-defined]

    monkeypatch.setattr(CapturedCalls, "_capture", captured)


def model() -> Model:
    run = prepare(config("model.conditional=true"), tiny_data(), CPU)
    for number, parameter in enumerate(run.averages):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
    return Model(run.ema, run.schedule, run.config, run.facts, CPU)


def drawn(own: Model, monkeypatch: pytest.MonkeyPatch, *, captured: bool, size: int, scale: float) -> Tensor:
    plain = sampling.denoiser

    def with_graph(*parts: Any) -> Any:
        made = plain(*parts)
        made.network = CapturedCalls(own.network) if captured else made.network
        return made

    sampler, every = choose_sampler("dpmpp_2m", {"num_steps": 6}), torch.arange(5)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "denoiser", with_graph)
        steps = sampling.generation(own, sampler, every, 0)
        how: Any = (steps, size, lambda at, step: None, lambda left, size: None)
        return sampling.draw_all(own, sampler, Guidance(scale), every % 3, every, *how)[0]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_replayed_calls_draw_the_same_images(
    monkeypatch: pytest.MonkeyPatch, precision: torch.dtype, scale: float
) -> None:
    own = replace(model(), precision=precision)
    expected = drawn(own, monkeypatch, captured=False, size=2, scale=scale)
    assert torch.equal(drawn(own, monkeypatch, captured=True, size=2, scale=scale), expected)
    assert [graph.replays for graph in Graph.made] == [5, 5, 5], (
        "one graph a chunk; its first call is as it is"
    )
    assert expected.std() > 0.1 and not torch.equal(expected[0], expected[3])


def test_a_capture_that_fails_is_said_once_and_changes_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    own = model()
    expected = drawn(own, monkeypatch, captured=False, size=5, scale=1.0)
    Graph.error = "operation not permitted when stream is capturing\nand much more"
    with pytest.warns(RuntimeWarning) as said:
        found = drawn(own, monkeypatch, captured=True, size=5, scale=1.0)
    assert torch.equal(found, expected) and len(said) == len(Graph.made) == 1
    assert str(said[0].message) == (
        "the network's calls are not captured: operation not permitted when stream is capturing"
    )
