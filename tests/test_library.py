"""`import ddpm`: cheap, typed, and the same images as ddpm-sample draws."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
from ddpm.checkpoint import locate
from ddpm.cli import train
from ddpm.config import hydra
from ddpm.config.choices import choices
from ddpm.config.schema import TrainConfig, check
from ddpm.train.checkpointing import save
from ddpm.train.state import prepare
from tests.conftest import run_script
from tests.train.test_training import CPU, config, tiny_data

pytestmark = pytest.mark.xdist_group("library")  # one worker, which makes its fixtures once
ROOT = Path(__file__).parents[1]
QUICK = [
    "model.channels=[8,16]",
    "model.head_dim=8",
    "model.conditional=true",
    "trainer.batch_size=8",
    "trainer.max_steps=2",
    "trainer.sample_every=0",
    "run_dir=run",
    "device=cpu",
]


def name_of(value: object) -> str:
    """Show a value without its address, so that a test has the same name in every worker."""
    return re.sub(r" at 0x\w+", "", str(value))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a short conditional run on digits is `run`."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("ddpm.train.validation.EVALUATIONS", 34)
        train.train(check(TrainConfig, hydra.compose("train", QUICK)))
    return folder


@pytest.fixture(scope="module")
def model(home: Path) -> ddpm.Model:
    """Its last weights, made large enough for the classes to count."""
    model = ddpm.load(home / "run", device="cpu", ema=False)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def run_python(code: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_import_is_cheap_until_something_is_used() -> None:
    code = """
