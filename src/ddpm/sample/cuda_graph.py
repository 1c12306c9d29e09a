"""Network calls of a sampling on a GPU, captured as CUDA graphs: one launch in place of some hundreds."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class CapturedCalls:
    """A network that runs its first call for inputs of some shapes as it is, and replays a graph from the second on.

    The graph reads autocast's casts of the weights, so it must end where they do: with `sampling.drawing`. Where
    capturing fails, one warning says why, and the network runs as it is.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network, self.failed = network, False
        self.calls = dict[object, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor] | None]()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        given = [x, t] if y is None else [x, t, y]
        shapes = (x.shape, x.stride(), len(given))
        if not self.failed and shapes in self.calls and self.calls[shapes] is None:
            self._capture(shapes, given)
        captured = self.calls.setdefault(shapes, None)
        if captured is None:
            return self.network(x, t, y)
        graph, inputs, output = captured
        for own, new in zip(inputs, given, strict=True):
            own.copy_(new)
        graph.replay()
        return output.clone()  # the next replay writes there

    def _capture(self, shapes: object, given: list[Tensor]) -> None:
        inputs = [x.clone() for x in given]
        y = inputs[2] if len(inputs) > 2 else None
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may draw at the same time
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.network(inputs[0], inputs[1], y)
        except Exception as error:  # whatever CUDA, or a network of a user's own, raises while capturing
            self.failed = True
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"the network's calls are not captured: {reason}", RuntimeWarning, stacklevel=2)
            return
        self.calls[shapes] = graph, inputs, output
