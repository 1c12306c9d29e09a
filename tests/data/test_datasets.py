"""Splits, the cache's files, the small datasets, and that configs and functions agree."""

import inspect
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddpm.data import persian
from ddpm.data.dataset import Dataset, Split, check_dataset, check_image_size, hold_out
from ddpm.data.datasets import DATASETS
from ddpm.data.folder import folder
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError, is_plain
from ddpm.io.cache import as_array, cache_folder, load_arrays, save_arrays
from ddpm.io.files import read_bounded, write_atomically
from ddpm.io.pictures import read_image

CONFIGS = Path(__file__).parents[2] / "configs" / "dataset"


def numbered(n: int) -> Split:
    return Split(torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1), torch.arange(n) * 10)


def test_hold_out_parts_the_images_with_their_labels():
    train, val = hold_out(numbered(50), 7)
    ids = [split.images.flatten().tolist() for split in (train, val)]
    assert len(val) == 7 and sorted(ids[0] + ids[1]) == list(range(50))
    for split, own in zip((train, val), ids, strict=True):
        assert own == sorted(own) and split.labels.tolist() == [10 * i for i in own]
    assert val.images.flatten().tolist() != list(range(7)), "drawn at random"


def test_hold_out_is_the_same_for_ever():
    # Written down once: if this changes, validation figures of old and new runs cannot be compared.
    assert hold_out(numbered(20), 5)[1].images.flatten().tolist() == [2, 5, 8, 16, 18]


@pytest.mark.parametrize("n", [0, 3, 4])
def test_hold_out_leaves_something_on_both_sides(n):
    with pytest.raises(ValueError, match=f"hold out {n} of 3"):
        hold_out(numbered(3), n)


def test_image_size_that_is_not_offered():
    with pytest.raises(DataError, match=r"dataset.image_size=30 .*allowed: 28, 32"):
        check_image_size(30, (28, 32))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_config_fits_its_function(file):
    text = file.read_text()
    config = yaml.safe_load(text)
    assert text.startswith("# ") and config.pop("name") == file.stem
    keywords = inspect.signature(DATASETS[file.stem]).parameters
    for key, value in config.items():
        assert keywords[key].kind is inspect.Parameter.KEYWORD_ONLY
        assert value == "???" or value == keywords[key].default
    assert set(config) == set(keywords) - {"data_root"}


def test_every_dataset_has_a_config():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(DATASETS)


def test_import_is_light():
    code = "import sys, ddpm.data.datasets; print({'torchvision', 'sklearn', 'scipy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_digits():
    from sklearn.datasets import load_digits

    data = DATASETS["digits"](Path("unused"))
    assert [len(split) for split in (data.train, data.val, data.test)] == [1437, 180, 180]
    images = torch.cat([data.train.images, data.val.images, data.test.images])
    assert images.dtype == torch.uint8 and images.shape == (1797, 1, 8, 8)
    assert images.unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    ours = {(tuple((image.double() * 16 / 255).round().flatten().tolist()), int(label))
            for split in (data.train, data.val, data.test)
            for image, label in zip(split.images, split.labels, strict=True)}  # fmt: skip
    source = load_digits()
    assert ours == {(tuple(x), int(y)) for x, y in zip(source.data, source.target, strict=True)}
    assert (data.facts.num_classes, data.facts.levels, data.facts.image_size) == (10, 17, 8)
    assert all(len(split.labels.unique()) == 10 for split in (data.train, data.val, data.test))


# The cache


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("DDPM_CACHE")
    assert cache_folder() == Path("/b/ddpm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ddpm"


def test_arrays_come_back(tmp_path):
    arrays = {"b": np.arange(6, dtype=np.uint8).reshape(2, 3), "a": np.zeros(0, np.int32)}
    save_arrays(tmp_path / "new" / "file", arrays)
    loaded = load_arrays(tmp_path / "new" / "file", 1000)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


def test_every_flipped_bit_of_the_arrays_is_found(tmp_path):
    path = tmp_path / "file"
    save_arrays(path, {"a": np.arange(8, dtype=np.uint8), "b": np.arange(4, dtype=np.int32)})
    whole = path.read_bytes()
    for at in range(len(whole) - 24, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="SHA-256"):
            load_arrays(path, 1000)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 7 + b"\x7f{}"])
def test_what_is_no_tensor_file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="file"):
        load_arrays(tmp_path / "file", 1000)


def test_tensor_types_that_numpy_lacks(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "file")
    with pytest.raises(DataError, match="safetensors"):
        load_arrays(tmp_path / "file", 1000)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_files_that_never_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_bounded(path, 100)
        with pytest.raises(DataError, match="cannot be read"):
            load_arrays(path, 100)


