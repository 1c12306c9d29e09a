"""What the folder dataset takes, what it passes over, how it numbers classes; folders made at random."""

import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm.data.dataset import Dataset, Split, check_dataset, hold_out, in_order_of
from ddpm.data.folder import folder, natural
from ddpm.data.info import listed
from ddpm.data.picture_files import SUFFIXES, find_pictures
from ddpm.errors import DataError, is_plain


def save(*paths: Path, grey: int = 0) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), grey).save(path, "PNG")


def load(path: Path) -> Dataset:
    return folder(Path("unused"), path=str(path), image_size=4)


def label_of(data: Dataset, grey: int) -> set[int]:
    """The labels of the images of one grey level, in all splits."""
    return {
        int(label)
        for split in (data.train, data.val, data.test)
        for image, label in zip(split.images, split.labels, strict=True)
        if image[0, 0, 0] == grey
    }


# What is taken, and what is passed over


def test_other_kinds_are_counted_with_an_example(tmp_path):
    save(
        *(tmp_path / name for name in ("1.png", "2.PNG", "3.png", "4.tif", "5.TIF", "6.jfif", "7", ".8.png"))
    )
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert load(tmp_path).notice == (
        f"{tmp_path}: 3 images taken; passed over: 2 × .tif (4.tif), 1 × .jfif (6.jfif), 1 × hidden (.8.png), "
        "1 × link that leads nowhere (dangling.png), 1 × no suffix (7), 1 × pipe, socket or device (pipe.png), "
        "1 × sub-folder without a picture (empty)"
    )


def test_only_other_kinds(tmp_path):
    save(*(tmp_path / f"{i}.tif" for i in range(6)))
    with pytest.raises(DataError, match=r"0 images found .*; passed over: 6 × \.tif \(0\.tif\)"):
        load(tmp_path)


def test_a_class_without_a_picture_is_named(tmp_path):
    save(*(tmp_path / name / f"{i}.png" for name in ("a", "b") for i in range(3)), tmp_path / "c" / "1.tif")
    data = load(tmp_path)
    assert data.facts.class_names == ("a", "b")
    assert "1 × .tif (c/1.tif)" in data.notice and "1 × sub-folder without a picture (c)" in data.notice


def test_links_to_folders_are_classes(tmp_path):
    save(*(tmp_path / "store" / name / f"{i}.png" for name in ("a", "b") for i in range(4)))
    save(*(tmp_path / "data" / "c" / f"{i}.png" for i in range(4)))
    for name in ("a", "b"):
        (tmp_path / "data" / name).symlink_to(f"../store/{name}")
    assert load(tmp_path / "data").facts.class_names == ("a", "b", "c")
    assert "passed over" not in load(tmp_path / "data").notice
    (tmp_path / "only").symlink_to("data")
    assert load(tmp_path / "only").facts.class_names == ("a", "b", "c")


def test_no_loop_and_no_picture_twice(tmp_path):
    data = tmp_path / "around" / "data"
    save(*(data / name / f"{i}.png" for name in ("a", "b") for i in range(4)), tmp_path / "around" / "x.png")
    for path, target in {
        "self": "self", "up": "..", "root": ".", "again": "a", "a/b": "../b", "b/back": "../../data", "0": "b"
    }.items():  # fmt: skip
        (data / path).symlink_to(target)
    found = load(data)
    assert (
        found.facts.class_names == ("a", "b") and f"{data}: 8 images taken in 2 sub-folders" in found.notice
    )
    assert "6 × link to a folder around it or read already (0)" in found.notice
    assert "1 × link that leads nowhere (self)" in found.notice


# Classes


def test_natural_order():
    names = ["10", "2", "b", "a10b", "a9", "1", "01", "", "a", "10", "٣", "x" + "9" * 300]
    assert sorted(names, key=natural) == [
        "", "01", "1", "2", "٣", "10", "10", "a", "a9", "a10b", "b", "x" + "9" * 300
    ]  # fmt: skip


def test_classes_are_numbered_in_natural_order(tmp_path):
    for k in range(12):
        save(*(tmp_path / str(k) / f"{i}.png" for i in range(4)), grey=20 * k)
    data = load(tmp_path)
    assert data.facts.class_names == tuple(map(str, range(12)))
    assert all(label_of(data, 20 * k) == {k} for k in range(12))


