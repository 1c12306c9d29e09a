"""Features: whitening, what is shipped, training at first use, and what the distances in them notice."""

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.data.dataset import Dataset, Split
from ddpm.data.digits import digits
from ddpm.data.info import DatasetInfo
from ddpm.data.mnist import mnist
from ddpm.errors import DataError, UserError
from ddpm.evaluate import evaluator
from ddpm.evaluate.features import extractor, training
from ddpm.evaluate.features.extractor import Features, features_for
from ddpm.evaluate.features.network import FeatureNetwork, halve, initialise, whitening
from ddpm.evaluate.features.pixels import pixel_features
from ddpm.evaluate.features.training import Recipe
from ddpm.evaluate.metrics import cas, fid
from ddpm.evaluate.metrics.cas import accuracy_score
from ddpm.evaluate.provenance import Clock
from ddpm.evaluate.reference import Reference, Samples
from ddpm.io.cache import load_arrays, save_arrays

pytestmark = pytest.mark.xdist_group("features")  # one worker, which makes its fixtures once
CPU = torch.device("cpu")
REAL = os.environ.get("DDPM_TEST_DATA")


def ignore(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits(Path())


@pytest.fixture(scope="module")
def shipped(data) -> Features:
    return features_for(data, CPU, ignore)


def distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance by the book, with scipy."""
    a, b = x.numpy(), y.numpy()
    c, d = np.cov(a.T), np.cov(b.T)
    both = scipy.linalg.sqrtm(c @ d).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * both))


def blurred(images: Tensor) -> Tensor:
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(line, line)[None, None]
    return F.conv2d(images.float(), kernel, padding=1).round().to(torch.uint8)


def noisy(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + strength * noise).clamp(0, 255).round().to(torch.uint8)


def corruptions(split: Split) -> dict[str, Tensor]:
    images, labels = split.images, split.labels
    return {
        "blur": blurred(images),
        "noise": noisy(images, 10),
        "dropped class": images[labels != 1],
        "duplicates": images[torch.arange(len(images)) // 40],
        "inverted": 255 - images,
    }


# Whitening and network


def test_whitening_makes_mean_0_and_covariance_1():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 5
    y = whitening(x, 4)(x)
    assert y.dtype == torch.float64 and y.shape == (500, 4)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(np.cov(y.numpy().T), np.eye(4), atol=1e-8)
    _, _, directions = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), full_matrices=False)
    first = (x.double().numpy() - x.double().numpy().mean(0)) @ directions[0]
    assert abs(np.corrcoef(first, y[:, 0])[0, 1]) > 1 - 1e-9, "the direction of most variance comes first"


def test_whitening_leaves_out_what_does_not_vary_and_refuses_what_is_no_number():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert whitening(torch.cat([x, x, torch.ones(50, 3)], dim=1), 7).matrix.shape == (7, 2)
    with pytest.raises(DataError, match="all alike"):
        whitening(torch.ones(50, 3), 2)
    with pytest.raises(DataError, match="not finite"):
        whitening(torch.full((50, 3), torch.nan), 2)


def test_halving_keeps_what_is_flat_and_drops_what_it_cannot_show():
    flat = halve(torch.ones(1, 3, 8, 8))
    assert flat.shape == (1, 3, 4, 4) and torch.allclose(flat[..., 1:-1, 1:-1], torch.ones(()))
    stripes = (torch.arange(8) % 2).float().expand(1, 1, 8, 8)
    assert torch.allclose(halve(stripes)[..., 1:-1, 1:-1], torch.tensor(0.5)), "aliased: all 0 or all 1"


@pytest.mark.parametrize("size", [8, 16, 28, 31, 32, 41, 64])
def test_network_takes_every_size(size):
    moments, logits = FeatureNetwork(1, size, 7)(torch.zeros(2, 1, size, size))
    assert moments.shape == (2, FeatureNetwork(1, size, 7).num_moments) and logits.shape == (2, 7)


def test_initial_weights_are_of_the_seed_and_of_the_right_size():
    first, again, other = (nn.Linear(200, 300) for _ in range(3))
    for layer, seed in ((first, 1), (again, 1), (other, 2)):
        initialise(layer, seed, "test")
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert first.weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.02) and not first.bias.any()


# What is shipped


def test_digits_are_whitened_over_the_training_images(data, shipped):
    x = shipped.embed(data.train.images).features
    assert x.shape == (len(data.train), shipped.dim) and shipped.dim <= 8 and x.dtype == torch.float64
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(x.numpy().T), np.eye(shipped.dim), atol=1e-3)


def test_digits_are_recognised(data, shipped):
    probabilities = shipped.embed(data.test.images).probabilities
    assert probabilities.shape == (len(data.test), 10) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(data.test)))
    assert (probabilities.argmax(1) == data.test.labels).double().mean() > 0.95
    assert (probabilities.max(1).values >= 0.95).double().mean() > 0.93


def test_shipped_mnist_loads_and_its_hash_is_pinned():
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    facts = DatasetInfo("mnist", 1, 28, 10, tuple("0123456789"), 256)
    split = Split(images, torch.arange(3))
    made = features_for(Dataset(facts, split, split, split), CPU, ignore)
    assert made.sha256 == extractor.SHIPPED["mnist", 28]
    assert made.embed(images).features.shape == (3, 32) and made.embed(images).probabilities.shape == (3, 10)


def test_embedding_does_not_depend_on_the_batch_size(data, shipped):
    images = data.test.images[:50]
    whole, parts = shipped.embed(images), shipped.embed(images, batch_size=7)
    torch.testing.assert_close(whole.features, parts.features, rtol=1e-3, atol=1e-3)
    assert torch.equal(shipped.embed(images).features, whole.features)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 9, 9).byte(), torch.zeros(0, 1, 8, 8).byte()],
    ids=["float", "size", "none"],
)
def test_embedding_takes_only_images_of_its_kind(shipped, images):
    with pytest.raises(ValueError, match="take uint8 images"):
        shipped.embed(images)


def test_a_file_that_is_another_is_one_clear_error(data, tmp_path, monkeypatch):
    arrays = load_arrays(extractor.ASSETS / "digits.safetensors", extractor.MAX_BYTES)
    monkeypatch.setattr(extractor, "ASSETS", tmp_path)
    path = tmp_path / "digits.safetensors"
    save_arrays(path, {**arrays, "classifier.bias": arrays["classifier.bias"] + 1})
    with pytest.raises(DataError, match="not the file this version of ddpm came with"):
        features_for(data, CPU, ignore)
    whole = (Path(extractor.__file__).parent / "assets" / "digits.safetensors").read_bytes()
    path.write_bytes(whole[:-3] + b"\x00\x01\x02")
    with pytest.raises(DataError, match="does not match the SHA-256"):
        features_for(data, CPU, ignore)
    for wrong in (
        {"whitening.mean": arrays["whitening.mean"][:-1]},
        {"classifier.bias": np.zeros(3, np.float16)},
    ):
        save_arrays(path, {**arrays, **wrong})
        with pytest.raises(DataError, match="those of another network"):
            extractor.load(path, data.facts, CPU)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        features_for(data, CPU, ignore)


@pytest.mark.parametrize("spoiled", ["blur", "noise", "dropped class", "duplicates", "inverted"])
def test_each_corruption_of_digits_is_farther_away(data, shipped, spoiled):
    held = torch.cat([data.val.images, data.test.images])
    real = shipped.embed(held).features
    untouched = distance(real, shipped.embed(data.train.images).features)
    assert distance(real, shipped.embed(corruptions(data.train)[spoiled]).features) > 1.2 * untouched


def test_pixel_features(data):
    project = pixel_features(data.train.images)
    x = project(data.train.images)
    np.testing.assert_allclose(np.cov(x.numpy().T), np.eye(8), atol=1e-8)
    large = data.train.images.repeat_interleave(8, 2).repeat_interleave(8, 3)  # 64×64: averaged back to 32×32
    assert torch.allclose(pixel_features(large)(large).abs(), x.abs(), atol=1e-6)


# First use


@pytest.fixture
def unknown(tmp_path, monkeypatch) -> Dataset:
    """A labelled set that no features are shipped for; its features take a moment."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path))
    monkeypatch.setattr(extractor, "FEWEST", 100)
    monkeypatch.setattr(extractor, "USUAL", Recipe(2, 1e-3))
    images = torch.randint(
        0, 256, (100, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    split = Split(images, torch.arange(100) % 4)
    return Dataset(DatasetInfo("unknown/set", 1, 16, 4, (), 256), split, split, split)


@pytest.mark.slow
def test_features_are_trained_once_and_cached(unknown, tmp_path):
    said: list[str] = []
    first = features_for(unknown, CPU, said.append)
    assert len(said) == 1 and "unknown/set" in said[0] and str(tmp_path) in said[0]
    garbage = Split(torch.zeros_like(unknown.test.images), unknown.test.labels)
    again = features_for(Dataset(unknown.facts, unknown.train, garbage, garbage), CPU, said.append)
    assert len(said) == 1 and again.sha256 == first.sha256, "validation and test images play no part"
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / f".{file.name}.1.00000000.tmp").write_bytes(b"of a killed process")
    rebuilt = features_for(unknown, CPU, said.append)
    assert len(said) == 2 and rebuilt.sha256 == first.sha256 and not list(tmp_path.glob(".*.tmp"))
    labels = (unknown.train.labels + 1) % 4
    features_for(
        Dataset(unknown.facts, Split(unknown.train.images, labels), garbage, garbage), CPU, said.append
    )
    assert len(said) == 3 and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_cached_file_is_looked_at_closely_but_needs_no_lock(unknown, tmp_path, monkeypatch):
    made = features_for(unknown, CPU, ignore)
    (file,) = tmp_path.glob("*.safetensors")
    arrays = load_arrays(file, extractor.MAX_BYTES)
    matrix, said = arrays["whitening.matrix"], list[str]()
    for wrong in (
        {"whitening.matrix": matrix.astype(np.int8)},
        {"whitening.mean": np.full(len(matrix), np.nan)},
        {"classifier.bias": np.zeros(4, np.uint16)},
    ):
        save_arrays(file, {**arrays, **wrong})
        assert features_for(unknown, CPU, said.append).sha256 == made.sha256
    assert len(said) == 3, "made anew each time"
    monkeypatch.setattr(extractor, "FileLock", None)  # a folder that may only be read
    assert features_for(unknown, CPU, said.append).sha256 == made.sha256 and len(said) == 3


def test_a_cache_that_cannot_be_written_is_an_error(unknown, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set DDPM_CACHE to another folder"):
        features_for(unknown, CPU, ignore)


# Inception


def test_other_data_need_inception(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    images = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, None)
    data = Dataset(DatasetInfo("photos", 3, 8, 0, (), 256), split, split, split)
    with pytest.raises(UserError, match=r"dataset photos: .*pip install .*\[inception\]"):
        features_for(data, CPU, ignore)
    with pytest.raises(UserError, match="2 channels; allowed: 1 or 3"):
        two = Split(images[:, :2], None)
        features_for(Dataset(DatasetInfo("pairs", 2, 8, 0, (), 256), two, two, two), CPU, ignore)


class FakeInception(nn.Module):
    """As torch_fidelity.FeatureExtractorInceptionV3: uint8 RGB in, a tuple of the wanted layers (here smaller) out."""

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert name == "inception-v3-compat" and features_list == ["2048"]
        self.register_buffer("table", torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3 and len(x) <= 50
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32
        assert torch.equal(x[:, 0], x[:, 2]), "grey images are repeated"
        return ((x[:, 1].flatten(1).float() / 255) @ self.table,)


@pytest.fixture
def fake_inception(monkeypatch):
    module = ModuleType("torch_fidelity")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)


def test_fid_is_the_distance_from_all_training_images_and_named_by_n(data, fake_inception, monkeypatch):
    reference = Reference(data, ("fid",), 20, CPU)  # which takes 20 real images for other metrics
    run, sha256 = reference.inception
    samples = Samples(blurred(data.train.images[:300]).byte(), None, reference)
    found = fid.fid(samples, reference).values
    by_the_book = distance(run(samples.images, 50)[0], run(data.train.images, 50)[0])
    assert found.keys() == {"FID-300"} and found["FID-300"].value == pytest.approx(by_the_book, rel=1e-4)
    assert found["FID-300"].text == f"against {len(data.train)} training images; Inception {sha256}"
    monkeypatch.setattr(fid, "CUSTOMARY", 300)
    assert fid.fid(samples, reference).values.keys() == {"FID-50k"}
    few = fid.fid(Samples(samples.images[:1], None, reference), reference)
    assert few.notes == ["no fid: it needs 2 images"] and not few.values


def test_fid_without_inception_is_refused_before_samples_are_drawn(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(
        UserError, match=r"pip install .*\[inception\].*\(measure=\[memorization,likelihood,cas\]"
    ):
        evaluator.prepare(Reference(data, ("fid", "cas"), 20, CPU), Clock())


def test_features_may_be_those_of_inception_for_any_dataset(data, fake_inception):
    named = [features_for(data, CPU, ignore, *kind).name for kind in ((), ("inception",))]
    assert named == ["digits-8", "inception-v3"]


def test_dinov2_is_read_from_a_folder_and_no_other_network_is(data, tmp_path, monkeypatch):
    """A small network of this architecture, saved as the public ones are."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**small)).save_pretrained(tmp_path / "small")
    made = features_for(data, CPU, ignore, "dinov2", str(tmp_path / "small"))
    again = features_for(data, CPU, ignore, "dinov2", str(tmp_path / "small"))
    embedding = made.embed(data.test.images)
    assert embedding.features.shape == (180, 8) and embedding.probabilities is None
    assert made.sha256 == again.sha256 and torch.equal(
        again.embed(data.test.images).features, embedding.features
    )
    vit = transformers.ViTConfig(**small, intermediate_size=16)
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    (tmp_path / "small" / "model.safetensors").write_bytes(b"cut")
    for folder, why in (("vit", "lacks the weights"), ("small", ""), ("none", "there is no such folder")):
        with pytest.raises(
            UserError, match=f"features_path=.*{folder}: holds no DINOv2 of transformers: .*{why}"
        ):
            features_for(data, CPU, ignore, "dinov2", str(tmp_path / folder))


def test_dinov2_says_what_it_needs(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"features=dinov2 needs transformers: pip install .*\[dinov2\]"):
        features_for(data, CPU, ignore, "dinov2", str(tmp_path))


def test_inception_features_are_whitened_too(fake_inception):
    """And made in batches that a GPU can hold."""
    images = torch.randint(
        0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    split = Split(images, None)
    said: list[str] = []
    made = features_for(Dataset(DatasetInfo("grey", 1, 8, 0, (), 256), split, split, split), CPU, said.append)
    embedding = made.embed(images)
    assert embedding.probabilities is None and embedding.features.shape == (300, made.dim) == (300, 8)
    np.testing.assert_allclose(np.cov(embedding.features.numpy().T), np.eye(8), atol=1e-3)
    assert "downloaded" in said[0] and len(made.sha256) == 64


def test_weights_that_cannot_be_read_are_one_line(monkeypatch):
    def damaged(name: str, features_list: list[str]) -> nn.Module:
        raise RuntimeError("PytorchStreamReader failed\nat byte 7")

    module = ModuleType("torch_fidelity")
    module.FeatureExtractorInceptionV3 = damaged
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    split = Split(torch.zeros(60, 3, 8, 8, dtype=torch.uint8), None)
    with pytest.raises(UserError, match=r"weights: PytorchStreamReader failed at byte 7$"):
        features_for(Dataset(DatasetInfo("photos", 3, 8, 0, (), 256), split, split, split), CPU, ignore)


# Classification accuracy score


def test_accuracy_score_tells_right_labels_from_wrong_ones(data, monkeypatch):
    monkeypatch.setattr(cas, "RECIPE", Recipe(40, 4e-3))
    train, test, reference = data.train, data.test, Reference(data, (), 9, CPU)
    real = accuracy_score(train, reference, 0)
    assert real.value > 0.7 and real.n == len(train) and real.low < real.value < real.high
    assert real.error == pytest.approx((real.value * (1 - real.value) / 180) ** 0.5)
    monkeypatch.setattr(cas, "RECIPE", Recipe(8, 4e-3))
    one = accuracy_score(Split(train.images, torch.full_like(train.labels, 3)), reference, 0)
    assert one.value == (test.labels == 3).double().mean().item()


# Real data

needs_data = pytest.mark.skipif(
    REAL is None, reason="DDPM_TEST_DATA does not name a folder with the real data"
)


@pytest.mark.slow
@needs_data
def test_mnist_ranking_is_the_same_for_another_seed():
    """Five corruptions, in two strengths where they have one: each farther than real images, in the same order."""
    data = mnist(Path(REAL))
    arrays = extractor.train(data, 1, CPU)
    both = [features_for(data, CPU, ignore), extractor._from_arrays(arrays, data.facts, CPU)]
    real, train = data.test.images, Split(data.train.images[:10_000], data.train.labels[:10_000])
    spoiled = {"real": train.images, **corruptions(train)}
    spoiled["more blur"], spoiled["more noise"] = blurred(spoiled["blur"]), noisy(train.images, 30)
    found = []
    for made in both:
        probabilities = made.embed(real).probabilities
        assert (probabilities.argmax(1) == data.test.labels).double().mean() > 0.985
        assert (probabilities.max(1).values >= 0.95).double().mean() > 0.96
        x = made.embed(real).features
        found.append({name: distance(x, made.embed(images).features) for name, images in spoiled.items()})
    orders = [sorted(distances, key=distances.__getitem__) for distances in found]
    assert orders[0][0] == orders[1][0] == "real", found
    ranks = [[order.index(name) for name in spoiled] for order in orders]
    assert np.corrcoef(ranks)[0, 1] > 0.9, found  # Spearman's coefficient


@pytest.mark.slow
@needs_data
def test_accuracy_score_of_real_mnist():
    data = mnist(Path(REAL))
    train = Split(data.train.images[:10_000], data.train.labels[:10_000])
    score = accuracy_score(train, Reference(data, (), 9, CPU), 0)
    assert score.value >= 0.975 and score.n == 10_000


def test_training_is_repeatable_on_a_gpu_too(data, monkeypatch):
    """As far as can be seen without one: convolutions are asked for the same bits, as they are for embedding."""
    asked, forward = [], FeatureNetwork.forward

    def watched(self: FeatureNetwork, images: Tensor) -> object:
        asked.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32))
        return forward(self, images)

    monkeypatch.setattr(FeatureNetwork, "forward", watched)
    training.fit(FeatureNetwork(1, 8, 10), data.train.images, data.train.labels, Recipe(1, 1e-3), 0, CPU)
    assert asked == [(True, False)]


def test_training_depends_on_seed_and_images_alone(data):
    split = Split(data.train.images[:200], data.train.labels[:200])
    torch.manual_seed(1)
    first = training.train_features(split, 10, Recipe(3, 1e-3), 0, CPU)
    torch.manual_seed(2)
    again, other = (training.train_features(split, 10, Recipe(3, 1e-3), seed, CPU) for seed in (0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["classifier.weight"], other["classifier.weight"])