import sys, ddpm
assert "load" in dir(ddpm) and issubclass(ddpm.UserError, Exception)
heavy = {"torch", "numpy", "hydra", "omegaconf", "PIL", "sklearn", "matplotlib", "diffusers"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
ddpm.load
assert "torch" in sys.modules and not heavy - {"torch", "numpy", "PIL"} & sys.modules.keys()
try:
    ddpm.lead
except AttributeError as error:
    assert str(error) == "module 'ddpm' has no attribute 'lead'"
else:
    raise SystemExit("ddpm.lead")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_all_that_is_offered_is_there_and_documented() -> None:
    for name in ddpm.__all__:
        assert getattr(ddpm, name).__doc__, name
    assert set(ddpm.api.__all__) < set(ddpm.__all__)


@pytest.mark.slow
def test_mypy_sees_the_types(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "import ddpm\nreveal_type(ddpm.load('latest').sample(4))\nddpm.load('a').sample('four')\nddpm.lead\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--cache-dir",
            str(tmp_path / "c"),
            str(tmp_path / "user.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"MYPYPATH": str(ROOT / "src"), "PATH": ""},
    )
    assert 'Revealed type is "torch._tensor.Tensor"' in done.stdout, done.stdout
    assert 'incompatible type "str"' in done.stdout
    # a module's __getattr__ answers for every name, so mypy cannot know that this one is wrong; Python does
    assert done.stdout.count("error:") == 1


def test_a_run_folder_a_file_and_latest_are_one_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = [path for path in locate.of_run(home / "run") if path.name.startswith("step_")]
    monkeypatch.chdir(home)
    (home / "outputs").mkdir(exist_ok=True)
    (home / "outputs" / "again").symlink_to(home / "run")
    models = [ddpm.load(ckpt, "cpu") for ckpt in (file, str(home / "run"), "outputs/again")]
    for other in models[1:]:
        assert torch.equal(other.sample(2, num_steps=2), models[0].sample(2, num_steps=2))
    assert models[0].step == 2 and models[0].figures["val_eps_mse"] > 0
    assert models[0].facts.name == "digits" and models[0].config.trainer.max_steps == 2
    ema, last = (
        torch.cat([p.flatten() for p in ddpm.load(file, "cpu", ema=ema).network.parameters()])
        for ema in (True, False)
    )
    assert not torch.equal(ema, last)


def test_images_are_those_of_ddpm_sample(home: Path) -> None:
    typed = ["sampler=ddim", "sampler.num_steps=5", "sampler.eta=0.5", "label=[3,1]", "guidance_scale=2"]
    arguments = ["ckpt=run", "n=5", "seed=7", "device=cpu", "save=[npz]", "out=drawn", "batch_size=5"]
    done = run_script("sample", *arguments, *typed, cwd=home)
    assert done.returncode == 0, done.stderr
    expected = np.load(home / "drawn" / "samples.npz")["images"]
    model = ddpm.load(home / "run", device="cpu")
    options: dict[str, Any] = {
        "label": [3, 1],
        "guidance_scale": 2,
        "sampler": "ddim",
        "num_steps": 5,
        "eta": 0.5,
    }
    images = model.sample(5, seed=7, **options)
    assert images.shape == (5, 1, 8, 8) and images.dtype == torch.float32 and images.device == CPU
    assert images.abs().max() <= 1
    assert (ddpm.to_uint8(images)[..., 0] == expected).all() and expected.std() > 10
    # and with nothing said, the sampler of the training
    done = run_script("sample", "ckpt=run", "n=2", "device=cpu", "save=[npz]", "out=plain", cwd=home)
    assert (ddpm.to_uint8(model.sample(2))[..., 0] == np.load(home / "plain" / "samples.npz")["images"]).all()


def test_an_image_is_named_by_seed_and_index(model: ddpm.Model) -> None:
    whole = model.sample(6, num_steps=4)
    assert (model.sample(index=[5, 2], num_steps=4) - whole[[5, 2]]).abs().max() < 1e-4
    assert (model.sample(6, num_steps=4, batch_size=4) - whole).abs().max() < 1e-4
    assert (model.sample(6, num_steps=4, seed=1) - whole).abs().max() > 0.1
    assert (model.sample(6, num_steps=4, label=0) - whole)[1:].abs().max() > 1e-3
    numpy = model.sample(np.int64(2), index=np.array([5, 2]), label=torch.arange(10), num_steps=np.int64(4))
    assert (numpy - whole[[5, 2]]).abs().max() < 1e-4


def test_images_are_tensors_like_any_other(model: ddpm.Model) -> None:
    images = model.sample(2, num_steps=2)
    assert not images.is_inference() and not images.requires_grad
    weight = torch.ones((), requires_grad=True)
    (images * weight).sum().backward()  # which an inference tensor refuses
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": -5}, "n=-5: must be a number from 1 to"),
        ({"n": 2.5}, "n=2.5: must be a number from 1 to"),
        ({"seed": -1}, "seed=-1: must be"),
        ({"label": 10}, "label=10: digits has the labels 0 to 9"),
        ({"label": "cat"}, "label=cat: digits has the labels 0 to 9"),
        ({"index": [-1]}, "index=-1"),
        ({"index": []}, r"index=\[\]: must be a number, or a list of at least one"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"sampler": "ddimm"}, "sampler=ddimm: must be one of ddim, ddpm, .*did you mean 'ddim'"),
        ({"num_steps": 0}, "sampler.num_steps=0: must be a number from 1"),
        ({"num_steps": 1001}, "sampler.num_steps = 1001: .* 1000"),
        ({"steps": 20}, "unknown key 'sampler.steps'; did you mean 'num_steps'"),
        ({"sampler": "dpmpp_2m", "eta": 0.0}, "unknown key 'sampler.eta'"),
        ({"sampler": "ddpm", "variance": "learned"}, "sampler.variance=learned: this model was trained with"),
        ({"spacing": "karas"}, "sampler.spacing"),
        ({"clip": "clipp"}, "sampler.clip=clipp: must be one of none, clip, dynamic"),
    ],
    ids=name_of,
)
def test_a_mistake_is_one_line_with_its_key(model: ddpm.Model, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ddpm.UserError, match=words) as refusal:
        model.sample(**{"n": 2, "num_steps": 2, **options})
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_loaded_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    for ckpt, words in ((tmp_path / "none", "does not exist"), (tmp_path / "a.pt", "can run code")):
        with pytest.raises(ddpm.UserError, match=words):
            ddpm.load(ckpt)


