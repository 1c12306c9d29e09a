"""What a user of ddpm-sample brings along: images to start from, their classes, and how to guide."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm.config.schema import SampleConfig
from ddpm.errors import UserError
from ddpm.io.images import Pixels, normalise
from ddpm.sample import user_images as inputs
from ddpm.sample.sampling import Guidance, Model, labels

RESULT_SHIFT = 32  # result j of input i has the index i + j 2^32, however many there are of either


@dataclass(frozen=True, eq=False)
class Brought:
    """What the user brought, and which of it the results start from."""

    inputs: inputs.Inputs
    numbers: Tensor  # (rows,) of the inputs in use
    pixels: Tensor  # uint8 (rows, C, H, W)
    y: Tensor | None  # (rows,)
    row: Tensor  # (n,) of each result
    index: Tensor  # (n,) of each result, for its randomness

    @property
    def x_0(self) -> Tensor:
        return normalise(self.pixels)

    @property
    def column(self) -> Pixels:
        return self.pixels.permute(0, 2, 3, 1).numpy()

    @property
    def notes(self) -> list[str]:
        return [self.inputs.notice] if self.inputs.notice else []

    @property
    def about(self) -> dict[str, Any]:
        return {"inputs": [self.inputs.names[number] for number in self.numbers]}


def bring(config: SampleConfig, model: Model, each: int) -> Brought:
    """The inputs, `each` results for every one. `index=` picks among them by their place, from 0."""
    assert config.input is not None
    brought = inputs.read(config.input, model.facts, model.config.dataset, config.data_root)
    numbers = torch.tensor(config.index) if config.index else torch.arange(len(brought.images))
    if numbers.max() >= len(brought.images):
        raise UserError(
            f"index={config.index}: input={config.input} has the images 0 to {len(brought.images) - 1}"
        )
    row = torch.arange(len(numbers)).repeat_interleave(each)
    index = numbers[row] + (torch.arange(each).repeat(len(numbers)) << RESULT_SHIFT)
    y = labels(model, wanted(config), numbers, guidance(config))
    if y is not None and config.label is None:
        if brought.labels is not None:
            y = brought.labels[numbers]
        elif config.guidance_scale != 0:
            raise UserError(
                f"input={config.input}: has no label that this conditional model knows; add label=… (0 to "
                f"{model.facts.num_classes - 1}, or a list), or guidance_scale=0 for no class"
            )
    return Brought(brought, numbers, brought.images[numbers], y, row, index)


def guidance(config: SampleConfig) -> Guidance:
    bounds = config.guidance_interval
    if bounds is None:  # everywhere, where sigma / alpha is infinite too
        bounds = [0.0, math.inf]
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise UserError(f"guidance_interval={bounds}: must be two rising numbers [low, high]")
    return Guidance(config.guidance_scale, config.guidance_rescale, (bounds[0], bounds[1]))


def wanted(config: SampleConfig) -> list[int] | None:
    """The classes asked for; None where all are, or nothing was said."""
    if isinstance(config.label, str):
        if config.label != "all":
            raise UserError(f"label={config.label}: must be a number, a list such as [0,1,2], or all")
        return None
    return config.label
