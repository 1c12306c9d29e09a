"""Pixels: exact round trips, clipping, and where a grid puts what."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm.io.images import grid, normalise, save_gif, save_png, to_uint8


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
