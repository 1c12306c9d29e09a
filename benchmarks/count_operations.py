"""Count what a step on a GPU costs the host, on a CPU: operations, layouts lost, waits, and time beside the network's.

    python benchmarks/count_operations.py [--save FILE]

For the networks and settings of `unet_small` and `mnist_gpu`, each step as a GPU gets it:

    operations   that compute (views and allocations do not), forward, backward and update, by the dispatcher; kernels
                 of ours in Triton, which compute nothing here, are counted at their launch. A list of tensors is one.
    layouts      lost: convolutions, forward and backward, of which an input has no channels side by side in memory
    waits        for the GPU, on fake tensors of a fake one: in a training step, and in a chunk of a sampling
    host ms      least CPU time of one thread in small sizes (8×8 pixels, 8 channels, AdamW): of the network's own
                 forward and backward pass, of a whole step, and of one where a CUDA graph, here an empty one, takes all
                 kernels
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fake_gpu import GPU, NoKernel, Waits, to_gpu
from gpu_steps import begun, repeat_steps
from timing import save
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.config.choices import choose_sampler
from ddpm.data.batches import Batches
from ddpm.data.dataset import Split
from ddpm.networks import unet
from ddpm.networks.kernels import group_norm, group_norm_triton
from ddpm.runtime import randomness, randomness_triton
from ddpm.sample import sampling as sampling_module
from ddpm.sample.model import Guidance, Model, denoiser, levels
from ddpm.sample.sampling import draw, draw_all, drawing, generation
from ddpm.train import optimizers
from ddpm.train.cuda_graph import CapturedSteps
from ddpm.train.step import autocast

CPU = torch.device("cpu")
RECIPES = {
    "unet_small": ["dataset=mnist", "model=unet_small", "trainer.precision=bf16"],
    "mnist_gpu": ["experiment=mnist_gpu"],
}
SMALL = ["model.channels=[8,8,8]", "model.head_dim=8", "model.norm_groups=4", "optimizer=adamw"]
SAMPLERS = {"dpmpp_2m": 10, "ddpm": 10}
FREE = (
    "prim::",
    "profiler::",
    "aten::empty",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::lift",
)
ROUNDS, STEPS = 7, 8


class Operations(TorchDispatchMode):
    """Counts, inside of it, operations that compute, and convolutions that do not see channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.lost, self.number = Counter[str](), 0, 0

    def __enter__(self) -> "Operations":
        NoKernel.launches = 0
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.number = self.counts.total() + NoKernel.launches

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if not function.is_view and not name.startswith(FREE):
            self.counts[name] += 1
        if name in ("aten::convolution", "aten::convolution_backward"):
            images = [x for x in args[:3] if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 1]
            self.lost += any(x.stride(1) != 1 for x in images)
        return function(*args, **(kwargs or {}))


class Zeros:
    """In place of a kernel that draws numbers: one operation, as its launch is, that draws zeros."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Tensor]:
        return lambda out, *tensors, **sizes: out.zero_()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let tensors of the CPU go the ways of a GPU's: Triton's kernels, which do nothing, and fused attention."""
    with (
        patch.multiple(group_norm_triton, _forward=NoKernel(), _backward=NoKernel()),
        patch.multiple(randomness_triton, _normal=Zeros(), _uniform=Zeros()),
        patch.object(randomness, "_kernels", lambda index: randomness_triton),
        patch.object(group_norm, "_kernels", lambda device_type: group_norm_triton),
        patch.object(group_norm, "missing", lambda device_type: ""),
        patch.object(unet, "_attend", scaled_dot_product_attention),
    ):
        yield


def training(recipe: list[str]) -> dict[str, Any]:
    """Operations and layouts of one training step after the first, as `fit` makes it on a GPU."""
    with as_on_a_gpu():
        run, batches = begun([*recipe, "trainer.batch_size=2"], CPU, 64)
        steps = CapturedSteps(run, batches)
        repeat_steps(steps, run, batches, 1)
        with Operations() as found:
            repeat_steps(steps, run, batches, 1)
        with Operations() as network:
            _bare(run, *batches.batch(0))
    return {
        "operations": found.number,
        "of them the network's, forward and backward": network.number,
        "layouts lost": found.lost,
        "most frequent": dict(found.counts.most_common(12)),
    }


def _bare(run: Any, x: Tensor, y: Tensor | None) -> None:
    """Run the network's forward and backward pass."""
    for parameter in run.parameters:
        parameter.grad = None
    labels = y if run.config.model.params["conditional"] else None
    x = x.contiguous(memory_format=torch.channels_last)
    with autocast(run):
        output = run.network(x, torch.zeros(len(x), dtype=torch.int64), labels)
    output.float().mean().backward()


