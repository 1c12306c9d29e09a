"""Images with a starting point: each task against what theory says, whatever the batch size, and as users type it."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpm import build
from ddpm.cli import sample_run as command
from ddpm.config import hydra
from ddpm.config.choices import Component
from ddpm.config.schema import SampleConfig, TrainConfig, check, to_dict
from ddpm.data.info import DatasetInfo
from ddpm.diffusion import editing
from ddpm.diffusion.denoiser import Estimate
from ddpm.diffusion.samplers import ddim, sample_levels
from ddpm.diffusion.schedules import Level, NoiseSchedule, linear
from ddpm.errors import UserError
from ddpm.io.images import normalise, to_uint8
from ddpm.io.pictures import MAX_SOURCE_PIXELS
from ddpm.sample import tasks, user_images
from ddpm.sample.model import Model, guidance
from tests.conftest import run_script
from tests.diffusion.mixture import IdealDenoiser

FLOAT64 = torch.float64
pytestmark = pytest.mark.xdist_group("tasks")  # one worker, which makes its fixtures once


@dataclasses.dataclass
class Gaussian:
    """E[x_0 | x_t] for images (1, 1, 2) from N(0, covariance), by the formula of the linear least squares."""

    schedule: NoiseSchedule
    covariance: Tensor

    def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate:
        noised = level.alpha**2 * self.covariance + level.sigma**2 * torch.eye(2, dtype=FLOAT64)
        x_0 = (x_t.flatten(1) @ torch.linalg.solve(noised, level.alpha * self.covariance)).view_as(x_t)
        return Estimate(x_0, (x_t - level.alpha * x_0) / level.sigma)


def inpainted(jump_length: int, jump_n_sample: int, steps: int = 50, n: int = 3000) -> Tensor:
    """The second pixel, unknown, of pairs with correlation 0.9 and standard deviation 0.5; the first is 0.6."""
    schedule = linear(1000)
    covariance = 0.25 * torch.tensor([[1, 0.9], [0.9, 1]], dtype=FLOAT64)
    generator = torch.Generator().manual_seed(1)
    known = torch.zeros(n, 1, 1, 2, dtype=FLOAT64)
    known[..., 0] = 0.6
    mask = torch.tensor([False, True]).view(1, 1, 1, 2).expand(n, 1, 1, 2)

    def noise(k: int) -> Tensor:
        return torch.randn(known.shape, generator=generator, dtype=FLOAT64)

    levels = sample_levels(schedule, steps)
    found = list(
        editing.repaint(
            Gaussian(schedule, covariance),
            levels,
            noise(0) * levels[0].sigma,
            known,
            mask,
            noise,
            jump_length=jump_length,
            jump_n_sample=jump_n_sample,
        )
    )
    assert len(found) == steps * jump_n_sample
    assert (found[-1].x[..., 0] == 0.6).all()
    return found[-1].x[..., 1].flatten()


@pytest.mark.slow
def test_repaint_comes_closer_to_the_conditional_mean_the_more_it_resamples() -> None:
    mean = 0.9 * 0.6
    errors = [abs(inpainted(1, repeats).mean().item() - mean) for repeats in (1, 4, 16)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    x = inpainted(1, 30, steps=100)
    standard_error = 0.5 * math.sqrt(1 - 0.9**2) / math.sqrt(len(x))
    assert abs(x.mean().item() - mean) < 4 * standard_error + 0.01  # and what 100 steps leave


@pytest.mark.parametrize("jump_length", [1, 3, 7, 50])
def test_repaint_takes_any_jump_length(jump_length: int) -> None:
    x = inpainted(jump_length, 2, steps=7, n=10)
    assert torch.isfinite(x).all()


def ideal() -> tuple[IdealDenoiser, list[Level], Tensor]:
    denoiser = IdealDenoiser(linear(1000))
    x_0 = (
        torch.tensor([-0.6, -0.5, 0.2, 0.45], dtype=FLOAT64).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    )
    return denoiser, sample_levels(denoiser.schedule, 50), x_0


def test_variation_without_strength_is_the_input_and_with_all_of_it_generation() -> None:
    _, levels, x_0 = ideal()
    eps = torch.randn(x_0.shape, dtype=FLOAT64)
    x, rest = editing.sdedit(levels, x_0, eps, 0)
    assert torch.equal(x, x_0) and len(rest) == 1
    x, rest = editing.sdedit(levels, x_0, eps, 1)
    assert torch.equal(x, eps * levels[0].sigma) and list(rest) == levels
    x, rest = editing.sdedit(levels, x_0, eps, 0.6)
    assert len(rest) == 31 and torch.equal(x, rest[0].alpha * x_0 + rest[0].sigma * eps)
    assert len(editing.sdedit(levels, x_0, eps, 1e-9)[1]) == 2
    with pytest.raises(ValueError, match="strength"):
        editing.sdedit(levels, x_0, eps, 1.5)


def test_slerp_keeps_ends_and_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 1, 8, 8, generator=generator)
    assert torch.equal(editing.slerp(a, b, torch.zeros(5)), a) and torch.equal(
        editing.slerp(a, b, torch.ones(5)), b
    )
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b))
    for part in (0.1, 0.5, 0.8):
        middle = editing.slerp(a, b, torch.full((5,), part))
        assert torch.allclose(middle.flatten(1).norm(dim=1), torch.ones(5), atol=1e-6)
        shares = torch.acos((middle * a).sum((1, 2, 3))) / torch.acos((a * b).sum((1, 2, 3)))
        assert torch.allclose(shares, torch.full((5,), part), atol=1e-4)
    assert torch.allclose(editing.slerp(a, a, torch.full((5,), 0.3)), a)
    assert torch.isfinite(editing.slerp(a, -a, torch.full((5,), 0.5))).all()


def test_reconstruction_returns_the_images() -> None:
    denoiser, levels, x_0 = ideal()
    (*_, end) = editing.reconstruct(denoiser, levels, x_0)
    mse, largest = editing.grey_level_errors((x_0 + 1) * 127.5, end.x)
    assert largest.max() < 0.1 and (mse <= largest**2).all()
    (*_, again) = ddim(denoiser, levels, editing.encode(denoiser, levels, x_0), lambda k: x_0)
    assert torch.equal(again.x, end.x)


# A model with weights by chance, and plans for it as the command makes them.

FACTS = DatasetInfo("digits", 1, 8, 10, tuple("0123456789"), 17)


@pytest.fixture(scope="module")
def base() -> SampleConfig:
    typed = ["ckpt=none", "sampler=ddim", "seed=3", "sampler.num_steps=5", "device=cpu"]
    config = check(SampleConfig, hydra.compose("sample", typed))
    assert isinstance(config, SampleConfig)
    return config


def make_model(conditional: bool) -> Model:
    typed = [f"model.conditional={conditional}".lower(), "model.channels=[16,16]", "model.num_blocks=1"]
    config = check(TrainConfig, hydra.compose("train", typed))
    torch.manual_seed(0)
    network = build.network(config.model, config.objective, FACTS).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return Model(network, build.schedule(config.schedule), config, FACTS, torch.device("cpu"))


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(conditional=False)


TASKS: dict[str, dict[str, Any]] = {
    "generate": {"n": 5},
    "inpaint": {"n": 2, "input": "digits:test:0-2", "mask": "random"},
    "variation": {"n": 2, "input": "digits:test:0-2"},
    "interpolate": {"n": 3, "index": [0, 4]},
    "interpolate inputs": {"n": 3, "task": "interpolate", "input": "digits:test:0-3"},
    "reconstruct": {"input": "digits:test:0-4"},
}


def plan_and_draw(config: SampleConfig, model: Model) -> tuple[tasks.Plan, Tensor]:
    todo = tasks.make(config, model)
    return todo, command.draw(config, model, todo).x


@pytest.mark.parametrize("task", TASKS)
def test_images_do_not_depend_on_the_batch_size(task: str, base: SampleConfig, model: Model) -> None:
    config = dataclasses.replace(base, **{"task": task, **TASKS[task]})
    todo, whole = plan_and_draw(config, model)
    assert len(whole) == todo.n and whole.std(0).max() > 0
    for batch_size in (1, 2):
        _, x = plan_and_draw(dataclasses.replace(config, batch_size=batch_size), model)
        assert (x - whole).abs().max() < 2e-4 * whole.abs().max()


@pytest.mark.parametrize("task", ["inpaint", "variation", "reconstruct"])
def test_a_result_depends_on_its_own_input_alone(task: str, base: SampleConfig, model: Model) -> None:
    """Input 2 among others or by index, its first result of two or of one."""
    options = {"task": task, **TASKS[task], "sampler": with_clip(base, "clip")}
    _, all_of_them = plan_and_draw(dataclasses.replace(base, **options), model)
    _, one = plan_and_draw(dataclasses.replace(base, **{**options, "index": [2], "n": 1}), model)
    same = all_of_them[2 * options.get("n", 1)]
    assert (one[0] - same).abs().max() < 2e-4 * same.abs().max()


def with_clip(config: SampleConfig, clip: str) -> Component:
    return Component(config.sampler.name, {**config.sampler.params, "clip": clip})


def test_ends_of_tasks_meet_generation(base: SampleConfig, model: Model) -> None:
    generated = plan_and_draw(dataclasses.replace(base, n=3), model)[1]
    varied = dataclasses.replace(base, task="variation", input="digits:test:0-2", strength=1.0)
    assert torch.equal(plan_and_draw(varied, model)[1], generated)
    between = dataclasses.replace(base, task="interpolate", n=3, index=[2], seeds=[9, 3])
    x = plan_and_draw(between, model)[1]
    assert (x[-1] - generated[2]).abs().max() < 1e-4
    other_seed = plan_and_draw(dataclasses.replace(base, index=[2], seed=9), model)[1]
    assert (x[0] - other_seed[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["left", "top", "centre", "random"])
def test_inpainting_keeps_the_known_pixels_bit_by_bit(name: str, base: SampleConfig, model: Model) -> None:
    config = dataclasses.replace(base, task="inpaint", input="digits:test:0-3", mask=name)
    todo, x = plan_and_draw(config, model)
    pixels, (before, white) = to_uint8(x), todo.left
    assert todo.num_steps == 5 * config.jump_n_sample and "20 evaluations" in todo.notes[0]
    assert (pixels[white == 0] == before[white == 0]).all() and (
        pixels[white == 255] != before[white == 255]
    ).any()
    assert 0.1 < (white == 255).mean() < 0.9
    images, numbers = todo.table(pixels)
    assert numbers.shape == (len(pixels), 3)
    assert (images[numbers[:, 2]] == pixels).all() and (images[numbers[:, 0]] == before).all()


def test_all_grey_levels_come_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert (to_uint8(normalise(levels))[..., 0] == levels[0].numpy()).all()


def test_masks_are_white_where_unknown(tmp_path: Path) -> None:
    two = torch.arange(2)
    left, top, centre = (user_images.mask(name, 8, 0, two) for name in ("left", "top", "centre"))
    assert left[0, 0].sum() == 32 and left[..., :4].all()
    assert top[0, 0].sum() == 32 and top[:, :, :4].all()
    assert centre[0, 0].sum() == 16 and centre[:, :, 2:6, 2:6].all()
    random = user_images.mask("random", 64, 0, two)
    assert abs(random.float().mean() - 0.75) < 0.02 and not torch.equal(random[0], random[1])
    assert torch.equal(user_images.mask("random", 64, 0, two[1:])[0], random[1])
    picture = np.zeros((32, 32), np.uint8)
    picture[:, :16] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    assert torch.equal(user_images.mask(str(tmp_path / "mask.png"), 8, 0, two), left)  # of any size


# What users bring.


def read(text: str, facts: DatasetInfo = FACTS) -> user_images.Inputs:
    return user_images.read(text, facts, Component("digits", {}), "data")


def test_files_and_folders_are_made_like_the_models_images(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "b.png")
    Image.fromarray(colours[..., 0]).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "notes.txt").write_text("no picture")
    both = read(str(tmp_path))
    assert both.images.shape == (2, 1, 8, 8) and both.images.dtype == torch.uint8 and both.labels is None
    assert [Path(name).name for name in both.names] == ["a.jpg", "b.png"]
    coloured = read(str(tmp_path / "b.png"), dataclasses.replace(FACTS, channels=3))
    assert coloured.images.shape == (1, 3, 8, 8)
    grey = Image.fromarray(np.full((8, 8), 77, np.uint8))
    grey.save(tmp_path / "g.png")
    assert (read(str(tmp_path / "g.png")).images == 77).all()


def test_dataset_images_come_with_their_labels() -> None:
    digits = build.dataset(Component("digits", {}), "data")
    found = read("digits:val:7,0-2")
    assert torch.equal(found.images, digits.val.images[[7, 0, 1, 2]]) and digits.val.labels is not None
    assert found.labels is not None and torch.equal(found.labels, digits.val.labels[[7, 0, 1, 2]])
    assert found.names[0] == "digits:val:7"
    other_classes = dataclasses.replace(FACTS, class_names=tuple("abcdefghij"))
    assert read("digits:val:7", other_classes).labels is None
    assert read("digits:val:7", dataclasses.replace(FACTS, channels=3)).images.shape == (1, 3, 8, 8)


def broken_file(folder: Path) -> str:
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    return str(folder / "broken.png")


def huge_file(folder: Path) -> str:
    Image.new("1", (MAX_SOURCE_PIXELS // 5000 + 1, 5000)).save(folder / "huge.png")
    return str(folder / "huge.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.png", ["input=nowhere.png", "no such file"]),
        (lambda folder: str(folder), ["0 images", "1 to 4096"]),
        (broken_file, ["broken.png", "cannot be read"]),
        (huge_file, ["huge.png", str(MAX_SOURCE_PIXELS)]),
        ("digit:val:0", ["no dataset 'digit'", "digits"]),
        ("digits:valid:0", ["no split 'valid'", "train, val, test"]),
        ("digits:val:180", ["0 to 179"]),
        ("digits:val:3-1", ["'3-1'", "rising"]),
        ("digits:val:", ["''", "rising"]),
        ("digits:val:-1", ["'-1'"]),
        ("digits:val:0-999999999", ["too many", "4096"]),
        ("folder:val:0", ["give the folder's path as input"]),
        ("mnist:val:0", ["8", "28, 32, 64"]),
    ],
)
def test_inputs_that_cannot_be_are_one_line(
    text: str | Callable[[Path], str], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read(text if isinstance(text, str) else text(tmp_path))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_a_file_with_colons_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("12:30:45.png", "digits:val:0"):
        Image.new("L", (8, 8), 7).save(name, "PNG")
        assert read(name).images.unique().tolist() == [7]


def test_inputs_in_class_folders_and_what_is_passed_over(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        Image.new("L", (8, 8), number).save(tmp_path / str(number) / "a.png")
    (tmp_path / "notes.txt").write_text("more")
    found = read(str(tmp_path))
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2]
    assert found.images.flatten(1)[:, 0].tolist() == [0, 1, 2]
    Image.new("L", (8, 8), 9).save(tmp_path / "a.png")
    found = read(str(tmp_path))
    assert found.labels is None and found.images.unique().tolist() == [9]
    assert found.notice == f"input={tmp_path}: passed over: 3 × folder (0), 1 × .txt (notes.txt)"


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"8×8×1.*28×28×1"):
        read("digits:val:0", dataclasses.replace(FACTS, image_size=28))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "inpaint", "mask": "left"}, ["task=inpaint", "input"]),
        ({"task": "inpaint", "input": "digits:val:0"}, ["task=inpaint", "mask", "centre"]),
        ({"task": "variation"}, ["needs input"]),
        ({"input": "digits:val:0"}, ["input=digits:val:0", "generate"]),
        ({"task": "variation", "input": "digits:val:0", "mask": "left"}, ["mask=left", "inpaint"]),
        ({"seeds": [0, 1]}, ["seeds=[0, 1]", "interpolate"]),
        ({"task": "interpolate", "seeds": [0, 1], "input": "digits:val:0-1"}, ["seeds", "input"]),
        ({"task": "interpolate", "seeds": [0]}, ["seeds=[0]", "two"]),
        ({"task": "interpolate", "n": 1}, ["n=1", "at least 2"]),
        ({"task": "interpolate", "input": "digits:val:0-2"}, ["3 images", "pairs"]),
        ({"task": "reconstruct", "input": "digits:val:0", "n": 2}, ["n=2"]),
        ({"task": "reconstruct", "input": "digits:val:0", "sampler": "heun"}, ["sampler=heun", "ddim"]),
        ({"task": "variation", "input": "digits:val:0-3", "index": [4]}, ["index=[4]", "0 to 3"]),
        ({"task": "variation", "input": "digits:val:0", "label": [3]}, ["label", "conditional=true"]),
        ({"task": "variation", "input": "digits:val:0", "nrow": 3}, ["nrow=3", "null"]),
        (
            {"task": "inpaint", "input": "digits:val:0", "mask": "right"},
            ["mask=right", "left, top, centre, random"],
        ),
        ({"task": "inpaint", "input": "digits:val:0", "mask": "black.png"}, ["black.png", "white"]),
    ],
)
def test_plans_that_cannot_be_are_one_line(
    options: dict[str, Any],
    words: list[str],
    base: SampleConfig,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("black.png")
    if "sampler" in options:
        options = {**options, "sampler": Component(options["sampler"], {})}
    with pytest.raises(UserError) as error:
        tasks.make(dataclasses.replace(base, **options), model)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("task=paint", "inpaint"),
        ("strength=1.5", "from 0 to 1"),
        ("jump_length=0", "1"),
        ("jump_n_sample=0", "1"),
    ],
)
def test_keys_have_limits(typed: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(SampleConfig, hydra.compose("sample", ["ckpt=none", typed]))


def test_classes_come_from_the_input_unless_typed(base: SampleConfig, tmp_path: Path) -> None:
    model = make_model(conditional=True)
    own = build.dataset(Component("digits", {}), "data").test.labels
    config = dataclasses.replace(base, task="variation", input="digits:test:3-5", n=2)
    y = tasks.make(config, model).y
    assert y is not None and own is not None and y.tolist() == own[3:6].repeat_interleave(2).tolist()
    y = tasks.make(dataclasses.replace(config, label=[7]), model).y
    assert y is not None and y.tolist() == [7] * 6
    Image.new("L", (8, 8)).save(tmp_path / "mine.png")
    mine = dataclasses.replace(config, input=str(tmp_path / "mine.png"))
    with pytest.raises(UserError, match=r"add label=.*0 to 9"):
        tasks.make(mine, model)
    tasks.make(dataclasses.replace(mine, guidance_scale=0.0), model)


# As users type it.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps in `run`, and a picture."""
    folder = tmp_path_factory.mktemp("tasks")
    quick = ["model.channels=[16,16]", "model.num_blocks=1", "trainer.max_steps=4", "trainer.batch_size=8"]
    result = run_script("train", *quick, "run_dir=run", "trainer.sample_every=0", cwd=folder)
    assert result.returncode == 0, result.stderr
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(
        folder / "my (1).png"
    )
    return folder


