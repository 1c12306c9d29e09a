"""The official format of the Hoda set and the converter's: values, and every way a file can be wrong."""

import os
from pathlib import Path

import numpy as np
import pytest

from ddpm.data import hoda
from ddpm.data.hoda import Crops, load_crops, pack, read_cdb, save_crops
from ddpm.data.persian import draw
from ddpm.errors import DataError
from ddpm.io.cache import save_arrays
from tests.data.hoda_files import cdb, digits, header, record, same

REAL = os.environ.get("DDPM_TEST_DATA")


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "part.cdb"


def test_images_and_labels(file):
    images, labels = digits(40)
    file.write_bytes(cdb(images, labels))
    same(read_cdb(file), images, labels)


def test_bytes_written_by_hand(file):
    # Width 3, height 2: row 1 is .## (runs 1 2), row 2 is #.# (runs 0 1 1 1).
    file.write_bytes(header([7]) + bytes([0xFF, 7, 3, 2, 6, 0, 1, 2, 0, 1, 1, 1]))
    same(read_cdb(file), [np.array([[0, 255, 255], [255, 0, 255]], np.uint8)], [7])


def test_one_size_in_the_header(file):
    images = [np.eye(4, 5, k, dtype=np.uint8) * 255 for k in range(3)]
    records = b"".join(record(image, 1, own_size=False) for image in images)
    file.write_bytes(header([1, 1, 1], size=(4, 5)) + records)
    same(read_cdb(file), images, [1, 1, 1])


