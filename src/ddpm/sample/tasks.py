"""Plan the tasks of ddpm-sample: what they start from, their steps, and the columns of their grid."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.config.choices import Component
from ddpm.config.schema import SampleConfig
from ddpm.diffusion import editing
from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.samplers import Step
from ddpm.diffusion.schedules import Level
from ddpm.errors import UserError
from ddpm.io.images import Pixels
from ddpm.runtime.randomness import normal
from ddpm.sample import user_images
from ddpm.sample.model import Model, denoiser, guidance, labels, levels
from ddpm.sample.sampling import COMMON, Steps, generation, run
from ddpm.sample.user_images import Brought, bring

GENERATED = 64  # images, where n is not typed
BETWEEN = 8  # images of an interpolation, both ends included, where n is not typed
ENCODED_ALPHA = 0.05  # images are encoded up to this alpha, where 1/400 of the variance is the image's


@dataclass(frozen=True, eq=False)
class Plan:
    """n results: `steps` draws those at some places (k,) of 0 … n-1, in `num_steps` steps."""

    n: int
    y: Tensor | None  # classes (n,)
    sampler: Component  # as it is run, which may differ from the config's
    num_steps: int
    steps: Steps
    rows: int | None = None  # of the grid; None: as in any grid
    left: list[Pixels] = field(default_factory=list)  # columns beside the results, one image for each row
    right: list[Pixels] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # printed before drawing
    about: dict[str, Any] = field(default_factory=dict)  # added to sample.json
    # all results -> a line to print, and what is added to sample.json
    measure: Callable[[Tensor], tuple[str, dict[str, Any]]] | None = None

    def table(self, pixels: Pixels) -> tuple[Pixels, NDArray[np.int64]]:
        """Return results, then inputs, and a table of their numbers with one input in each row."""
        images = np.concatenate([pixels, *self.left, *self.right])
        numbers, n, left = np.arange(len(images)), len(pixels), len(self.left)
        results, columns = numbers[:n].reshape(self.rows or 1, -1), numbers[n:].reshape(-1, self.rows or 1).T
        return images, np.concatenate([columns[:, :left], results, columns[:, left:]], axis=1)


def make(config: SampleConfig, model: Model) -> Plan:
    """Plan the config's task. Raises UserError for keys that the task needs or has no use for."""
    needs = {"inpaint": ("input", "mask"), "variation": ("input",), "reconstruct": ("input",)}
    uses = {**needs, "interpolate": ("input", "seeds")}
    for key in ("input", "mask", "seeds"):
        value = getattr(config, key)
        if value is None and key in needs.get(config.task, ()):
            raise UserError(f"task={config.task}: needs {key}=…; {_HOW[key]}")
        if value is not None and key not in uses.get(config.task, ()):
            users = ", ".join(task for task, keys in uses.items() if key in keys)
            raise UserError(
                f"{key}={value}: task={config.task} has no use for it; task must be one of {users}"
            )
    if config.nrow is not None and (config.input is not None or config.task == "interpolate"):
        raise UserError(f"nrow={config.nrow}: task={config.task} shows one input in each row; must be null")
    return _TASKS[config.task](config, model)


_HOW = {
    "input": "a picture, a folder of them, or dataset images such as mnist:test:0-15",
    "mask": "left, top, centre, random, or a picture that is white where something is to be drawn",
}


def _for_inputs(brought: Brought, sampler: Component, num_steps: int, steps: Steps, **more: Any) -> Plan:
    """Plan results that start from the user's images, shown in the grid's left column."""
    shared = {"left": [brought.column], "notes": brought.notes, "about": brought.about}
    y, rows = _classes_of(brought.y, brought.row), len(brought.numbers)
    return Plan(len(brought.index), y, sampler, num_steps, steps, rows, **{**shared, **more})


def _generate(config: SampleConfig, model: Model) -> Plan:
    if config.index and config.n not in (None, len(config.index)):
        raise UserError(f"n={config.n}: index={config.index} names the images already; leave n out")
    index = torch.tensor(config.index) if config.index else torch.arange(config.n or GENERATED)
    y = labels(model, config.label, index, guidance(config))
    steps = generation(model, config.sampler, index, config.seed)
    return Plan(len(index), y, config.sampler, len(levels(model, config.sampler)) - 1, steps)