def test_a_broken_newest_checkpoint_is_warned_of(tmp_path: Path) -> None:
    run = prepare(config(), tiny_data(), CPU)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (3, 9):
        run.step = step
        save(run, folder / f"step_{step:07d}.safetensors", {})
    newest = folder / "step_0000009.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="step_0000009.*is broken") as said:
        model = ddpm.load(tmp_path, device="cpu")
    assert model.step == 3 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddpm.load(folder / "step_0000003.safetensors", device="cpu")
    with pytest.raises(ddpm.UserError, match="conditional=true"):
        model.sample(1, label=0)


def test_out_of_memory_halves_the_batch_with_a_warning(
    model: ddpm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, forward = model.sample(5, num_steps=2), model.network.forward

    def small(x: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *others)

    monkeypatch.setattr(model.network, "forward", small)
    with pytest.warns(RuntimeWarning, match="batch_size=2") as said:
        halves = model.sample(5, num_steps=2)
    assert (halves - whole).abs().max() < 1e-4 and said[0].filename == __file__


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def callers_state() -> list[object]:
    with torch.device("cpu"):
        numbers = torch.random.get_rng_state().tolist()
    precisions = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    return [
        *(torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), numbers),
        *(torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()),
        *(torch.get_float32_matmul_precision(), [kind.fp32_precision for kind in precisions]),
    ]