def test_the_order_of_an_older_checkpoint_is_kept(tmp_path):
    for k in range(12):
        save(*(tmp_path / str(k) / f"{i}.png" for i in range(4)), grey=20 * k)
    data, old = load(tmp_path), sorted(map(str, range(12)))
    kept = in_order_of(data, old)
    assert kept.facts.class_names == tuple(old) and kept.notice == data.notice
    assert all(label_of(kept, 20 * int(name)) == {number} for number, name in enumerate(old))
    assert torch.equal(kept.train.images, data.train.images)
    for others in ((), ["0", "1"], [*old[1:], "x"], list(data.facts.class_names)):
        assert in_order_of(data, others) is data


def test_list_of_classes():
    assert listed(["cat", "2"]) == "0 'cat', 1 '2'"
    assert listed(["a", "b", "c"], most=2) == "0 'a', 1 'b', and 1 more"
    assert listed(["a"] * 30, most=None).endswith("29 'a'") and listed(["a"] * 30).endswith("and 10 more")


@pytest.mark.parametrize(
    ("names", "warned"),
    [(("train", "test"), True), (("Training", "Validation"), True), (("train", "val", "extra"), True),
     (("test",), True), (("train", "bus"), False), (("test", "bus"), False)],
)  # fmt: skip
def test_splits_that_are_taken_for_classes(tmp_path, names, warned):
    save(
        *(tmp_path / name / kind / f"{i}.png" for name in names for kind in ("cat", "dog") for i in range(2))
    )
    data = load(tmp_path)
    assert (
        "warning: the sub-folders" in data.notice and "are the splits of a dataset" in data.notice
    ) is warned
    assert f"{4 * len(names)} images lie deeper, such as {sorted(names)[0]}/cat/0.png" in data.notice


@pytest.mark.parametrize(
    "counts", [(1, 5), (1, 1, 2), (1,) * 8 + (2,), (1,) * 18 + (2, 2), (1, 60), (2, 1, 40)]
)
def test_every_class_is_trained_on(tmp_path, counts):
    save(*(tmp_path / f"{k}" / f"{i}.png" for k, count in enumerate(counts) for i in range(count)))
    if sum(counts) < len(counts) + 2:
        with pytest.raises(
            DataError, match=rf"at least {len(counts) + 2} are needed, one of each class to train on"
        ):
            load(tmp_path)
        return
    data = load(tmp_path)
    assert set(data.train.labels.tolist()) == set(range(len(counts)))
    splits = (data.train, data.val, data.test)
    assert Counter(label for split in splits for label in split.labels.tolist()) == dict(enumerate(counts))


def test_hold_out_changes_the_draw_only_for_a_class_that_would_vanish():
    images = torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1)
    drawn = [2, 5, 8, 16, 18]  # as in test_hold_out_is_the_same_for_ever
    labels = torch.zeros(20, dtype=torch.int64)
    labels[[2, 3]] = 1
    assert hold_out(Split(images, labels), 5)[1].images.flatten().tolist() == drawn
    labels[3] = 0
    held = hold_out(Split(images, labels), 5)[1].images.flatten().tolist()
    assert 2 not in held and set(drawn) - {2} < set(held) and len(held) == 5


# Folders made at random: each is read, and its report adds up, or ends in one line


NAMES = (
    "a",
    "B",
    "10",
    "2",
    "train",
    "test",
    "val",
    "é",
    "with space",
    "a'b",
    ".hidden",
    "x,y",
    "=1",
    "-",
    "0x",
    "۳",
)
FILES = (
    "1.png",
    "2.PNG",
    "3.jpg",
    "4.tif",
    "5",
    "6.txt",
    ".7.png",
    "8.p\u0001g",
    "9.webp",
    "10.gif",
    "11.jfif",
    "12.",
)