@pytest.mark.parametrize(
    ("typed", "columns", "said"),
    [
        (["task=inpaint", "input=my (1).png", "mask=left", "n=2"], 4, "16 evaluations"),
        (["task=variation", "input=digits:test:0,5", "strength=0", "n=2"], 3, ""),
        (["task=interpolate", "input=digits:test:0,5", "n=3"], 5, "45 evaluations to encode"),
        (["task=reconstruct", "input=digits:test:0-1"], 2, "mean squared error"),
    ],
)
def test_tasks_from_the_command_line(typed: list[str], columns: int, said: str, home: Path) -> None:
    out = typed[0].removeprefix("task=")
    save = "save=[grid,images,npz,trajectory]"
    result = run_script("sample", "ckpt=run", "sampler.num_steps=4", save, f"out={out}", *typed, cwd=home)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
    about = json.loads((home / out / "sample.json").read_text())
    images = np.load(home / out / "samples.npz", allow_pickle=False)["images"]
    assert len(images) == about["images"] == len(list((home / out / "images").iterdir()))
    assert Image.open(home / out / "grid.png").width == columns * (8 * 7 + 2) + 2
    assert about["task"] == out and len(about["inputs"]) >= 1
    assert {"trajectory.gif", "trajectory.png"} <= set(about["files"])
    if out == "reconstruct":
        assert len(about["largest_difference"]) == 2 and about["sampler"]["clip"] == "none"
    if out == "inpaint":
        (mine,) = user_images.read(str(home / "my (1).png"), FACTS, Component("digits", {}), "data").images
        assert (images[:, :, 4:] == mine[0, :, 4:].numpy()).all() and (images[0] != images[1]).any()
    if out == "variation":
        given = read("digits:test:0,5").images[:, 0].numpy()
        assert (images == given.repeat(2, axis=0)).all()