@pytest.mark.parametrize(
    "world",
    [
        *(partial(default_dtype, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
        *(partial(torch.device, name) for name in ("meta", "cpu")),
        *(partial(torch.autocast, "cpu", dtype) for dtype in (torch.bfloat16, torch.float16)),
        *(torch.inference_mode, torch.no_grad, partial(matmul_precision, "medium")),
    ],
    ids=name_of,
)
def test_a_callers_world_changes_nothing_and_is_not_changed(
    home: Path, model: ddpm.Model, world: Callable[[], AbstractContextManager[Any]]
) -> None:
    wanted = {"label": [3, 1], "guidance_scale": 2, "num_steps": 3, "sampler": "dpmpp_2m_sde"}
    expected, loaded = model.sample(3, **wanted), ddpm.load(home / "run", device="cpu").sample(2, num_steps=2)
    with world():
        before = callers_state()
        drawn, other = model.sample(3, **wanted), ddpm.load(home / "run", device="cpu")
        again = other.sample(2, num_steps=2)
        assert callers_state() == before
    assert drawn.dtype == torch.float32 and torch.equal(drawn, expected) and torch.equal(again, loaded)
    assert not drawn.is_inference()
    for parameter in other.network.parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad and not parameter.is_inference()


def test_threads_that_draw_at_once_leave_the_precision_alone(model: ddpm.Model) -> None:
    expected, matmul = model.sample(2, num_steps=3), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with ThreadPoolExecutor(4) as pool:
            drawn = list(pool.map(lambda _: model.sample(2, num_steps=3), range(8)))
        assert matmul.fp32_precision == "tf32" and all(torch.equal(x, expected) for x in drawn)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    "arguments",
    [
        *({"n": n} for n in (0, -1, 2.5, "4", True, None, 10**400)),
        *({"seed": seed} for seed in (-1, 1.5, 2**64)),
        *({"index": index} for index in ([], [[1]], [-1], {1}, np.array([0.5]), torch.tensor([True]))),
        *({"label": label} for label in ([99], "cat", 1.0, [], torch.zeros(2, 2))),
        *({"guidance_scale": scale} for scale in (float("nan"), -1, "x", 2j, torch.ones(2))),
        *({"sampler": sampler} for sampler in (5, "", ["ddim"], {})),
        *({"batch_size": size} for size in (0, 2.0)),
        *({"num_steps": steps} for steps in (0, 1e9, [3], torch.tensor(3.5))),
        *({"spacing": spacing} for spacing in ([5, 7], {}, object())),
        *({"eta": 2}, {"clip": None}, {"dynamic_percentile": float("nan")}, {"nonsense": 1}),
    ],
    ids=name_of,
)
def test_a_wrong_argument_of_sample_is_named(model: ddpm.Model, arguments: dict[str, Any]) -> None:
    with pytest.raises(ddpm.UserError, match=next(iter(arguments))) as caught:
        model.sample(**{"n": 1, "num_steps": 2, "sampler": "ddim", **arguments})
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers(model: ddpm.Model) -> None:
    expected = model.sample(2, num_steps=2, label=[3, 1], seed=5)
    for number, many in ((np.int64, np.array), (torch.tensor, torch.tensor)):
        drawn = model.sample(number(2), num_steps=number(2), label=many([3, 1]), seed=number(5))
        assert torch.equal(drawn, expected)
        assert torch.equal(
            model.sample(index=many([0, 1]), num_steps=2, label=many([3, 1]), seed=5), expected
        )


@pytest.mark.parametrize(
    "words, arguments",
    [
        *(("does not exist", {"ckpt": ckpt}) for ckpt in (None, 5, b"run", ["run"], "a\0b")),
        *(("too long", {"ckpt": "x" * 5000}), ("holds no checkpoint", {"ckpt": ""})),
        *(("device=", {"device": d}) for d in (0, None, "meta", torch.device("meta"), "cuda:99999999")),
        *(("ema=", {"ema": ema}) for ema in ("no", None, 1)),
    ],
    ids=name_of,
)
def test_a_wrong_argument_of_load_is_named(words: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ddpm.UserError, match=words):
        patch.chdir(tmp_path)
        ddpm.load(**{"ckpt": "latest", **arguments})


def with_default(default: Any) -> Callable[..., Any]:
    def mine(num_timesteps, odd=default): ...  # type: ignore[no-untyped-def]

    return mine


@pytest.mark.parametrize(
    "words, kind, function, more",
    [
        *(("must be one of schedule, ", kind, len, {}) for kind in ([], None, 5, "schedules")),
        *(("a name is made of", "schedule", with_default(1), {"name": name}) for name in (5, "a b", "ü")),
        ("a name is made of", "schedule", partial(with_default(1)), {}),
        *(("must be a function or class", "schedule", what, {"name": "mine"}) for what in (7, int)),
        *(("odd", "schedule", with_default(default), {}) for default in (object(), {}, [{}], 2j, len)),
        ("takes no a", "weight", lambda snr: snr, {"name": "mine", "a": 1}),
        ("num_steps=x", "sampler", lambda denoiser, levels, x, noise: x, {"name": "mine", "num_steps": "x"}),
    ],
    ids=name_of,
)
def test_what_cannot_be_registered_is_named(
    words: str, kind: Any, function: Any, more: dict[str, Any]
) -> None:
    with pytest.raises(ddpm.UserError, match=words):
        ddpm.register(kind, **more)(function)
    assert "mine" not in choices("schedule") | choices("sampler")


def test_save_grid(model: ddpm.Model, tmp_path: Path) -> None:
    ddpm.save_grid(model.sample(6, num_steps=2), tmp_path / "a.png", nrow=3)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 58 + 2, 2 * 58 + 2) and picture.mode == "L"
    with pytest.raises(OSError):
        ddpm.save_grid(torch.zeros(1, 1, 8, 8), tmp_path / "none" / "a.png")