def fill(rng: random.Random, root: Path) -> None:
    """Fill a folder with a few folders, pictures, links and other things."""
    root.mkdir()
    folders = [root]
    for _ in range(rng.randint(0, 6)):
        here = rng.choice(folders if rng.random() < 0.3 else [root]) / rng.choice(NAMES)
        if not os.path.lexists(here):
            here.mkdir()
            folders.append(here)
    places = folders[1:] if len(folders) > 1 and rng.random() < 0.8 else folders
    for _ in range(rng.randint(0, 30)):
        here = rng.choice(places)
        path = here / (rng.choice(FILES) if rng.random() < 0.4 else f"{rng.randint(0, 99)}.png")
        if os.path.lexists(path):
            continue
        what = rng.random()
        if what < 0.8:
            Image.new("RGB" if what < 0.1 else "L", (rng.randint(1, 9), 4), rng.randint(0, 255)).save(
                path, "PNG"
            )
        elif what < 0.95:
            target = rng.choice([*folders, root.parent, root.parent / "other", Path("nowhere"), path])
            path.symlink_to(target if rng.random() < 0.5 else os.path.relpath(target, path.parent))
        elif what < 0.97:
            os.mkfifo(path)
        elif what < 0.99:
            path.mkdir()
        else:
            path.write_bytes(b"no picture")


def try_folder(seed: int, home: Path) -> bool:
    """Read one folder in two ways; return whether it was read or ended in a DataError."""
    rng = random.Random(seed)
    here = home / str(seed)
    here.mkdir()
    save(here / "other" / "o" / "1.png", here / "other" / "2.png")
    fill(rng, root := here / "data")
    found = find_pictures(root)
    resolved = [os.path.realpath(file.parent) for file in found.files]
    assert len({(folder, file.name) for folder, file in zip(resolved, found.files, strict=True)}) == len(
        found.files
    )
    entries = [path for top, _, names in os.walk(root) for path in (Path(top) / name for name in names)]
    pictures = [
        path for path in entries
        if path.suffix.lower() in SUFFIXES and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]  # fmt: skip
    assert set(pictures) <= set(found.files), "what lies in real folders is taken"
    for file in set(found.files) - set(pictures):  # a link leads there, and no real folder that is read
        parts = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(here)).split(os.sep)
        assert parts[0] == "other" or any(part.startswith(".") for part in parts)
    try:
        data = check_dataset(load(root))
    except DataError as error:
        assert "\n" not in str(error) and str(root) in str(error)
        return False
    assert len(data.train) + len(data.val) + len(data.test) == len(found.files)
    assert f"{len(found.files):,} images taken" in data.notice and all(map(is_plain, data.notice.split("\n")))
    assert re.findall(r"passed over: .*", data.notice) == ([found.passed_over] if found.passed else [])
    if names := data.facts.class_names:
        assert set(names) == {file.relative_to(root).parts[0] for file in found.files}
        assert set(data.train.labels.tolist()) == set(range(len(names)))
    return True


def count_entries(root: Path) -> int:
    """The entries of a folder and of the real folders in it that are not hidden, without those folders."""
    count = 0
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            count += count_entries(Path(entry.path))
        else:
            count += 1
    return count


def try_count(seed: int, home: Path) -> None:
    """What is taken and what is passed over are all entries of a folder without links to hidden ones."""
    rng = random.Random(f"count {seed}")
    here = home / f"count-{seed}"
    here.mkdir()
    fill(rng, root := here / "data")
    for top, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(top) / name
            if path.is_symlink() and "/." in os.path.realpath(path):
                path.unlink()
    found = find_pictures(root)
    passed = sum(count for kind, (count, _) in found.passed.items() if kind != "sub-folder without a picture")
    assert len(found.files) + passed == count_entries(root)


def test_random_folders(tmp_path, record_property):
    read = sum(try_folder(seed, tmp_path) for seed in range(60))
    for seed in range(60):
        try_count(seed, tmp_path)
    assert 20 < read < 60
    record_property("summary", f"random folders: 60 tried, {read} read, {60 - read} refused in one line")


@pytest.mark.slow
def test_thousands_of_random_folders(tmp_path, record_property):
    read = sum(try_folder(seed, tmp_path) for seed in range(100, 1_600))
    for seed in range(100, 1_600):
        try_count(seed, tmp_path)
    record_property(
        "summary", f"random folders: 1,500 tried, {read} read, {1_500 - read} refused in one line"
    )