def test_files_are_read_up_to_their_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    with pytest.raises(DataError, match="has 5 bytes, more than the 4 allowed"):
        read_bounded(tmp_path / "file", 4)
    with pytest.raises(DataError, match="more than the 4 bytes allowed"):  # the system calls its size 0
        read_bounded(Path("/proc/self/status"), 4)
    save_arrays(tmp_path / "arrays", {"a": np.zeros(1000, np.uint8)})
    with pytest.raises(DataError, match="more than the 1000 allowed"):
        load_arrays(tmp_path / "arrays", 1000)


def test_header_that_is_too_long(tmp_path):
    (tmp_path / "file").write_bytes((1 << 20).to_bytes(8, "little") + b"{}".ljust(1 << 20))
    with pytest.raises(DataError, match="header of 1048576 bytes"):
        load_arrays(tmp_path / "file", 1 << 24)


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((3, 28, 29), np.uint8)},
        {"images": np.zeros((4, 28, 28), np.uint8)},
        {"images": np.zeros((3, 28, 28), np.int8)},
        {"labels": np.array([0, 10, 0], np.uint8)},
        {"labels": np.zeros((3, 1), np.uint8)},
        {"labels": np.zeros(3, np.int64)},
        {"more": np.zeros(3, np.uint8)},
        {"source": as_array("1" * 64)},
    ],
)
def test_cached_images_with_a_right_hash_but_wrong_content(tmp_path, change):
    good = {"images": np.zeros((3, 28, 28), np.uint8), "labels": np.array([0, 9, 1], np.uint8)}
    good["source"] = as_array("0" * 64)
    save_arrays(tmp_path / "file", good)
    assert persian._load_cached(tmp_path / "file", 3, 28, "0" * 64).labels.tolist() == [0, 9, 1]
    save_arrays(tmp_path / "file", good | change)
    assert persian._load_cached(tmp_path / "file", 3, 28, "0" * 64) is None, "then it is built again"


def test_no_home_folder(monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", "~no-such-user/cache")
    with pytest.raises(DataError, match="home"):
        cache_folder()
    monkeypatch.delenv("DDPM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~no-such-user")
    with pytest.raises(DataError, match="set DDPM_CACHE"):
        cache_folder()
    with pytest.raises(DataError, match="home"):
        folder(Path("unused"), path="~no-such-user/images")


# What a dataset must be


def dataset(labels: object = True, **changes) -> Dataset:
    """Six images of 4×4 in three classes, two for each split; `changes` are those of the facts or splits."""
    splits = {
        name: Split(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8), torch.tensor([0, 2]) if labels else None)
        for name in ("train", "val", "test")
    }
    facts = DatasetInfo("mine", 1, 4, 3 if labels else 0, ("a", "b", "c") if labels else (), 256)
    own = {key: value for key, value in changes.items() if hasattr(facts, key)}
    rest = {key: value for key, value in changes.items() if key not in own}
    return Dataset(**{"facts": replace(facts, **own), **splits, **rest})


def test_dataset_that_is_right():
    for data in (
        dataset(),
        dataset(labels=False),
        dataset(class_names=()),
        DATASETS["digits"](Path("unused")),
    ):
        assert check_dataset(data) is data


