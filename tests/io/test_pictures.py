"""Pictures of unknown origin: what their metadata may cost."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

from ddpm.io.pictures import read_image


def overlapping_exif(tags: int, size: int) -> bytes:
    """EXIF whose every tag claims the same `size` bytes, so that reading all of them takes tags · size."""
    start = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHII", 1000 + i, 7, size, start) for i in range(tags))
    return b"II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4) + bytes(size)


def png_with(exif: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), 90).save(file, "PNG")
    whole, chunk = file.getvalue(), b"eXIf" + exif
    return (
        whole[:33] + struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]
    )


def jpeg_with(exif: bytes) -> bytes:
    """Spread over segments of 64 KiB, which decoders join."""
    file = io.BytesIO()
    Image.new("L", (8, 8), 90).save(file, "JPEG")
    parts = [exif[i : i + 65_000] for i in range(0, len(exif), 65_000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts]
    return file.getvalue()[:2] + b"".join(segments) + file.getvalue()[2:]


@pytest.mark.parametrize("make", [png_with, jpeg_with])
def test_metadata_takes_no_more_memory_than_the_file_is_worth(tmp_path: Path, make) -> None:
    """Pillow before 13.0 took 800 MB for this file of 200 KB."""
    (tmp_path / "a.img").write_bytes(make(overlapping_exif(8_000, 100_000)))
    assert (tmp_path / "a.img").stat().st_size < 200_000
    tracemalloc.start()
    try:
        assert abs(int(read_image(tmp_path / "a.img", 8)[4, 4, 0]) - 90) < 3
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20  # 128 MiB is the buffer that the file is read into
