"""Files in the official format of the Hoda set, made by the tests from random crops."""

import numpy as np

from ddpm.data.hoda import HEADER, Crops


def runs(image: np.ndarray) -> bytes:
    """The official run lengths: each row begins with background."""
    out = bytearray()
    for row in image:
        value, length = 0, 0
        for pixel in [*row.tolist(), None]:
            if pixel != value:
                out.append(length)
                value, length = pixel, 0
            length += 1
    return bytes(out)


def record(image: np.ndarray, label: int, own_size: bool = True) -> bytes:
    height, width = image.shape
    data = runs(image)
    size = bytes([width, height]) if own_size else b""
    return bytes([0xFF, label]) + size + len(data).to_bytes(2, "little") + data


def header(labels: list[int], *, size=(0, 0), total: int | None = None, kind: int = 0) -> bytes:
    counts = np.bincount(labels, minlength=128).tolist()
    total = len(labels) if total is None else total
    return HEADER.pack(2005, 8, 4, *size, total, *counts, kind, b"", b"")


def cdb(images: list[np.ndarray], labels: list[int]) -> bytes:
    return header(labels) + b"".join(map(record, images, labels))


def digits(n: int, seed: int = 0) -> tuple[list[np.ndarray], list[int]]:
    """Random crops of different sizes, every one with ink, a third of it like the real ones."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        image = np.where(generator.random(generator.integers(3, 12, 2)) < 0.33, 255, 0).astype(np.uint8)
        image[0, 0] = 255
        images.append(image)
    return images, [i % 10 for i in range(n)]


def same(crops: Crops, images: list[np.ndarray], labels: list[int]) -> None:
    assert crops.labels.tolist() == labels
    for ours, theirs in zip(crops.images(), images, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