def test_the_suffix_decides_the_format(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
    shown = {}
    for suffix, kind in (
        *((".png", "PNG"), (".PNG", "PNG"), (".jpg", "JPEG"), (".jpeg", "JPEG"), (".bmp", "BMP")),
        *((".gif", "GIF"), (".webp", "WEBP")),
    ):
        for channels in (1, 3):
            ddpm.save_grid(x[:, :channels], tmp_path / f"g{suffix}")
            with Image.open(tmp_path / f"g{suffix}") as picture:
                assert picture.format == kind
                shown[kind, channels] = np.asarray(picture.convert("RGB")).astype(int)
    for (kind, channels), pixels in shown.items():
        apart = np.abs(pixels - shown["PNG", channels]).mean()
        assert apart < (5 if kind in ("JPEG", "GIF") else 0.01), kind
    ddpm.save_grid(x, tmp_path / "none")
    with Image.open(tmp_path / "none") as picture:
        assert picture.format == "PNG"
    for name in ("g.tiff", "g.txt", "g.png.gz", "g.pn", 5, None, b"g.png"):
        with pytest.raises(ddpm.UserError, match=r"path=.*must be a path that ends with one of \.png"):
            ddpm.save_grid(x, name if isinstance(name, int | bytes | None) else tmp_path / name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images",
    [
        *(torch.zeros(shape) for shape in ((8, 8), (1, 8, 8), (0, 1, 8, 8), (2, 2, 8, 8), (2, 4, 8, 8))),
        *(torch.zeros(shape) for shape in ((2, 0, 8, 8), (2, 1, 0, 8), (1, 2, 1, 8, 8))),
        *(
            torch.zeros(2, 1, 8, 8, dtype=dtype)
            for dtype in (torch.uint8, torch.int64, torch.bool, torch.cfloat)
        ),
        *(torch.full((2, 1, 8, 8), value) for value in (torch.nan, torch.inf)),
        *(np.zeros((2, 1, 8, 8), np.float32), [torch.zeros(1, 8, 8)], None),
        *(torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, 1, 8, 8).to_sparse()),
        *(torch.zeros(2, 1, 8, 8).to_mkldnn(), torch.nested.nested_tensor([torch.zeros(1, 8, 8)] * 2)),
    ],
    ids=lambda x: f"{getattr(x, 'dtype', '')} {getattr(x, 'layout', '')} {type(x).__name__}",
)
def test_what_is_no_images_is_refused_and_nothing_written(images: Any, tmp_path: Path) -> None:
    with pytest.raises(ddpm.UserError, match=r"^images: "):
        ddpm.save_grid(images, tmp_path / "g.png")
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_grid_and_every_floating_point_dtype(tmp_path: Path) -> None:
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    expected = ddpm.to_uint8(x).astype(int)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        rounded = np.abs(ddpm.to_uint8(x.to(dtype)).astype(int) - expected).max()
        assert rounded <= (1 if dtype == torch.bfloat16 else 0) or (dtype == torch.float16 and rounded <= 1)
        assert np.array_equal(ddpm.to_uint8(x.to(dtype)), ddpm.to_uint8(x.to(dtype).float()))
    for nrow in (0, -1, 2.0, "3", True, [2], torch.tensor(2)):
        with pytest.raises(ddpm.UserError, match="nrow="):
            ddpm.save_grid(x, tmp_path / "g.png", nrow=nrow)  # type: ignore[arg-type]
    for nrow in (3, np.int64(3), 10**12):
        ddpm.save_grid(x.requires_grad_(), tmp_path / "g.png", nrow=nrow)  # type: ignore[arg-type]
        with Image.open(tmp_path / "g.png") as picture:
            assert picture.size == ((3 if nrow == 3 else 6) * 58 + 2, (2 if nrow == 3 else 1) * 58 + 2)


def test_bf16_is_the_networks_alone_and_near_float32(model: ddpm.Model) -> None:
    low = replace(model, precision=torch.bfloat16)
    whole, rounded = (each.sample(8, sampler="ddim", num_steps=4) for each in (model, low))
    assert rounded.dtype == torch.float32
    error = (whole - rounded).square().mean().sqrt().item()
    assert 0 < error < 0.05