IMAGES = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "returned a NoneType"),
        (dataset(notice=3), "notice is a int"),
        (dataset(facts=None), "must be a DatasetInfo"),
        (dataset(name="a\nb"), "name of plain text"),
        (dataset(name=""), "name of plain text"),
        (dataset(channels=0), r"mine: facts\.channels=0; must be a whole number from 1 to 16"),
        (dataset(channels=True), r"facts\.channels=True"),
        (dataset(image_size=1025), r"image_size=1025; .* 1 to 1024"),
        (dataset(image_size=4.0), r"image_size=4\.0"),
        (dataset(num_classes=10_001), "num_classes=10001; .* 0 to 10000"),
        (dataset(levels=1), "levels=1; .* 2 to 256"),
        (dataset(class_names=("a", "b")), "empty or of 3 names"),
        (dataset(class_names=["a", "b", "c"]), "a tuple"),
        (dataset(class_names=("a", "b", "\x1b[31m")), r"class name '\\x1b\[31m' is no plain"),
        (dataset(class_names=("a", "b", "c" * 256)), "no plain, short text"),
        (dataset(val=None), "split val: is not a Split"),
        (dataset(val=Split(None, None)), "split val: is not a Split"),
        (
            dataset(test=Split(IMAGES / 255, LABELS)),
            r"split test: its images are torch.float32 on cpu; .*uint8",
        ),
        (dataset(test=Split(IMAGES.to("meta"), LABELS)), "on meta"),
        (dataset(train=Split(IMAGES[:0], LABELS[:0])), r"the shape \(0, 1, 4, 4\).*N ≥ 1"),
        (dataset(train=Split(IMAGES[:, 0], LABELS)), r"the shape \(2, 4, 4\); .*\(N, 1, 4, 4\)"),
        (dataset(image_size=8), r"\(2, 1, 4, 4\); .*\(N, 1, 8, 8\)"),
        (dataset(val=Split(IMAGES, None)), "split val: has no labels, but facts.num_classes=3"),
        (dataset(labels=False, val=Split(IMAGES, LABELS)), "has labels, but facts.num_classes=0"),
        (dataset(val=Split(IMAGES, [0, 2])), "labels are list"),
        (dataset(val=Split(IMAGES, LABELS.int())), "labels are torch.int32; .*int64"),
        (dataset(val=Split(IMAGES, LABELS[:1])), r"2 images, but labels of shape \(1,\)"),
        (dataset(val=Split(IMAGES, LABELS[:, None])), r"labels of shape \(2, 1\)"),
        (dataset(val=Split(IMAGES, LABELS + 1)), "lie within 1 … 3; allowed: 0 to 2"),
        (dataset(val=Split(IMAGES, LABELS - 1)), "lie within -1 … 1"),
    ],
)
def test_dataset_that_is_wrong(data, message):
    with pytest.raises(DataError, match=message) as error:
        check_dataset(data)
    assert is_plain(str(error.value))


# A folder of images


