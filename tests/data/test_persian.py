"""dataset=persian: how digits are drawn, the splits, and the cache."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.data import persian as module
from ddpm.data.hoda import digest, pack, read_cdb, save_crops
from ddpm.data.mat import read_mat
from ddpm.data.persian import NOTICE, Part, draw, persian
from ddpm.errors import DataError
from ddpm.io.cache import as_array, save_arrays
from tests.data.hoda_files import cdb, digits

REAL = os.environ.get("DDPM_TEST_DATA")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A data root with three small parts, and a cache of its own."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "HELD_OUT", 6)
    parts = {}
    (tmp_path / "hoda").mkdir()
    for seed, (name, file, count) in enumerate(
        (("train", "Train.cdb", 30), ("test", "Test.cdb", 10), ("remaining", "Rest.cdb", 20))
    ):
        images = digits(count, seed)
        parts[name] = Part(file, count, digest(pack(*images)))
        (tmp_path / "hoda" / file).write_bytes(cdb(*images))
    monkeypatch.setattr(module, "PARTS", parts)
    return tmp_path


# Drawing


@pytest.mark.parametrize(("image_size", "box"), [(28, 20), (32, 23), (64, 46)])
def test_longer_side_fills_the_box_and_the_aspect_stays(image_size, box):
    tall, wide = np.full((40, 20), 255, np.uint8), np.full((3, 9), 255, np.uint8)
    images = draw(pack([tall, wide], [1, 1]), image_size)
    assert images.shape == (2, image_size, image_size) and images.dtype == np.uint8
    sides = [(int(image.any(axis=1).sum()), int(image.any(axis=0).sum())) for image in images]
    assert sides == [(box, round(box / 2)), (round(box / 3), box)]
    assert set(np.unique(images)) == {0, 255}


def test_centre_of_mass_is_in_the_middle():
    images = (np.random.default_rng(0).random((50, 14, 9)) < 0.33).astype(np.uint8) * 255
    for image in draw(pack(images, [1] * 50), 28).astype(float):
        for axis in (0, 1):
            centre = np.arange(28) @ image.sum(axis=1 - axis) / image.sum()
            assert abs(centre - 13.5) <= 0.5 + 1e-9


def test_one_sided_digit_is_not_cut_off():
    image = np.zeros((20, 20), np.uint8)
    image[:, :2] = image[10, :] = 255
    drawn = draw(pack([image], [1]), 28)[0]
    assert drawn.sum(dtype=int) == image.sum(dtype=int), (
        "20 pixels are drawn as 20 pixels, all of them inside"
    )


def test_no_ink_at_all():
    assert not draw(pack([np.zeros((5, 3), np.uint8)], [0]), 28).any()


# The dataset


def test_values_splits_and_the_notice(home):
    data = persian(home)
    assert data.notice == NOTICE and "not for commercial use" in NOTICE
    assert [len(split) for split in (data.train, data.val, data.test)] == [24, 6, 10]
    images, labels = digits(10, seed=1)
    np.testing.assert_array_equal(data.test.images[:, 0], draw(pack(images, labels), 28))
    assert data.test.labels.tolist() == labels and data.test.labels.dtype == torch.int64
    facts = data.facts
    assert (facts.channels, facts.image_size, facts.num_classes, facts.levels) == (1, 28, 10, 256)
    assert persian(home, image_size=64).train.images.shape == (24, 1, 64, 64)
    with pytest.raises(DataError, match="28, 32, 64"):
        persian(home, image_size=8)


def test_remaining_images_join_the_training_images_alone(home):
    without, with_rest = persian(home), persian(home, remaining=True)
    assert len(with_rest.train) == 24 + 20
    assert torch.equal(with_rest.train.images[:24], without.train.images)
    assert torch.equal(with_rest.val.images, without.val.images)
    assert with_rest.train.labels[24:].tolist() == digits(20, seed=2)[1]


def test_second_start_reads_the_cache_and_decodes_no_file(home, monkeypatch):
    first = persian(home)
    monkeypatch.setattr(module, "read_cdb", None)
    second = persian(home)
    assert second.notice == ""
    for a, b in ((first.train, second.train), (first.val, second.val), (first.test, second.test)):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not list((home / "cache").glob("*.part"))


def put(file: Path, data: bytes) -> None:
    """Change a file's content, but neither its size nor its times."""
    about = file.stat()
    assert about.st_size == len(data)
    file.write_bytes(data)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_file_of_the_same_size_and_time_is_not_believed(home):
    persian(home)
    images, labels = digits(10, seed=1)
    put(home / "hoda" / "Test.cdb", cdb(images[::-1], labels[::-1]))
    assert persian(home).test.labels.tolist() == labels[::-1], "the same images, drawn anew in their order"
    images[0][0, 0] ^= 255
    changed = cdb(images, labels)
    (home / "hoda" / "Test.cdb").write_bytes(changed)
    with pytest.raises(DataError, match=r"Test.cdb: its images are not those of Test.cdb"):
        persian(home)
    put(home / "hoda" / "Test.cdb", bytes(len(changed)))
    with pytest.raises(DataError, match=r"Test.cdb: "):
        persian(home)


