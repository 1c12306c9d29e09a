"""ddpm-eval: the protocol, images from elsewhere (hostile ones, too), its files, its table, its manners."""

import dataclasses
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
from ddpm import build
from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint.header import Meta
from ddpm.cli import eval_keys
from ddpm.cli import evaluate as command
from ddpm.config import hydra, schema
from ddpm.config.choices import Component, choices
from ddpm.config.schema import TrainConfig, check, to_dict
from ddpm.data.dataset import Dataset, Split
from ddpm.errors import UserError
from ddpm.evaluate import evaluator, page, record, reference, samples, table
from ddpm.evaluate import run as evaluation_run
from ddpm.evaluate.metrics import cas
from ddpm.evaluate.metrics.likelihood import likelihood
from ddpm.evaluate.metrics.registry import METRICS
from ddpm.evaluate.record import Evaluation, Metric
from ddpm.evaluate.reference import Found, Reference, Samples
from ddpm.io import npz
from ddpm.sample.model import load

pytestmark = pytest.mark.xdist_group("evaluate")  # one worker, which makes its fixtures once
CPU = torch.device("cpu")
DIGITS = Component("digits", {})
BIN = Path(sys.executable).parent
QUICK = ["measure=[distance,neighbours,memorization]", "sampler.num_steps=2", "device=cpu"]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return build.dataset(DIGITS, "nowhere")