def save(
    path: Path, colour: int | tuple[int, ...], size: tuple[int, int] = (10, 10), mode: str = "L"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def load(path: Path, image_size: int = 8):
    return folder(Path("unused"), path=str(path), image_size=image_size)


def everything(data) -> torch.Tensor:
    return torch.cat([data.train.images, data.val.images, data.test.images])


def test_flat_folder_of_grey_images(tmp_path):
    for i, suffix in enumerate(["png", "jpg", "jpeg", "bmp", "gif", "webp", "PNG"]):
        save(tmp_path / f"{i}.{suffix}", 20 * i)
    save(tmp_path / ".hidden.png", 255)
    (tmp_path / "notes.txt").write_text("not an image")
    data = load(tmp_path)
    assert (data.facts.channels, data.facts.num_classes, data.train.labels) == (1, 0, None)
    assert [len(split) for split in (data.train, data.val, data.test)] == [5, 1, 1]
    images = everything(data)
    assert images.dtype == torch.uint8 and images.shape == (7, 1, 8, 8)
    means = sorted(images.float().mean(dim=(1, 2, 3)).tolist())
    assert means == pytest.approx([20 * i for i in range(7)], abs=2)
    assert torch.equal(images, everything(load(tmp_path)))


def test_sub_folders_are_classes(tmp_path):
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        for i in range(10):
            save(tmp_path / name / f"{i}.png", colour, mode="RGB")
    data = load(tmp_path)
    assert data.facts.class_names == ("blue", "red") and data.facts.num_classes == 2
    assert [len(split) for split in (data.train, data.val, data.test)] == [16, 2, 2]
    for split in (data.train, data.val, data.test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert image[:, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0]][label]


@pytest.fixture
def decoded(tmp_path_factory, monkeypatch) -> list[Path]:
    """The files that are decoded from now on, with a cache that keeps what took no time, too."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("ddpm.io.cache.WORTH", 0)
    files = list[Path]()
    monkeypatch.setattr(
        "ddpm.data.folder.read_image", lambda file, size: files.append(file) or read_image(file, size)
    )
    return files


def test_second_start_decodes_no_picture(tmp_path, decoded, monkeypatch):
    for i in range(6):
        save(tmp_path / "cats" / f"{i}.png", (40 * i, 0, 9), mode="RGB")
    first = load(tmp_path)
    assert len(decoded) == 6
    monkeypatch.chdir(tmp_path)
    again = load(Path("."))  # the same, however it is typed
    assert len(decoded) == 6 and torch.equal(everything(first), everything(again))
    assert torch.equal(first.train.labels, again.train.labels)
    assert len(everything(load(tmp_path, 9))) == 6 and len(decoded) == 12, "another size"
    assert len(list(cache_folder().iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    ["other content", "same size and time", "one more", "one fewer", "another class", "broken cache"],
)
def test_pictures_are_decoded_again_when_anything_changed(tmp_path, decoded, change):
    for i in range(6):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", 20 * i)
    load(tmp_path)
    decoded.clear()
    if change == "other content":
        save(tmp_path / "a" / "2.png", 200)
    elif change == "same size and time":
        file = tmp_path / "a" / "2.png"
        before, grey = file.stat(), 40
        while grey == 40 or file.stat().st_size != before.st_size:
            save(file, grey := grey + 1)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "one more":
        save(tmp_path / "a" / "7.png", 200)
    elif change == "one fewer":
        (tmp_path / "a" / "2.png").unlink()
    elif change == "another class":
        (tmp_path / "a" / "2.png").rename(tmp_path / "b" / "2.png")
    else:
        (kept,) = cache_folder().iterdir()
        kept.write_bytes(kept.read_bytes()[:-1])
    data = load(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    assert decoded == files
    expected = torch.stack([torch.tensor(read_image(file, 8)[..., 0]) for file in files])
    found = everything(data)[:, 0]
    assert sorted(found[:, 0, 0].tolist()) == sorted(expected[:, 0, 0].tolist())
    assert len(list(cache_folder().iterdir())) == 1, "what was kept before has gone"


@pytest.mark.parametrize("cache", ["in the way/cache", "~no-such-user/cache"])
def test_pictures_are_read_where_nothing_can_be_kept(tmp_path, decoded, monkeypatch, cache):
    (tmp_path / "in the way").write_text("")
    monkeypatch.setenv("DDPM_CACHE", cache if cache[0] == "~" else str(tmp_path / cache))
    for i in range(3):
        save(tmp_path / f"{i}.png", 20 * i)
    for _ in range(2):
        assert len(everything(load(tmp_path))) == 3
    assert len(decoded) == 6


def test_what_is_quick_to_make_is_not_kept(tmp_path, decoded, monkeypatch):
    monkeypatch.setattr("ddpm.io.cache.WORTH", 60)
    for i in range(3):
        save(tmp_path / f"{i}.png", 20 * i)
    load(tmp_path)
    assert not list(cache_folder().iterdir())


def test_one_coloured_image_makes_all_rgb(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", 7)
    assert load(tmp_path).facts.channels == 1
    save(tmp_path / "3.png", (1, 2, 3), mode="RGB")
    assert load(tmp_path).facts.channels == 3


def test_middle_is_cut_out_and_scaled(tmp_path):
    stripes = np.repeat(np.array([9, 50, 50, 200, 200, 9], np.uint8), 8)[None].repeat(32, axis=0)
    for i in range(3):
        Image.fromarray(stripes).save(tmp_path / f"{i}.png")
    image = everything(load(tmp_path, 8))[0, 0]
    assert (image == image[0]).all()
    assert image[0, [1, 2, 5, 6]].tolist() == pytest.approx([50, 50, 200, 200], abs=2)


def test_shrinking_is_antialiased(tmp_path):
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for i in range(3):
        Image.fromarray(board).save(tmp_path / f"{i}.png")
    assert everything(load(tmp_path, 8)).float().sub(127.5).abs().max() < 4


def test_transparency_becomes_white(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", (0, 0, 0, 0), mode="RGBA")
    assert (everything(load(tmp_path)) == 255).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (40, 200)]
    for i in range(3):
        frames[0].save(tmp_path / f"{i}.gif", save_all=True, append_images=frames[1:])
    assert (everything(load(tmp_path)) == 40).all()


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(DataError, match="0 images found"):
        load(tmp_path)
    save(tmp_path / "0.png", 0)
    save(tmp_path / "1.png", 0)
    with pytest.raises(DataError, match=r"2 images found.*at least 3"):
        load(tmp_path)
    save(tmp_path / "cats" / "2.png", 0)
    with pytest.raises(DataError, match="2 images lie in the folder itself and 1 in sub-folders"):
        load(tmp_path)
    with pytest.raises(DataError, match="image_size=0"):
        load(tmp_path, 0)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "bomb", "16 bit"])
def test_broken_image_is_named(tmp_path, monkeypatch, damage):
    for i in range(4):
        save(tmp_path / f"{i}.png", 0, (64, 64))
    bad = tmp_path / "2.png"
    if damage == "bomb":
        monkeypatch.setattr("ddpm.io.pictures.MAX_SOURCE_PIXELS", 64 * 64)
        save(bad, 0, (65, 64))
    elif damage == "16 bit":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(bad)
    else:
        bad.write_bytes({"empty": b"", "text": b"hello", "cut": bad.read_bytes()[:60]}[damage])
    with pytest.raises(DataError, match=r"2\.png: ") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_image_that_claims_to_be_huge(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.bmp", 0)
    whole = (tmp_path / "1.bmp").read_bytes()
    (tmp_path / "1.bmp").write_bytes(whole[:18] + (100_000).to_bytes(4, "little") * 2 + whole[26:])
    with pytest.raises(DataError, match=r"1\.bmp"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["EPS", "TIFF", "PPM", "ICO", "PDF"])
def test_only_the_formats_meant_are_decoded(tmp_path, form):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", form)  # Pillow itself goes by the content
    with pytest.raises(
        DataError, match=r"a\.png: cannot be read as an image \(not PNG, JPEG, BMP, GIF, WEBP\)"
    ):
        read_image(tmp_path / "a.png", 8)


def test_small_file_of_many_pixels(tmp_path, recwarn, capfd):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "a.png")  # 900 million pixels in 110 kB
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(tmp_path / "a.png", 8)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")  # where Pillow only warns
    with pytest.raises(DataError, match=r"10000×10000 pixels; allowed: 50000000 in all"):
        read_image(tmp_path / "a.png", 8)
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_file_that_is_too_large(tmp_path):
    save(tmp_path / "a.bmp", 0)
    with (tmp_path / "a.bmp").open("r+b") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(DataError, match="1099511627776 bytes, more than"):
        read_image(tmp_path / "a.bmp", 8)


def test_jpeg_of_endless_scans(tmp_path):
    file = io.BytesIO()
    Image.new("L", (500, 500), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    (tmp_path / "a.jpg").write_bytes(data)
    assert (read_image(tmp_path / "a.jpg", 8) == 128).all()
    (tmp_path / "a.jpg").write_bytes(data[:-2] + scan * 300 + data[-2:])
    with pytest.raises(DataError, match="more than 200 scans"):
        read_image(tmp_path / "a.jpg", 8)


def test_turned_cmyk_and_transparent_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    wide = Image.new("RGB", (16, 8), "red")
    wide.paste("blue", (8, 0, 16, 8))
    wide.save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", 8)
    assert image[0, 4].tolist() == [255, 0, 0] and image[7, 4].tolist() == [0, 0, 255]
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "a.jpg")
    assert (read_image(tmp_path / "a.jpg", 8) == 0).all()
    half = Image.new("LA", (8, 8), (0, 128))
    half.save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 8) == 127).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.save(tmp_path / "a.png", transparency=1)
    assert (read_image(tmp_path / "a.png", 8) == 255).all()
    palette.save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 8) == [50, 60, 70]).all()


def test_folder_too_large_for_memory(tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / f"{i}.png", 0)
    monkeypatch.setattr("ddpm.data.folder.MAX_MEMORY", 3 * 3 * 8 * 8)
    assert len(everything(load(tmp_path, 8))) == 3
    with pytest.raises(DataError, match=r"3 images at dataset\.image_size=9 take 729 bytes; allowed: 576"):
        load(tmp_path, 9)
    monkeypatch.setattr("ddpm.data.picture_files.MAX_ENTRIES", 2)
    with pytest.raises(DataError, match="more than 2 files and folders"):
        load(tmp_path)


def test_folder_of_strange_things(tmp_path):
    for i in range(3):
        save(tmp_path / "cats" / f"{i}.png", 0)
    os.mkfifo(tmp_path / "cats" / "pipe.png")
    (tmp_path / "cats" / "dangling.png").symlink_to("nowhere")
    (tmp_path / "cats" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "cats" / "folder.png").mkdir()
    deep = os.open(tmp_path / "cats", os.O_RDONLY)
    for _ in range(1500):  # deeper than Python may recurse
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    try:
        assert load(tmp_path).facts.class_names == ("cats",)
    finally:
        subprocess.run(["rm", "-r", tmp_path / "cats" / "d"], check=True)  # pytest's own way recurses


@pytest.mark.parametrize("name", [b"a\nb", b"\x1b[31m", b"\xff"])
def test_class_names_that_no_terminal_can_show(tmp_path, name):
    for i in range(3):
        save(tmp_path / os.fsdecode(name) / f"{i}.png", 0)
    with pytest.raises(DataError, match="no plain text") as error:
        load(tmp_path)
    assert is_plain(str(error.value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_sub_folder_that_cannot_be_read(tmp_path):
    for name in ("a", "b"):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", 0)
    (tmp_path / "b").chmod(0)
    with pytest.raises(DataError, match="b: cannot be read"):
        load(tmp_path)