def test_official_file_is_known_by_its_own_hash_too(home, monkeypatch):
    images = digits(10, seed=9)
    data = cdb(*images)
    (home / "hoda" / "Test.cdb").write_bytes(data)
    with pytest.raises(DataError, match="not those of"):
        persian(home)
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    monkeypatch.setitem(module.PARTS, "test", replace(module.PARTS["test"], blob=blob))
    np.testing.assert_array_equal(persian(home).test.images[:, 0], draw(pack(*images), 28))


@pytest.mark.parametrize("place", ["hoda", "cache"])
def test_converted_part_is_verified(home, place):
    images, labels = digits(30)
    (home / "hoda" / "Train.cdb").unlink()
    labels[0] = (labels[0] + 1) % 10
    (home / "cache").mkdir()
    save_crops(home / place / "hoda-train.safetensors", pack(images, labels))
    with pytest.raises(DataError, match=r"hoda-train.safetensors: its images are not those of Train.cdb"):
        persian(home)


def test_cache_under_another_name_is_not_believed(home):
    first = persian(home)
    small = min(home.glob("cache/persian-28-*"), key=lambda path: path.stat().st_size)
    images, labels = digits(10, seed=9)
    other = {"images": draw(pack(images, labels), 28), "labels": np.array(labels, np.uint8)}
    save_arrays(small, {**other, "source": as_array("0" * 64)})
    assert torch.equal(persian(home).test.images, first.test.images)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_broken_cache_is_built_again(home, damage):
    first = persian(home)
    for path in (home / "cache").glob("*.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(
            {"flip": whole[:-1] + bytes([whole[-1] ^ 1]), "cut": whole[:-1], "empty": b""}[damage]
        )
    again = persian(home)
    assert again.notice == NOTICE and torch.equal(again.train.images, first.train.images)
    assert persian(home).notice == ""


def test_other_source_other_cache(home, monkeypatch):
    persian(home)
    images, labels = digits(10, seed=9)
    (home / "hoda" / "Test.cdb").write_bytes(cdb(images, labels))
    part = replace(module.PARTS["test"], images=digest(pack(images, labels)))
    monkeypatch.setitem(module.PARTS, "test", part)
    np.testing.assert_array_equal(persian(home).test.images[:, 0], draw(pack(images, labels), 28))


@pytest.mark.parametrize("place", ["hoda", "cache"])
def test_converted_part_stands_in(home, place):
    first = persian(home)
    images, labels = digits(30)
    (home / "hoda" / "Train.cdb").unlink()
    save_crops(home / place / "hoda-train.safetensors", pack(images, labels))
    assert torch.equal(persian(home).train.images, first.train.images)


def test_absent_parts_are_named(home):
    (home / "hoda" / "Train.cdb").unlink()
    (home / "hoda" / "Rest.cdb").unlink()
    with pytest.raises(DataError, match=r"hoda lacks 'Train.cdb' of .*farsiocr.ir.*convert_persian.py"):
        persian(home)
    with pytest.raises(DataError, match=r"'Train\.cdb', 'Rest\.cdb'"):
        persian(home, remaining=True)


def test_wrong_part(home):
    (home / "hoda" / "Train.cdb").write_bytes(cdb(*digits(31)))
    with pytest.raises(DataError, match=r"Train.cdb: holds 31 images; this part of the Hoda set has 30"):
        persian(home)


def test_cache_that_cannot_be_written(home, monkeypatch):
    (home / "in the way").write_text("")
    monkeypatch.setenv("DDPM_CACHE", str(home / "in the way" / "cache"))
    with pytest.raises(DataError, match="set DDPM_CACHE"):
        persian(home)


@pytest.mark.skipif(REAL is None, reason="DDPM_TEST_DATA does not name a folder with the real data")
def test_real_files_have_the_known_hashes():
    hoda = Path(REAL) / "hoda"
    for part in ("test", "remaining"):
        assert digest(read_cdb(hoda / module.PARTS[part].cdb)) == module.PARTS[part].images
    images, labels = read_mat(hoda / "Data_hoda_full.mat")
    assert digest(pack(images, labels)) == module.PARTS["train"].images
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = pack([images[i] for i in order], [labels[i] for i in order])
    assert digest(shuffled) == module.PARTS["train"].images