ONE = np.array([[0, 255, 255], [255, 0, 255]], np.uint8)  # 12 bytes as a record, 1024 to 1035
GOOD = record(ONE, 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0, inside the header"),
        (header([7])[:-1], "ends at byte 1023, inside the header"),
        (header([7], kind=1) + GOOD, "image type 1 at byte 522"),
        (header([7], size=(0, 3)) + GOOD, "height 0 and width 3 at byte 4"),
        (header([], total=0), "declares 0 records at byte 6"),
        (header([7], total=2**32 - 1) + GOOD, "declares 4294967295 records at byte 6; allowed: 1 to 200000"),
        (header([7], total=2) + GOOD, "record 1 of 2, byte 1036: the file ends inside"),
        (header([7]) + GOOD[:5], "record 0 of 1, byte 1029: the file ends inside"),
        (header([7]) + GOOD[:-1], "record 0 of 1, byte 1028: 6 bytes of image declared, 5 left"),
        (header([7]) + GOOD[:4] + b"\xff\xff" + GOOD[6:], "byte 1028: 65535 bytes of image declared, 6 left"),
        (header([7, 7]) + GOOD + b"\xfe" + GOOD[1:], "record 1 of 2, byte 1036: 0xfe stands where"),
        (header([7]) + b"\xff\x0a" + GOOD[2:], "record 0 of 1, byte 1025: label 10; allowed: 0 to 9"),
        (header([7]) + b"\xff\x07\x00\x02\x00\x00", "byte 1026: the image is 0 wide and 2 high"),
        (header([7]) + b"\xff\x07\x03\x02\x02\x00\x01\x03", "byte 1031: a run of 3 overflows the row of 3"),
        (header([7]) + b"\xff\x07\x03\x02\x01\x00\xff", "byte 1030: a run of 255 overflows"),
        (header([7]) + b"\xff\x07\x03\x02\x01\x00\x03", "byte 1031: the run lengths end before the image is"),
        (header([7]) + b"\xff\x07\x03\x02\x03\x00\x00\x00\x00", "byte 1033: the run lengths end before"),
        (header([7]) + b"\xff\x07\x03\x01\x02\x00\x03\x00", "byte 1031: 1 bytes of run lengths left after"),
        (header([7]) + GOOD + b"\0", "1 bytes left at byte 1036, after record 0"),
        (header([3]) + GOOD, "0 records of class 3, but the header at byte 22 declares 1"),
    ],
)
def test_malformed_files(file, data, message):
    file.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_cdb(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_limits_hold_before_memory_is_taken(file, monkeypatch):
    file.write_bytes(cdb(*digits(40)))
    with file.open("r+b") as stream:
        stream.truncate(1 << 40)  # a hole: costs no disk, but reading it would cost a terabyte
    with pytest.raises(DataError, match=r"1099511627776 bytes, more than"):
        read_cdb(file)
    wide = bytes([0xFF, 7, 255, 255, 255, 0]) + b"\xff" * 255  # 65,025 pixels from 261 bytes
    file.write_bytes(header([7] * 3) + wide * 3)
    monkeypatch.setattr(hoda, "MAX_PIXELS", 2 * 255 * 255)
    with pytest.raises(DataError, match=r"record 2 of 3, byte 1807: the images together exceed"):
        read_cdb(file)


def test_absent_file(file):
    with pytest.raises(DataError, match="cannot be read"):
        read_cdb(file)


def test_any_cut_and_any_changed_byte_ends_well(file):
    whole = cdb(*digits(6))
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        with pytest.raises(DataError):
            read_cdb(file)
    generator = np.random.default_rng(1)
    for at in generator.integers(0, len(whole), 400):
        file.write_bytes(whole[:at] + generator.bytes(1) + whole[at + 1 :])
        try:
            crops = read_cdb(file)
        except DataError:
            continue
        assert len(crops) == 6 and sum(image.size for image in crops.images()) == len(crops.pixels)


# The converter's form


def test_crops_come_back(tmp_path):
    images, labels = digits(20)
    save_crops(tmp_path / "f", pack(images, labels))
    same(load_crops(tmp_path / "f"), images, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(2, np.int64)}, "not a file that"),
        ({"more": np.zeros(2, np.uint8)}, "not a file that"),
        ({"labels": np.zeros(1, np.uint8)}, "1 labels do not fit"),
        ({"labels": np.zeros(0, np.uint8), "sizes": np.zeros((0, 2), np.int32)}, "0 labels"),
        ({"labels": np.array([0, 10], np.uint8)}, "label is above 9"),
        ({"sizes": np.array([[2, 2], [0, 5]], np.int32)}, "a side is not within"),
        ({"sizes": np.array([[2, 2], [256, 1]], np.int32)}, "a side is not within"),
        ({"sizes": np.array([[2, 2], [-1, -5]], np.int32)}, "a side is not within"),
        ({"sizes": np.array([[2, 2], [2, 3]], np.int32)}, "9 pixels are not what"),
    ],
)
def test_crops_that_do_not_hold_together(tmp_path, change, message):
    good = {
        "pixels": np.zeros(9, np.uint8),
        "sizes": np.array([[2, 2], [5, 1]], np.int32),
        "labels": np.array([0, 9], np.uint8),
    }
    save_arrays(tmp_path / "f", good)
    assert len(load_crops(tmp_path / "f")) == 2
    save_arrays(tmp_path / "f", good | change)
    with pytest.raises(DataError, match=message):
        load_crops(tmp_path / "f")


# The real files


@pytest.mark.skipif(REAL is None, reason="DDPM_TEST_DATA does not name a folder with the real data")
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("Test 20000.cdb", [2000] * 10),
        ("RemainingSamples.cdb", [2070, 2330, 1923, 2334, 2333, 2110, 2254, 2363, 2264, 2371]),
    ],
)
def test_real_files(name, counts):
    crops = read_cdb(Path(REAL) / "hoda" / name)
    assert np.bincount(crops.labels).tolist() == counts
    assert all(image.max() == 255 for image in crops.images())
    assert 0.3 < crops.pixels.mean() / 255 < 0.36, "ink covers a third"
    one, seven, eight = (drawn_mean(crops, label) for label in (1, 7, 8))
    assert one[:, 10:18].sum() > 0.95 * one.sum(), "an upright stroke in the middle"
    assert width(seven[6:11]) > width(seven[17:22]), "a V"
    assert width(eight[6:11]) < width(eight[17:22]), "the same upside down"


def drawn_mean(crops: Crops, label: int) -> np.ndarray:
    images = [image for image, own in zip(crops.images(), crops.labels, strict=True) if own == label][:300]
    return draw(pack(images, [label] * len(images)), 28).mean(axis=0)


def width(rows: np.ndarray) -> int:
    return np.ptp(np.flatnonzero(rows.sum(axis=0) > rows.sum() / 60))