def sampling(recipe: list[str]) -> dict[str, Any]:
    """Operations of a step of each sampler, and of the network call in it."""
    found = {}
    for name, num_steps in SAMPLERS.items():
        with as_on_a_gpu():
            run, _ = begun([*recipe, "trainer.batch_size=2"], CPU, 64)
            model = Model(run.ema, run.schedule, run.config, run.facts, CPU, precision=torch.bfloat16)
            y = torch.zeros(2, dtype=torch.int64) if model.conditional else None
            sampler, index = choose_sampler(name, {"num_steps": num_steps}), torch.arange(2)
            denoise = denoiser(model, sampler, y, Guidance())
            with drawing(model):
                path = draw(model, sampler, denoise, index, 0)
                next(path), next(path)  # the first casts the weights, the second begins a multistep method
                with Operations() as step:
                    next(path)
                with Operations() as network, torch.autocast("cpu", torch.bfloat16):
                    model.network(torch.zeros(2, *model.shape), torch.zeros(2), y)
        found[name] = {
            "operations": step.number,
            "of them the network's": network.number,
            "layouts lost": step.lost,
        }
    return found


def waits(recipe: list[str]) -> dict[str, int]:
    """For how much the host waits: in five training steps, and in two chunks of a sampling, for each."""
    fused = optimizers.adamw  # knows no fake tensor as learning rate
    with (
        patch.object(Tensor, "pin_memory", lambda self: self),  # only a GPU's driver can
        patch.object(optimizers, "adamw", lambda *all_, lr, **more: fused(*all_, lr=1e-3, **more)),
        patch.object(torch.cuda, "default_generators", (torch.Generator(),)),
        patch.object(CapturedSteps, "_in_side_stream", CapturedSteps._step),
        as_on_a_gpu(),
    ):
        run, batches = begun([*recipe, "trainer.batch_size=2"], CPU, 64)
        model = Model(run.ema, run.schedule, run.config, run.facts, GPU, precision=torch.bfloat16)
        sampler = choose_sampler("dpmpp_2m", {"num_steps": 4})
        path = levels(model, sampler)
        with FakeTensorMode(allow_non_fake_inputs=True):
            to_gpu(run)
            batches = Batches(Split(batches.images, batches.labels), 2, 0, GPU)
            steps = CapturedSteps(run, batches)
            steps.obstacle = "no GPU to capture on"
            with Waits() as training:
                repeat_steps(steps, run, batches, 5)
            y = torch.zeros(4, dtype=torch.int64) if model.conditional else None
            every = torch.arange(4)
            how: Any = (
                generation(model, sampler, every, 0),
                2,
                lambda at, step: None,
                lambda left, size: None,
            )
            as_it_is = {"levels": lambda *_: path, "CapturedCalls": lambda network: network}
            with patch.multiple(sampling_module, **as_it_is), Waits() as sampling:
                draw_all(model, sampler, Guidance(), y, every, *how)
    return {"in five training steps": len(training.found), "in a sampling chunk": len(sampling.found) / 2}


def host_ms(recipe: list[str]) -> dict[str, float]:
    """Least CPU time of several rounds, in turns: the bare network, a step of many kernels, a step of one graph."""
    with as_on_a_gpu():
        run, batches = begun([*recipe, *SMALL, "trainer.batch_size=2"], CPU, 64, size=8)
        eager, captured = CapturedSteps(run, batches), CapturedSteps(run, batches)
        captured.graph, captured.result = EmptyGraph(), (torch.zeros(()), torch.zeros(()))  # type: ignore[assignment]
        ways: dict[str, Callable[[], None]] = {
            "network, forward and backward": lambda: _bare(run, *batches.batch(0)),
            "step": lambda: repeat_steps(eager, run, batches, 1),
            "step, captured": lambda: repeat_steps(captured, run, batches, 1),
        }
        found = {name: list[float]() for name in ways}
        for number in range(ROUNDS + 1):
            for name, way in ways.items():
                started = time.process_time()
                for _ in range(STEPS):
                    way()
                if number:  # the first warms up
                    found[name].append(1000 * (time.process_time() - started) / STEPS)
    figures = {name: round(min(each), 3) for name, each in found.items()}
    return figures | {
        "step over network": round(figures["step"] / figures["network, forward and backward"], 2)
    }


class EmptyGraph:
    def replay(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = dict[str, Any]()
    for name, recipe in RECIPES.items():
        for part in (training, sampling, waits, host_ms):
            figures.setdefault(name, {})[part.__name__] = part(recipe)
            print(f"{name:<11} {part.__name__:<9}", figures[name][part.__name__], flush=True)
    if options.save:
        save(options.save, {}, figures, CPU)


if __name__ == "__main__":
    main()
