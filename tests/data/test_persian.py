"""dataset=persian: how digits are drawn, the splits, and the cache."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.data import persian as module
from ddpm.data.hoda import pack, save_crops
from ddpm.data.persian import NOTICE, Part, draw, persian
from ddpm.errors import DataError
from tests.data.hoda_files import cdb, digits


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A data root with three small parts, and a cache of its own."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "HELD_OUT", 6)
    parts = {"train": Part("Train.cdb", 30), "test": Part("Test.cdb", 10), "remaining": Part("Rest.cdb", 20)}
    monkeypatch.setattr(module, "PARTS", parts)
    (tmp_path / "hoda").mkdir()
    for seed, part in enumerate(parts.values()):
        (tmp_path / "hoda" / part.cdb).write_bytes(cdb(*digits(part.count, seed)))
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


def test_second_start_reads_the_cache_and_not_the_files(home):
    first = persian(home)
    for file in (home / "hoda").iterdir():  # whoever reads them now will not get far
        about = file.stat()
        file.write_bytes(bytes(about.st_size))
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    second = persian(home)
    assert second.notice == ""
    for a, b in ((first.train, second.train), (first.val, second.val), (first.test, second.test)):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not list((home / "cache").glob("*.part"))


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


def test_other_source_other_cache(home):
    persian(home)
    images, labels = digits(10, seed=9)
    (home / "hoda" / "Test.cdb").write_bytes(cdb(images, labels))
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