def test_guidance_is_everywhere_unless_an_interval_is_typed(base: SampleConfig) -> None:
    assert guidance(base).interval == (
        0.0,
        math.inf,
    )  # with zero terminal SNR it begins at infinity
    typed = dataclasses.replace(base, guidance_interval=[0.5, 2.0])
    assert guidance(typed).interval == (0.5, 2.0)
    for wrong in ([2.0, 0.5], [1.0], [0.5, 1.0, 2.0]):
        with pytest.raises(UserError, match="two rising numbers"):
            check(SampleConfig, {**to_dict(base), "guidance_interval": wrong})


@pytest.mark.slow
def test_a_grid_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """50,000 images of 8×8, of ten classes or in rows of a typed length; and a film of images of 1024×1024."""
    drawn = command.Drawn(torch.zeros(50_000, 1, 8, 8), torch.empty(0, 0, 1, 8, 8), 1)
    index = torch.arange(50_000)
    for nrow, y, said in (
        (None, index % 10, "grid.png shows 41,800 of 50,000 images; save=[grid,images] keeps each\n"),
        (None, None, "grid.png shows 43,681 of 50,000 images; save=[grid,images] keeps each\n"),
        (300, None, "nrow=300: 209 images fill a row of 2,100 pixels\ngrid.png shows 43,681 of 50,000"),
        (5, None, "grid.png shows 1,045 of 50,000 images"),
    ):
        config = check(
            SampleConfig, {**hydra.compose("sample", ["ckpt=run"]), "nrow": nrow, "save": ["grid"]}
        )
        todo = tasks.Plan(50_000, y, config.sampler, 1, lambda denoise, places: iter(()))
        assert command._write(config, todo, drawn, tmp_path) == ["grid.png"]
        assert capsys.readouterr().out.startswith(said)
        with Image.open(tmp_path / "grid.png") as picture:
            assert max(picture.size) <= 2100
    film = tuple(torch.zeros(4, 3, 1024, 1024) for _ in range(12))
    command._write_film(film, tmp_path)
    for name in ("trajectory.gif", "trajectory.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (2054, 2054)