def _inpaint(config: SampleConfig, model: Model) -> Plan:
    brought = bring(config, model, config.n or 1)
    # RePaint's own steps are ancestral, whichever sampler the levels were meant for
    sampler = Component("ddpm", {key: config.sampler.params[key] for key in COMMON} | {"variance": "small"})
    path = levels(model, sampler)
    assert config.mask is not None
    mask = user_images.mask(config.mask, model.facts.image_size, config.seed, brought.numbers)

    def steps(denoise: Denoiser, places: Tensor) -> Iterator[Step]:
        index, row = brought.index[places].to(model.device), brought.row[places]
        return editing.repaint(
            denoise,
            path,
            normal(config.seed, "x_T", 0, index, model.shape) * path[0].sigma,
            brought.x_0[row].to(model.device),
            mask[row].to(model.device),
            lambda k: normal(config.seed, "repaint", k, index, model.shape),
            jump_length=config.jump_length,
            jump_n_sample=config.jump_n_sample,
        )

    num_steps = (len(path) - 1) * config.jump_n_sample
    cost = f"inpaint: {len(path) - 1} ancestral steps × jump_n_sample={config.jump_n_sample}: {num_steps} evaluations"
    white = mask.expand(-1, model.facts.channels, -1, -1).to(torch.uint8) * 255
    left = [brought.column, white.permute(0, 2, 3, 1).numpy()]
    notes = [*brought.notes, f"{cost} for each image"]
    return _for_inputs(brought, sampler, num_steps, steps, left=left, notes=notes)


def _variation(config: SampleConfig, model: Model) -> Plan:
    brought = bring(config, model, config.n or 1)
    path = levels(model, config.sampler)

    def steps(denoise: Denoiser, places: Tensor) -> Iterator[Step]:
        index, x_0 = brought.index[places].to(model.device), brought.x_0[brought.row[places]].to(model.device)
        eps = normal(config.seed, "x_T", 0, index, model.shape)
        x, rest = editing.sdedit(path, x_0, eps, config.strength)
        yield Step(x, x_0, rest[0])
        if len(rest) > 1:
            yield from run(model, config.sampler, denoise, list(rest), x, index, config.seed)

    one = brought.x_0[:1]
    num_steps = len(editing.sdedit(path, one, one, config.strength)[1])
    return _for_inputs(brought, config.sampler, num_steps, steps)


def _interpolate(config: SampleConfig, model: Model) -> Plan:
    """Interpolate along each row of the grid. The sampler's own noise, if it has any, is the same along a row."""
    each = config.n or BETWEEN
    if each < 2:
        raise UserError(f"n={each}: task=interpolate needs at least 2 images, its ends")
    if config.input is not None and config.seeds is not None:
        raise UserError(f"seeds={config.seeds}: the ends are those of input={config.input}; must be null")
    if config.input is not None:
        return _between_inputs(config, model, each)
    seeds = config.seeds or [config.seed, config.seed + 1]
    if len(seeds) != 2:
        raise UserError(f"seeds={seeds}: must be the two ends, such as [0,1]")
    index = torch.tensor(config.index or [0])
    row, fraction = _rows_and_fractions(len(index), each)
    y = labels(model, config.label, index, guidance(config))
    path = levels(model, config.sampler)

    def steps(denoise: Denoiser, places: Tensor) -> Iterator[Step]:
        own = index[row[places]].to(model.device)
        a, b = (normal(seed, "x_T", 0, own, model.shape) * path[0].sigma for seed in seeds)
        x_T = editing.slerp(a, b, fraction[places].to(model.device))
        return run(model, config.sampler, denoise, path, x_T, own, config.seed)

    about = {"seeds": seeds}
    return Plan(
        len(row), _classes_of(y, row), config.sampler, len(path) - 1, steps, rows=len(index), about=about
    )


