"""One process of several that train in float64: torchrun … double_worker.py <result.pt> <steps> key=value …

All that is float32 in a run is made double, so that what is left between 1, 2 and 4 processes is not rounding.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check
from ddpm.data.batches import Batches
from ddpm.data.digits import digits
from ddpm.runtime.distributed import process_group
from ddpm.runtime.world import world
from ddpm.train.state import TrainState, join, prepare
from ddpm.train.step import train_step
from ddpm.train.validation import Validation

CPU = torch.device("cpu")


def in_double(run: TrainState) -> None:
    """Weights, tables and state; the optimizer makes its own moments from the weights."""
    run.network.double()
    run.ema.double()
    tables = {
        field.name: value.double()
        for field in dataclasses.fields(run.objective)
        if isinstance(value := getattr(run.objective, field.name), torch.Tensor)
    }
    run.objective = dataclasses.replace(run.objective, **tables)
    run.loss_history, run.first_nonfinite, run.loss_sum = (
        run.loss_history.double(),
        run.first_nonfinite.double(),
        run.loss_sum.double(),
    )


def count_messages(run: TrainState, batches: Batches) -> int:
    """How many buckets of gradients are sent in a step, which is taken back."""
    sent: list[int] = []
    if run.parallel is None:
        return 0

    def counted(state: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.index())
        return allreduce_hook(state, bucket)  # type: ignore[arg-type]

    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    ema, history = (
        {name: tensor.clone() for name, tensor in run.ema.state_dict().items()},
        run.loss_history.clone(),
    )
    run.parallel.register_comm_hook(None, counted)
    train_step(run, *batches.batch(run.step))
    run.network.load_state_dict(before)
    run.ema.load_state_dict(ema)
    run.loss_history = history
    return len(sent)


def main(result: str, steps: int, overrides: list[str]) -> None:
    to_single = torch.Tensor.float
    # a flag (found_inf) stays float32, as the fused optimizer needs it
    torch.Tensor.float = lambda x: to_single(x) if x.dtype == torch.bool else x.double()  # type: ignore[method-assign]
    config = check(TrainConfig, hydra.compose("train", ["device=cpu", *overrides]))
    data, own = digits(Path()), world()
    with process_group(own, CPU):
        run = prepare(config, data, CPU)
        in_double(run)
        join(run, own)
        seen: list[int] = []
        run.network.register_forward_pre_hook(lambda network, inputs: seen.append(len(inputs[0])))
        batches = Batches(data.train, config.trainer.batch_size, config.seed, CPU)
        lines = []
        for _ in range(steps):
            loss, norm = train_step(run, *batches.batch(run.step))
            assert loss.dtype == torch.float64
            lines.append(torch.stack([loss, norm.double()]))
            run.step += 1
        images = sum(seen)
        messages = count_messages(run, batches)
        figures = Validation(data.val, run.schedule, run.objective, CPU).measure(
            run.ema, bool(config.model.params["conditional"]), world=own
        )
        if own.first:
            numbers = {
                "losses and norms": torch.stack(lines),
                "weights": torch.cat([p.detach().flatten() for p in run.network.parameters()]),
                "averaged": torch.cat([p.flatten() for p in run.ema.parameters()]),
                "history": run.loss_history.nan_to_num(-1),
                "images": torch.tensor(images),
                "messages": torch.tensor(messages),
                "figures": torch.tensor([*figures.values()], dtype=torch.float64),
            }
            assert numbers["weights"].dtype == torch.float64
            torch.save(numbers, result)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
