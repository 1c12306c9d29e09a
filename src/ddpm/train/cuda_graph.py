"""Training steps on a GPU, captured once as a CUDA graph: one launch a step in place of a thousand and more.

All that differs between two steps is read from tables on the device, at a row that a counter there names: where its
images are, the keys of its random numbers, the learning rate, the weight of the average. The host writes the tables
for many steps at once. Without the graph the same tables serve the same operations, so both give the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.data.batches import Batches
from ddpm.errors import UserError
from ddpm.io.images import normalise
from ddpm.runtime.memory import is_exhausted
from ddpm.runtime.randomness import key
from ddpm.train.state import TrainState
from ddpm.train.step import StepNumbers, host_numbers, seed_network, update

STREAMS = ("timesteps", "eps", "label_dropout")  # of random numbers, that `update` draws from
ROWS = 256  # steps that the tables hold
WARM_UP = 3  # steps before the capture, in which algorithms are chosen and the optimizer's state is made


class Tables(NamedTuple):
    """A row for each step ahead, on the device of the training."""

    positions: Tensor  # int64 (ROWS, B): the batch's images
    keys: Tensor  # int64 (ROWS, streams)
    numbers: Tensor  # float32 (ROWS, 3): learning rate, weight of the average, number of the step
    row: Tensor  # int64 (1,): that of the next step


class CapturedSteps:
    """The steps of one run, in order. `trainer.cuda_graph` says whether to capture: auto, true or false."""

    def __init__(self, run: TrainState, batches: Batches) -> None:
        self.run, self.batches = run, batches
        device, size = run.device, batches.batch_size
        self.tables = Tables(
            torch.zeros(ROWS, size, dtype=torch.int64, device=device),
            torch.zeros(ROWS, len(STREAMS), dtype=torch.int64, device=device),
            torch.zeros(ROWS, 3, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        self.first = -ROWS  # the step of the tables' first row
        self.taken = 0  # steps so far
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: tuple[Tensor, Tensor] | None = None  # what the graph writes: loss and gradient norm
        self.obstacle = _obstacle(run)
        self.note = ""

    def step(self) -> tuple[Tensor, Tensor]:
        """Take the step that `run.step` names. Returns the loss and the gradient's norm, 0-dim, until the next one."""
        if not self.first <= self.run.step < self.first + ROWS:
            self._fill()
        seed_network(self.run)
        if self.graph is None and not self.obstacle and self.taken >= WARM_UP:
            self._capture()
        self.taken += 1
        if self.graph is not None:
            assert self.result is not None
            self.graph.replay()
            return self.result
        return self._in_side_stream() if self.taken <= WARM_UP else self._step()

    def take_note(self) -> str:
        """Return the line for the user, once."""
        note, self.note = self.note, ""
        return note

    def _step(self) -> tuple[Tensor, Tensor]:
        """Read a row, update, and advance the counter, all on the device."""
        positions, keys, numbers = (x.index_select(0, self.tables.row)[0] for x in self.tables[:3])
        x_0 = normalise(self.batches.images[positions])
        y = None if self.batches.labels is None else self.batches.labels[positions]
        lr, ema_weight, number = numbers.unbind()
        streams = dict(zip(STREAMS, keys.unbind(), strict=True))
        result = update(self.run, x_0, y, StepNumbers(streams, lr, ema_weight, number))
        self.tables.row.add_(1)
        return result

    def _in_side_stream(self) -> tuple[Tensor, Tensor]:
        """Take a step on another stream: autograd remembers the default stream, which no capture allows."""
        if self.run.device.type != "cuda":
            return self._step()
        own, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(own)
        with torch.cuda.stream(side):
            result = self._step()
        own.wait_stream(side)
        return result

    def _capture(self) -> None:
        """Capture the next step without taking it. Raises UserError where it was asked for and does not work."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = self._step()
        except Exception as error:  # whatever CUDA, or a network of a user's own, raises while capturing
            asked = self.run.config.trainer.cuda_graph == "true"
            if asked and is_exhausted(error):
                raise
            self.obstacle = str(error).strip().partition("\n")[0]
            if asked:
                raise UserError(
                    f"trainer.cuda_graph=true: the step cannot be captured: {self.obstacle}; trainer.cuda_graph=false "
                    "goes without"
                ) from None
            self.note = f"trainer.cuda_graph=auto: the step is not captured: {self.obstacle}"
            del graph
            torch.cuda.empty_cache()
            return
        self.graph, self.result = graph, result

    def _fill(self) -> None:
        """Write the tables for the steps from `run.step` on."""
        run, size, first = self.run, self.batches.batch_size, self.run.step
        rows = [host_numbers(run, step) for step in range(first, first + ROWS)]
        keys = [[key(run.config.seed, s, step) for s in STREAMS] for step in range(first, first + ROWS)]
        numbers = [[now.lr, now.ema_weight, now.number] for now in rows]
        positions = self.batches.positions(first * size, (first + ROWS) * size)
        self.tables.positions.copy_(positions.view(ROWS, size))
        for table, values in ((self.tables.keys, keys), (self.tables.numbers, numbers)):
            host = torch.tensor(values, dtype=table.dtype)
            table.copy_(host.pin_memory() if table.is_cuda else host, non_blocking=True)
        self.tables.row.zero_()
        self.first = first


def _obstacle(run: TrainState) -> str:
    """Return why steps are not captured, or "". Raises UserError for trainer.cuda_graph=true where they cannot be."""
    setting, trainer = run.config.trainer.cuda_graph, run.config.trainer
    if setting == "false":
        return "trainer.cuda_graph=false"
    reasons = {
        "the batch is split into parts (trainer.accumulate)": trainer.accumulate > 1,
        "fp16 scales the loss by a number of the host": run.scaler.is_enabled(),
        "several processes train together": run.world.size > 1,
        "there is no GPU": run.device.type != "cuda",
        # measured: illegal memory access
        "the network is compiled (trainer.compile=true)": trainer.compile == "true",
    }
    obstacle = next((reason for reason, holds in reasons.items() if holds), "")
    if obstacle and setting == "true":
        raise UserError(f"trainer.cuda_graph=true: steps cannot be captured: {obstacle}")
    return obstacle