def _between_inputs(config: SampleConfig, model: Model, each: int) -> Plan:
    """Interpolate between every two inputs, each encoded in its own class. A result has the class of the nearer end."""
    sampler = _reversible(config)
    brought = bring(config, model, 1)
    if len(brought.numbers) % 2:
        raise UserError(
            f"input={config.input}: {len(brought.numbers)} images; task=interpolate takes them in pairs"
        )
    path = _reversible_levels(model, sampler)
    codes = []
    with torch.inference_mode():
        for places in torch.split(torch.arange(len(brought.numbers)), config.batch_size):
            part_y = None if brought.y is None else brought.y[places].to(model.device)
            encoder = denoiser(model, sampler, part_y, guidance(config))
            codes.append(editing.encode(encoder, path, brought.x_0[places].to(model.device)))
    x_T = torch.cat(codes)
    row, fraction = _rows_and_fractions(len(x_T) // 2, each)

    def steps(denoise: Denoiser, places: Tensor) -> Iterator[Step]:
        a, b = 2 * row[places], 2 * row[places] + 1
        x = editing.slerp(x_T[a], x_T[b], fraction[places].to(model.device))
        return run(model, sampler, denoise, path, x, row[places].to(model.device), config.seed)

    cost = f"interpolate: {encoder.evaluations} evaluations to encode each input, without clipping"
    return Plan(
        len(row),
        _classes_of(brought.y, 2 * row + (fraction > 0.5)),
        sampler,
        len(path) - 1,
        steps,
        rows=len(x_T) // 2,
        left=[brought.column[0::2]],
        right=[brought.column[1::2]],
        notes=[*brought.notes, cost],
        about={**brought.about, "evaluations_per_input": encoder.evaluations},
    )


def _reconstruct(config: SampleConfig, model: Model) -> Plan:
    if config.n not in (None, 1):
        raise UserError(f"n={config.n}: task=reconstruct gives 1 image for each input")
    sampler = _reversible(config)
    brought = bring(config, model, 1)
    path = _reversible_levels(model, sampler)

    def steps(denoise: Denoiser, places: Tensor) -> Iterator[Step]:
        return editing.reconstruct(denoise, path, brought.x_0[places].to(model.device))

    def measure(x: Tensor) -> tuple[str, dict[str, Any]]:
        mse, largest = editing.grey_level_errors(brought.pixels, x)
        text = (
            f"reconstruct: mean squared error {mse.mean():.4g}, largest difference {largest.max():.4g} grey levels "
            f"of 255, over {len(x)} images without clipping"
        )
        return text, {"mean_squared_error": mse.tolist(), "largest_difference": largest.tolist()}

    return _for_inputs(brought, sampler, 2 * (len(path) - 1), steps, measure=measure)


_TASKS: dict[str, Callable[[SampleConfig, Model], Plan]] = {
    "generate": _generate,
    "inpaint": _inpaint,
    "variation": _variation,
    "interpolate": _interpolate,
    "reconstruct": _reconstruct,
}


def _reversible(config: SampleConfig) -> Component:
    """Return the sampler without clipping. Raises UserError unless it is ddim with eta = 0, which is reversible."""
    sampler = config.sampler
    if sampler.name != "ddim" or sampler.params["eta"] != 0:
        eta = f" with sampler.eta={sampler.params['eta']:g}" if sampler.name == "ddim" else ""
        raise UserError(
            f"sampler={sampler.name}{eta}: task={config.task} with input must run backwards: needs sampler=ddim "
            "with sampler.eta=0"
        )
    return dataclasses.replace(sampler, params={**sampler.params, "clip": "none"})


def _reversible_levels(model: Model, sampler: Component) -> list[Level]:
    """Return the sampler's levels from ENCODED_ALPHA on.

    An error in eps is 1 / alpha times as large in x_0. Where alpha is smaller, it diverges without clipping.
    """
    path = levels(model, sampler)
    return (
        path if path[0].alpha >= ENCODED_ALPHA else [level for level in path if level.alpha >= ENCODED_ALPHA]
    )


def _rows_and_fractions(rows: int, each: int) -> tuple[Tensor, Tensor]:
    """Return each result's row, and its place in the row from 0 to 1."""
    return torch.arange(rows).repeat_interleave(each), torch.linspace(0, 1, each).repeat(rows)


def _classes_of(y: Tensor | None, row: Tensor) -> Tensor | None:
    return None if y is None else y[row]
