"""Pixels: exact round trips, clipping, and where a grid puts what."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.io.images import (
    WIDEST,
    by_class,
    fitting,
    grid,
    in_rows,
    normalise,
    save_gif,
    save_png,
    table,
    to_uint8,
)


def test_round_trip_of_all_levels() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = normalise(levels)
    assert x.min() == -1 and x.max() == 1
    assert (to_uint8(x)[0, ..., 0] == levels[0, 0].numpy()).all()


def test_clipped_and_rounded_to_nearest() -> None:
    x = torch.tensor([-7.0, 7.0, 0.0, 0.5 / 127.5 - 1 + 1e-4]).view(1, 1, 2, 2)
    assert to_uint8(x).flatten().tolist() == [0, 255, 128, 1]


def test_grid_places_images_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(28, 1).repeat(28, 2)
    picture = grid(images, nrow=2)
    assert picture.shape == (3 * 58 + 2, 2 * 58 + 2, 1)  # 28 pixels, enlarged twice, and a gap of 2
    assert [int(picture[31 + 58 * (i // 2), 31 + 58 * (i % 2), 0]) for i in range(5)] == [0, 1, 2, 3, 4]
    assert grid(images).shape == (2 * 58 + 2, 3 * 58 + 2, 1)


@pytest.mark.parametrize("size", [1, 28, 256, 1024])
@pytest.mark.parametrize("n", [1, 64, 5000])
def test_a_table_is_never_larger_than_a_screen_shows(n: int, size: int) -> None:
    """Rows of a near-square, of a typed length and of a class; each shown once, where the table says."""
    classes = np.arange(n) % 10
    for places in (in_rows(n, 8), in_rows(n, 10**6), in_rows(n, math.isqrt(n) + 1), by_class(classes)):
        assert sorted(places[places >= 0]) == list(range(n))
        fit = fitting(size)
        height, width = (min(fit, length) for length in places.shape)
        if max(n, height * width) * size * size > 4e6:
            continue  # the largest are slow to draw
        images = np.broadcast_to(np.arange(n, dtype=np.uint64)[:, None, None, None] % 251, (n, size, size, 1))
        picture, shown = table(images.astype(np.uint8), places)
        assert max(picture.shape) <= max(WIDEST, 1030)
        numbers = shown[shown >= 0]
        assert len(set(numbers)) == len(numbers) >= min(n, fit)
        assert len(numbers) == n or shown.shape[0] in range(fit // len(places) * len(places), fit + 1)
        step = (picture.shape[0] - 2) // shown.shape[0]
        corners = picture[2::step, 2::step, 0][: shown.shape[0], : shown.shape[1]]
        assert (corners == np.where(shown < 0, 96, shown % 251)).all()


def test_classes_keep_their_rows_where_these_wrap() -> None:
    classes = np.arange(3000) % 10
    _, shown = table(np.zeros((3000, 28, 28, 1), np.uint8), by_class(classes))
    assert shown.shape == (50, 60) and len(shown[shown >= 0]) == 3000
    assert all(set(classes[line]) == {number // 5} for number, line in enumerate(shown))
    _, shown = table(np.zeros((9000, 28, 28, 1), np.uint8), by_class(np.arange(9000) % 10))
    assert shown.shape == (60, 69) and len(shown[shown >= 0]) == 4140


def test_pictures_of_other_channels_show_the_first(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 5), dtype=np.uint8)
    for channels, mode in ((2, "L"), (4, "RGB"), (5, "RGB")):
        save_png(tmp_path / "a.png", image[..., :channels])
        with Image.open(tmp_path / "a.png") as read:
            assert read.mode == mode
            assert (np.asarray(read).reshape(9, 7, -1) == image[..., : len(mode)]).all()


def test_files_hold_the_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        image = rng.integers(0, 256, (9, 7, channels), dtype=np.uint8)
        save_png(tmp_path / "a.png", image)
        read = np.asarray(Image.open(tmp_path / "a.png"))
        assert (read.reshape(image.shape) == image).all()
    save_gif(tmp_path / "a.gif", [image, 255 - image, image])
    film = Image.open(tmp_path / "a.gif")
    assert getattr(film, "n_frames", 1) == 3 and film.size == (7, 9)
