"""Splits, the cache's files, the small datasets, and that configs and functions agree."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddpm.datasets import DATASETS
from ddpm.datasets.cache import cache_folder, load_arrays, save_arrays, write_atomically
from ddpm.datasets.folder import folder
from ddpm.datasets.types import Split, check_image_size, hold_out
from ddpm.errors import DataError

CONFIGS = Path(__file__).parents[1] / "configs" / "dataset"


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
    code = "import sys, ddpm.datasets; print({'torchvision', 'sklearn', 'PIL', 'scipy'} & set(sys.modules))"
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
    loaded = load_arrays(tmp_path / "new" / "file")
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
            load_arrays(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 7 + b"\x7f{}"])
def test_what_is_no_tensor_file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="file"):
        load_arrays(tmp_path / "file")


def test_tensor_types_that_numpy_lacks(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "file")
    with pytest.raises(DataError, match="safetensors"):
        load_arrays(tmp_path / "file")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


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
        monkeypatch.setattr("ddpm.datasets.folder.MAX_SOURCE_PIXELS", 64 * 64)
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