@pytest.fixture(scope="module")
def bench(digits: Dataset) -> Reference:
    return Reference(digits, ("distance", "neighbours", "memorization"), 600, CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """Of a conditional model that was never trained."""
    folder = tmp_path_factory.mktemp("home") / "run"
    typed = ["model.channels=[8,16]", "model.head_dim=8", "model.conditional=true"]
    config: TrainConfig = check(TrainConfig, hydra.compose("train", typed))
    torch.manual_seed(0)
    weights = build.network(config.model, config.objective, digits.facts).state_dict()
    weights = {name: value + 0.1 * torch.randn(value.shape) for name, value in weights.items()}  # none is 0
    tensors = {
        f"{part}.{name}": value.clone() for part in ("model", "ema") for name, value in weights.items()
    }
    (folder / "checkpoints").mkdir(parents=True)
    meta = Meta(to_dict(config), dataclasses.asdict(digits.facts), 2, {}, {}, "")
    checkpoint.save(folder / "checkpoints" / "step_0000002.safetensors", tensors, meta)
    return folder


def ddpm_eval(*arguments: str) -> None:
    """What the command does with these arguments, its errors raised."""
    typed = hydra.read_overrides(list(arguments))
    config = check(schema.EvalConfig, hydra.compose("eval", eval_keys.before_typed(typed) + typed))
    command.evaluate(config)


def measured(bench: Reference, images: torch.Tensor, labels: torch.Tensor | None = None) -> Evaluation:
    return evaluator.measure(Samples(images, labels, bench), subject="these")[0]


# The protocol


def test_the_same_checkpoint_and_seed_give_the_same_numbers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbers(out: str, *more: str) -> dict[str, Any]:
        ddpm_eval(f"ckpt={run}", "n=120", f"out={tmp_path / out}", *QUICK, *more)
        assert str(tmp_path / out / "evaluation.json") in capsys.readouterr().out
        result: dict[str, Any] = json.loads((tmp_path / out / "evaluation.json").read_text())
        del result["protocol"]["seconds"], result["protocol"]["batch_size"]
        return result

    first = numbers("a")
    monkeypatch.setattr(page, "draw", lambda *_: None)  # once is enough
    assert numbers("b", "batch_size=50") == first
    other = numbers("c", "seed=1")
    assert other["figures"]["fd"] != first["figures"]["fd"]
    assert other["figures"]["real_fd"] == first["figures"]["real_fd"]  # which knows no seed
    assert first["protocol"]["evaluations_per_image"] == 2 and "right_class" in first["figures"]
    assert Image.open(tmp_path / "a" / "evaluation.png").size > (800, 600)


def test_a_conditional_model_is_asked_for_all_classes_alike(run: Path) -> None:
    model = ddpm.load(run / "checkpoints" / "step_0000002.safetensors", CPU)
    sampler = Component("ddim", {**_sampler("ddim"), "num_steps": 2})
    drawn = evaluator.draw(model, sampler, n=23, seed=3, batch_size=7)
    assert drawn.labels is not None and drawn.labels.tolist() == [i % 10 for i in range(23)]
    assert drawn.images.dtype == torch.uint8 and drawn.images.shape == (23, 1, 8, 8)
    assert drawn.evaluations == drawn.num_steps == 2
    as_sampled = model.sample(23, seed=3, sampler="ddim", num_steps=2)
    assert torch.equal(drawn.images, ((as_sampled + 1) * 127.5).round().to(torch.uint8))


def _sampler(name: str) -> dict[str, Any]:
    return {key: value for key, value in choices("sampler")[name].items() if key != "name"}


def test_test_images_lie_at_distance_0_and_are_found_out(bench: Reference, digits: Dataset) -> None:
    found = measured(bench, digits.test.images, digits.test.labels)
    assert found.figures["fd"].value < 1e-8
    assert found.figures["fd_excess"].value < 0  # the floor is taken off where there is none
    assert found.figures["precision"].value == found.figures["recall"].value == 1
    assert "180 of 180 images are test images themselves: by construction" in " ".join(found.notes)


@pytest.mark.slow
def test_training_images_score_as_the_row_of_real_images(bench: Reference, digits: Dataset) -> None:
    """Others than those that the row is of."""
    found = measured(bench, digits.train.images[-500:]).figures
    excess, real = found["fd_excess"], found["real_fd_excess"]
    assert excess.low is not None and excess.high is not None and real.low is not None
    assert excess.low < 0 < excess.high and real.low < 0  # one distribution, within the interval
    assert abs(found["precision"].value - found["real_precision"].value) < 0.08
    assert found["memorized"].value == 1 and found["memorized"].text == "500 identical"
    assert "real_bits_per_dim" not in found and "bits_per_dim" not in found


def test_what_there_are_too_few_images_for_is_absent_and_said(digits: Dataset) -> None:
    small = Reference(digits, tuple(name for name in METRICS if name != "fid"), 20, CPU)
    found = measured(small, digits.train.images[:20], digits.train.labels[:20])  # type: ignore[index]
    text = " ".join(found.notes)
    for name in ("fd", "fd_excess", "pixel_fd", "kid", "precision", "class_fd_excess", "cas", "bits_per_dim"):
        assert name not in found.figures and f"real_{name}" not in found.figures
        assert name in text, name
    assert found.figures["confident"].n == 20


def test_the_accuracy_score_of_real_images_is_computed_once(
    digits: Dataset, bench: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def score(train: Split, *_: object) -> Metric:
        scored.append(len(train))
        return Metric(len(scored) / 10)

    monkeypatch.setattr(cas, "PER_CLASS", 0)
    monkeypatch.setattr(cas, "accuracy_score", score)
    few = Samples(digits.train.images[:9], digits.train.labels[:9], bench)  # type: ignore[index]
    first, second = (cas.cas(few, bench).values for _ in range(2))
    assert first["real_cas"] == second["real_cas"] and first["cas"] != second["cas"] and scored == [9] * 3


def test_beside_guided_images_stand_those_without_guidance(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Evaluation] = []
    monkeypatch.setattr(page, "draw", lambda evaluation, *_: drawn.append(evaluation))
    common = [f"ckpt={run}", "n=60", "measure=[distance]", "sampler.num_steps=2", "device=cpu"]
    guided = ["guidance_scale=2", "guidance_interval=[0,1]", "guidance_rescale=0.5"]
    ddpm_eval(*common, *guided, f"out={tmp_path / 'guided'}")
    text = capsys.readouterr().out
    ddpm_eval(*common, f"out={tmp_path / 'plain'}")
    assert "without guidance" not in capsys.readouterr().out
    made, plain = (record.read(str(tmp_path / name)) for name in ("guided", "plain"))
    own = {name: figure for name, figure in plain.figures.items() if not name.startswith("real_")}
    assert made.unguided == own and not plain.unguided
    assert made.figures["kid"] != own["kid"] and made.figures["real_kid"] == plain.figures["real_kid"]
    said = "guidance_scale=2, guidance_rescale=0.5, guidance_interval=[0.0, 1.0]"
    assert said in text and "without guidance" in text.splitlines()[0] and " unguided " in text
    assert [made.protocol[key] for key in ("guidance_scale", "guidance_rescale")] == [2, 0.5]
    assert 2 < made.protocol["evaluations_per_image"] < 4 and drawn[0] == made
    monkeypatch.undo()
    page.draw(made, evaluator.Gallery(torch.zeros(3, 1, 8, 8).byte(), torch.empty(0)), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size > (800, 600)


def test_features_without_classes_are_said(bench: Reference, digits: Dataset) -> None:
    class Classless(reference.Embedder):
        def embed(self, images: torch.Tensor) -> reference.Embedded:
            return super().embed(images)._replace(probabilities=None)

    blind = dataclasses.replace(bench, parts=("distance",))
    vars(blind)["embedder"] = Classless(*bench.embedder)
    found = measured(blind, digits.train.images[:300])
    assert "fd" in found.figures and "confident" not in found.figures and not found.histogram
    assert [note for note in found.notes if "no figures of classes: the features digits" in note]


def test_images_that_are_real_or_repeated_are_counted(digits: Dataset) -> None:
    train, test = digits.train.images, digits.test.images
    own = torch.cat([train[:3], test[:2], train[:1], 255 - train[:1].roll(1, 3)])
    notes = reference.copies(own, Reference(digits, (), 9, CPU))
    assert [note.split(" image")[0] for note in notes] == ["2 of 7", "4 of 7", "1 of 7"]


def test_odds_that_cannot_be_had_leave_the_rest(run: Path, digits: Dataset) -> None:
    model, _ = load(run / "checkpoints" / "step_0000002.safetensors", CPU)
    two = dataclasses.replace(digits.facts, levels=2)  # which these images do not keep to

    def measured(data: Dataset) -> Found:
        reference = Reference(data, ("likelihood",), 40, CPU)
        return likelihood(Samples(data.test.images[:40], None, reference, model=model), reference)

    odds = measured(dataclasses.replace(digits, facts=two))
    assert odds.values.keys() == {"eps_loss", "eps_loss_train"}
    assert odds.details["curves"].keys() == {"test", "train"}
    assert odds.notes == ["no bits_per_dim: levels = 2: the images have greys between these levels"]
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    odds = measured(digits)
    assert not odds.values and not odds.details["curves"] and len(odds.notes) == 3
    assert all("are not finite" in note for note in odds.notes)


def test_a_metric_of_ones_own_is_measured_and_shown(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def ink(samples: Samples, reference: Reference) -> float:
        return samples.images.double().mean().item() / 255

    monkeypatch.setitem(METRICS, "ink", ink)
    found = measured(Reference(digits, ("ink",), 20, CPU), digits.train.images[:20])
    assert found.figures["ink"].value == digits.train.images[:20].double().mean().item() / 255
    assert found.protocol["measure"] == ["ink"] and "feature_network" not in found.protocol
    assert "ink" in table.table([found]) and f"{found.figures['ink'].value:.3f}" in table.table([found])


def test_images_of_another_kind_are_refused(bench: Reference) -> None:
    for images in (torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 9, 8).byte(), torch.zeros(0, 1, 8, 8).byte()):
        with pytest.raises(ValueError, match="do not fit those of digits"):
            measured(bench, images)


CORRUPTIONS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str, int]] = {
    # what is done to images (with labels), the figure that must notice, and whether it rises or falls
    "blur": (lambda x, y: _blurred(x), "fd_excess", 1),
    "noise": (lambda x, y: _noisy(x), "fd_excess", 1),
    "inverted": (lambda x, y: 255 - x, "fd_excess", 1),
    "a class dropped": (lambda x, y: x[y != 3], "rarest_class", -1),
    "few, repeated": (lambda x, y: x[:30].repeat(len(x) // 30, 1, 1, 1), "coverage", -1),
}


def _blurred(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(x.float(), 3, 1, 1, count_include_pad=False).round().byte()


def _noisy(x: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 40
    return (x + noise).clamp(0, 255).round().byte()


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in list(CORRUPTIONS)[1:]), "blur"],
)
def test_what_is_wrong_with_images_shows(bench: Reference, digits: Dataset, name: str) -> None:
    corrupt, figure, direction = CORRUPTIONS[name]
    images, labels = digits.train.images[-600:], digits.train.labels
    assert labels is not None
    good, bad = (measured(bench, x).figures for x in (images, corrupt(images, labels[-600:])))
    before, after = good[figure], bad[figure]
    margin = max(0.05, (before.high or 0) - before.value)  # beyond what chance does
    assert direction * (after.value - before.value) > margin, (before, after)


@pytest.mark.slow
def test_everything_at_once_alone_and_by_two_processes(run: Path, tmp_path: Path) -> None:
    """All parts, by the installed command: two processes under torchrun give what one gives."""
    both = []
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "--no-python"]
    for name, before in (("one", []), ("two", torchrun)):
        arguments = [f"ckpt={run}", "n=301", f"out={tmp_path / name}", "sampler.num_steps=2", "device=cpu"]
        line = [*before, str(BIN / "ddpm-eval"), *arguments]
        result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("Fréchet distance") == 1
        both.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
        assert set(both[-1]["protocol"].pop("seconds")) >= {"sampling", "measuring", "likelihood", "cas"}
    one, two = both
    assert one["figures"].keys() >= {
        "fd",
        "kid",
        "cas",
        "real_cas",
        "memorized",
        "bits_per_dim",
        "eps_loss_train",
    }
    for name, figure in one["figures"].items():  # sums in another order, of the network, too
        assert two["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-4, abs=1e-6), name


# Images from elsewhere


def saved(path: Path, **arrays: Any) -> str:
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)
    return str(path)


def read(text: str, digits: Dataset, n: int = 1000) -> samples.LoadedSamples:
    return samples.read(text, digits, DIGITS, n, 0, "nowhere")


def test_npz_is_read_as_it_was_written(tmp_path: Path, digits: Dataset) -> None:
    images, labels = digits.test.images, digits.test.labels
    assert labels is not None
    ours = saved(tmp_path / "ours.npz", images=images[:, 0].numpy(), labels=labels.numpy())
    others = saved(
        tmp_path / "others.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.int().numpy()
    )
    for file in (ours, others):
        found = read(file, digits)
        assert torch.equal(found.images, images) and torch.equal(found.labels, labels)  # type: ignore[arg-type]
    some = read(ours, digits, n=50)
    assert len(some.images) == 50 and "180 images: 50 of them" in some.notes[0]
    rows = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert some.labels is not None
    assert all(rows[x.numpy().tobytes()] == y for x, y in zip(some.images, some.labels, strict=True))
    assert len(some.labels.unique()) > 5  # drawn, not the first of a sorted file


@pytest.mark.slow
def test_ddpm_samples_own_npz_is_read(run: Path, tmp_path: Path, digits: Dataset) -> None:
    from ddpm.cli import sample
    from ddpm.config.schema import SampleConfig

    typed = [
        f"ckpt={run}",
        "n=12",
        "sampler.num_steps=2",
        "save=[npz,images]",
        f"out={tmp_path}",
        "device=cpu",
    ]
    sample.sample(check(SampleConfig, hydra.compose("sample", hydra.read_overrides(typed))))
    found = read(str(tmp_path / "samples.npz"), digits)
    assert found.labels is not None and found.labels.tolist() == [i % 10 for i in range(12)]
    assert torch.equal(
        read(str(tmp_path / "images"), digits).images, found.images
    )  # and its folder of pictures


ZEROS = np.zeros((4, 8, 8), np.uint8)


def header_of(descr: str, shape: str, body: bytes = b"") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def zipped(path: Path, **members: bytes) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return str(path)


def damaged(path: Path, place: int) -> str:
    saved(path, images=np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    return str(path)


def shortened(path: Path) -> str:
    saved(path, images=ZEROS)
    path.write_bytes(path.read_bytes()[:-30])
    return str(path)


def many_entries(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(12_000):
            archive.writestr(f"{i:0100d}.npy", b"")
    return str(path)


def nameless(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", header_of("'|u1'", "(4, 8, 8)", bytes(256)))
    return str(path)


def marked(path: Path, place: int, value: int) -> str:
    """Another byte at this place of both of the archive's headers of an entry."""
    data = bytearray(Path(saved(path, images=ZEROS)).read_bytes())
    for header in (data.index(b"PK\x03\x04") + place - 2, data.index(b"PK\x01\x02") + place):
        data[header] = value
    path.write_bytes(data)
    return str(path)


HOSTILE: dict[str, tuple[Callable[[Path], str], str]] = {
    "objects": (lambda p: saved(p, images=np.array([{}], object)), "must be whole numbers"),
    "code in the header": (
        lambda p: zipped(p, images=header_of("__import__('os').system('false')", "(4, 8, 8)", bytes(256))),
        "no array of numpy",
    ),
    "a bomb": (
        lambda p: zipped(p, images=header_of("'|u1'", "(40000000, 8, 8)", bytes(1 << 20))),
        "allowed: 1 to",
    ),
    "fewer bytes than it says": (
        lambda p: zipped(p, images=header_of("'|u1'", "(4000, 8, 8)", bytes(99))),
        "as many bytes",
    ),
    "more bytes than it says": (
        lambda p: zipped(p, images=header_of("'|u1'", "(4, 8, 8)", bytes(1 << 20))),
        "as many bytes",
    ),
    "numbers without end": (
        lambda p: zipped(p, images=header_of("'|u1'", f"({'9' * 5000}, 8, 8)")),
        "a header of",
    ),
    "an endless header": (
        lambda p: zipped(p, images=b"\x93NUMPY\x02\x00\xff\xff\xff\xff"),
        "a header of at most 4096",
    ),
    "truth in eight bytes": (
        lambda p: zipped(p, images=header_of("'|b8'", "(4, 8, 8)", bytes(2048))),
        "no array of numpy",
    ),
    "a name without its ending": (nameless, "has no array 'images'"),
    "no array": (lambda p: zipped(p, images=b"hello"), "no array of numpy"),
    "many entries": (many_entries, "too many entries"),
    "damaged": (lambda p: damaged(p, 600), "no whole .npz file"),
    "cut off": (lambda p: shortened(p), "no whole .npz file"),
    "a password": (lambda p: marked(p, 8, 1), "no whole .npz file"),
    "a compression of its own": (lambda p: marked(p, 10, 98), "no whole .npz file"),
    "no zip": (lambda p: str(p) if p.write_bytes(b"PK" * 50) else "", "no whole .npz file"),
    "floats": (lambda p: saved(p, images=ZEROS / 255), "must be whole numbers"),
    "wide numbers": (lambda p: saved(p, images=ZEROS.astype(np.int64)), "must be uint8"),
    "another size": (
        lambda p: saved(p, images=np.zeros((4, 16, 16), np.uint8)),
        "16×16×1, those of digits 8×8×1",
    ),
    "colours": (lambda p: saved(p, images=np.zeros((4, 8, 8, 3), np.uint8)), "8×8×3, those of digits 8×8×1"),
    "no images": (lambda p: saved(p, images=ZEROS[:0]), "allowed: 1 to"),
    "another name": (lambda p: saved(p, pictures=ZEROS), "has no array 'images'"),
    "too few labels": (lambda p: saved(p, images=ZEROS, labels=np.zeros(3, int)), "labels of shape (3,)"),
    "strange labels": (lambda p: saved(p, images=ZEROS, labels=np.array([0, 1, 2, 10])), "must be 0 to 9"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_as_it_should_be_is_refused(tmp_path: Path, digits: Dataset, name: str) -> None:
    make, message = HOSTILE[name]
    with pytest.raises(UserError) as caught:
        read(make(tmp_path / "it.npz"), digits)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_no_byte_of_a_file_makes_more_than_one_line(tmp_path: Path, digits: Dataset) -> None:
    """Every byte flipped, one at a time: either the same images, or a line."""
    file = tmp_path / "it.npz"
    saved(file, images=np.arange(128, dtype=np.uint8).reshape(2, 8, 8))
    whole, refused = file.read_bytes(), 0
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            assert read(str(file), digits).images.flatten().tolist() == list(range(128))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(whole) / 3


def test_memory_follows_the_file_not_its_claims(tmp_path: Path) -> None:
    """A gigabyte that is not there is not reserved."""
    import tracemalloc

    claim = header_of("'|u1'", "(16000000, 8, 8)", bytes(1 << 16))
    path = Path(zipped(tmp_path / "it.npz", images=claim))
    tracemalloc.start()
    with pytest.raises(UserError, match="as many bytes"), npz.opened(path) as archive:
        npz.read(archive, "images", lambda header: None)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("L", (9, 8), "b.png is 8×9, those of digits 8×8×1; nothing is scaled"),
        ("RGB", (8, 8), "b.png is coloured, the images of digits are grey"),
        ("RGBA", (8, 8), "b.png is transparent"),
    ],
)
def test_pictures_must_be_as_the_datasets(
    tmp_path: Path, digits: Dataset, mode: str, size: tuple[int, int], message: str
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new(mode, size, (1, 2, 3, 4)[: len(mode)] if len(mode) > 1 else 7).save(tmp_path / "b.png")
    with pytest.raises(UserError) as caught:
        read(str(tmp_path), digits)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_opaque_pictures_with_an_alpha_channel_are_read(tmp_path: Path, digits: Dataset, mode: str) -> None:
    images = digits.test.images[:5]
    for number, image in enumerate(images):
        picture = Image.fromarray(image[0].numpy()).convert("L" if mode == "P" else mode)
        if mode == "P":
            picture = picture.convert("P")
            picture.save(tmp_path / f"{number}.png", transparency=bytes([255] * 256))
        else:
            picture.save(tmp_path / f"{number}.png")
    with Image.open(tmp_path / "0.png") as first:
        assert first.has_transparency_data
    assert torch.equal(read(str(tmp_path), digits).images, images)


@pytest.mark.parametrize("name", ["digit {}", "{}", "other {}"])
def test_samples_in_class_folders(tmp_path: Path, digits: Dataset, name: str) -> None:
    """The sub-folder has the name or the number of the class; else there are no labels, and a note says so."""
    assert digits.test.labels is not None
    facts = dataclasses.replace(digits.facts, class_names=tuple(f"digit {k}" for k in range(10)))
    data = dataclasses.replace(digits, facts=facts)
    images, labels = digits.test.images[:40], digits.test.labels[:40]
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = tmp_path / name.format(label) / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(file)
    (tmp_path / "notes.txt").write_text("more")
    found = read(str(tmp_path), data)
    assert "passed over: 1 × .txt (notes.txt)" in found.notes[0]
    order = [i for _, i in sorted((name.format(label), i) for i, label in enumerate(labels.tolist()))]
    assert torch.equal(found.images, images[order])
    if name == "other {}":
        assert (
            found.labels is None and "sub-folder 'other 0' is none of digits (0 'digit 0'" in found.notes[1]
        )
    else:
        assert found.labels is not None and torch.equal(found.labels, labels[order])


def test_what_exists_is_no_dataset(tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run:1", "digits:test"):
        Path(folder).mkdir()
        Image.new("L", (8, 8), 9).save(Path(folder) / "a.png")
        assert read(folder, digits).images.unique().tolist() == [9]
    saved(tmp_path / "digits:train:0.npz", images=np.zeros((2, 8, 8), np.uint8))
    assert len(read("digits:train:0.npz", digits).images) == 2


def test_images_of_a_dataset(digits: Dataset) -> None:
    found = read("digits:train:0-4,9", digits)
    assert torch.equal(found.images, digits.train.images[[0, 1, 2, 3, 4, 9]])
    assert "has 6 images, fewer than n=1,000" in found.notes[0]
    assert len(read("digits:test", digits).images) == 180
    for text, message in {
        "digts:test": "did you mean 'digits'?",
        "digits:tset": "no split 'tset'; must be one of train, val, test",
        "digits:test:5-3": "a rising range",
        "digits:test:180": "the images 0 to 179",
        "digits:test:": "a rising range",
        "folder:test": "give the folder's path as samples",
        "no/such": "there is no such file or folder",
    }.items():
        with pytest.raises(UserError, match="samples=") as caught:
            read(text, digits)
        assert message in str(caught.value), text


# Its files, its table, its page


def evaluation(**changes: Any) -> Evaluation:
    protocol = {
        "dataset": "digits",
        "image_size": 8,
        "split": "test",
        "split_images": 180,
        "n": 180,
        "seed": 0,
    }
    figures = {
        "fd": Metric(1.25, floor=0.5, n=180),
        "fd_excess": Metric(0.75, low=0.5, high=1.0, n=180),
        "real_fd": Metric(0.5, floor=0.5, n=180),
    }
    return dataclasses.replace(Evaluation("runs/a", figures, protocol, notes=("a doubt",)), **changes)


def test_evaluation_json_is_read_back(tmp_path: Path) -> None:
    made = evaluation(histogram={"classes": ["0"], "samples": [1.0], "real": [1.0]})
    record.write(tmp_path / "evaluation.json", made)
    assert record.read(str(tmp_path)) == record.read(str(tmp_path / "evaluation.json")) == made
    with pytest.raises(ValueError):
        record.write(tmp_path / "evaluation.json", evaluation(figures={"fd": Metric(float("nan"))}))
    assert record.read(str(tmp_path)) == made  # as it was


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format_version=2),
        lambda d: d.update(format_version=True),
        lambda d: d.update(subject=7),
        lambda d: d.update(figures=[]),
        lambda d: d["figures"].update(fd={"value": "high"}),
        lambda d: d["figures"].update(fd={"value": 1e999}),
        lambda d: d["figures"].update(fd={"valu": 1.0}),
        lambda d: d["figures"].update(fd={}),
        lambda d: d["figures"].update(fd={"value": 10**400}),
        lambda d: d["figures"].update(fd={"value": 1.0, "low": 1.1, "high": 2.0}),
        lambda d: d["figures"].update(fd={"value": 1.0, "high": 0.9}),
        lambda d: d["protocol"].update(seconds={"sampling": float("inf")}),
        lambda d: d["protocol"].update(seconds={"sampling": "x" * 9999}),
        lambda d: d["protocol"].update(seconds=7),
        lambda d: d["protocol"].update(n=0),
        lambda d: d["protocol"].update(n=2**64),
        lambda d: d["protocol"].update(image_size="x" * 9999),
        lambda d: d["protocol"].update(dataset="x" * 9999),
        lambda d: d["protocol"].update(sampler={"name": ["ddim"]}),
        lambda d: d["figures"].update(fd={"value": True}),
        lambda d: d["figures"].update({str(number): {"value": 1} for number in range(300)}),
        lambda d: d.update(notes=7),
        lambda d: d.clear(),
    ],
)
def test_a_strange_evaluation_json_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    raw = json.loads(json.dumps(evaluation().to_dict()))
    change(raw)
    (tmp_path / "evaluation.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"is no evaluation\.json"):
        record.read_all([str(tmp_path)])


def test_the_table_shows_floor_interval_doubt_and_real_images() -> None:
    text = table.table([evaluation()])
    assert "1.250 (floor 0.500)" in text and "0.750 [0.500, 1.000]" in text and "real images" in text
    assert "note: a doubt" in text and "against 180 test images of digits 8×8" in text
    other = evaluation(subject="runs/\x1b[31mb", protocol={**evaluation().protocol, "n": 90})
    both = table.table([evaluation(), other])
    assert "not to be compared: n differs (180, 90)" in both and "real images" not in both
    assert "\x1b" not in both
    drawn = {**evaluation().protocol, "sampler": {"name": "ddim"}, "guidance_scale": 1.0, "ema": True}
    assert "guidance" not in table.table([evaluation(protocol={**drawn, "precision": "fp32"})])
    unusual = {**drawn, "guidance_scale": 2.5, "ema": False, "precision": "bf16"}
    copied = {"memorized": Metric(0.0, error=0.0, text="7 identical")}
    text = table.table([evaluation(protocol=unusual, figures=copied)])
    assert (
        "guidance_scale=2.5, ema=false, precision=bf16, seed 0" in text
        and "0.0 ± 0.0 % (7 identical)" in text
    )


def test_a_long_text_in_a_file_makes_no_long_table(tmp_path: Path) -> None:
    long = "x" * 100_000
    figures = {"rarest_class": Metric(0.1, text=long[:4000])}
    made = evaluation(
        protocol={**evaluation().protocol, "dataset": long[:4000]}, figures=figures, notes=(long,)
    )
    record.write(tmp_path / "evaluation.json", made)
    lines = table.table([record.read(str(tmp_path))]).splitlines()
    assert max(map(len, lines)) < 4200 and sum(len(line) > 300 for line in lines) == 1  # the note


def test_a_page_that_fails_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "draw", lambda *_: 1 / 0)
    config: Any = SimpleNamespace(out=str(tmp_path / "out"))
    evaluation_run._finish(config, (evaluation(), None), tmp_path / "stem")  # type: ignore[arg-type]
    assert record.read(str(tmp_path / "out")) == evaluation()
    assert "evaluation.png could not be drawn: division by zero" in capsys.readouterr().out


def test_a_page_is_drawn_whatever_there_is(tmp_path: Path) -> None:
    colour = evaluator.Gallery(torch.zeros(3, 3, 8, 8).byte(), torch.empty(0, 2, 3, 8, 8).byte())
    curve = {"t": [0.0, 1.0], "lambda_": [3.0, None], "eps_mse": [1.0, 0.1], "error": [0.1, 0.1]}
    strange = evaluation(subject="costs $5 and $6", notes=("$x",) * 30, curves={"train": curve})
    page.draw(strange, colour, tmp_path / "it.png")
    assert Image.open(tmp_path / "it.png").size > (800, 600)


# Its manners


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ckpt is needed"),
        (["ckpt=a", "samples=b", "dataset=digits"], "ckpt and samples: leave one of them out"),
        (["samples=b.npz"], "name the dataset they are to be like: dataset=mnist"),
        (["samples=b.npz", "dataset=digits"], "there is no such file or folder"),
        (["samples=digits:test", "guidance_scale=2"], "drawn already; must be 1"),
        (["samples=digits:test", "measure=[distence]"], "did you mean 'distance'?"),
        (["samples=digits:test", "measure=[]"], "measure=[]"),
        (["samples=digits:test", "n=0"], "n=0: must be a number from 1"),
        (["samples=digits:test", "out=/dev/null/here"], "cannot write to /dev/null: it is no folder"),
        (["ckpt=a", "dataset.image_size=32"], "name the dataset, too"),
        (["ckpt=nothing"], "nothing does not exist"),
        (["compare=[no/such,b]"], "compare: no/such: cannot be read"),
        (["compare=[]"], "compare=[]"),
        (["samples=digits:test", "features=dinov2"], "name the folder of its weights: features_path=…"),
        (["samples=digits:test", "features=vgg"], "features=vgg: must be one of own, inception, dinov2"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        ddpm_eval(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dataset_that_is_not_the_models_is_refused(run: Path, tmp_path: Path) -> None:
    for i in range(6):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    other = ["dataset=folder", f"dataset.path={tmp_path}"]
    with pytest.raises(UserError, match=r"its classes .*are not those of digits"):
        ddpm_eval(f"ckpt={run}", *other, *QUICK)  # in the model's image size, as none is typed
    with pytest.raises(UserError, match=r"16×16×1, those of this model 8×8×1"):
        ddpm_eval(f"ckpt={run}", *other, "dataset.image_size=16", *QUICK)


@pytest.mark.slow
def test_nothing_is_left_where_something_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "write", full)
    with pytest.raises(UserError, match=r"cannot write to outputs.*No space left"):
        ddpm_eval("samples=digits:test", "measure=[distance]", "device=cpu")
    assert not list(tmp_path.rglob("eval-*")) and capsys.readouterr().out == ""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    ddpm_eval("samples=digits:test", "measure=[distance]", "device=cpu")
    home = Path("outputs/evaluations/eval-1")
    assert sorted(file.name for file in home.iterdir()) == ["evaluation.json", "evaluation.png"]
    ddpm_eval(f"compare=[{home},{home / 'evaluation.json'}]")
    assert capsys.readouterr().out.count("digits:test: 180 images") == 2
