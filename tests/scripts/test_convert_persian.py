"""scripts/convert_persian.py: other forms of the Hoda set become a file that dataset=persian reads."""

import importlib.util
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.data.hoda import load_crops
from ddpm.errors import DataError
from tests.data.hoda_files import digits, same

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_persian.py"
ONE = np.full((2, 3), 255, np.uint8)


def convert(*args: object, cache: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"DDPM_CACHE": str(cache)}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def save_mat(
    path: Path, images: list[np.ndarray], labels: list[int], compress: bool = True, kind: type = np.uint8
) -> None:
    from scipy.io import savemat

    cells = np.empty((len(images), 1), object)
    cells[:, 0] = images
    content = {"other": np.eye(3), "Data": cells, "labels": np.array(labels, kind)[:, None]}
    savemat(path, content, do_compression=compress)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_persian", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_command_converts_a_mat_file(tmp_path):
    images, labels = digits(12)
    save_mat(tmp_path / "full.mat", images, labels)
    done = convert(tmp_path / "full.mat", "--split", "train", cache=tmp_path)
    written = tmp_path / "hoda-train.safetensors"
    assert done.returncode == 0 and done.stdout.startswith(
        f"{written}: 12 images of train (0: 2, 1: 2, 2: 1,"
    )
    assert "60000" in done.stderr, "warns that this is not the whole part"
    same(load_crops(written), images, labels)


def test_command_converts_png_files_and_explains_errors(script, tmp_path, monkeypatch, capsys):
    images, labels = digits(12)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(255 - image).save(tmp_path / f"{label}.{i}.png")  # dark on light
    out = tmp_path / "new" / "out.safetensors"
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "--split", "test", "--out", str(out)])
    script.main()
    order = sorted(range(12), key=lambda i: f"{labels[i]}.{i}.png")
    same(load_crops(out), [images[i] for i in order], [labels[i] for i in order])

    (tmp_path / "x.png").write_bytes((tmp_path / "0.0.png").read_bytes())
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])
    with pytest.raises(SystemExit, match=r"^error: [^\n]*x\.png[^\n]*$"):
        script.main()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([], [], "0 images"),
        ([ONE], [1, 2], "1 images and 2 labels"),
        ([ONE, ONE], [1, 10], "image 1 has the label 10"),
        ([ONE.astype(float)], [1], "image 0 is float64"),
        ([ONE[None]], [1], r"image 0 is uint8 of shape \(1, 2, 3\)"),
        ([np.zeros((256, 2), np.uint8)], [1], r"shape \(256, 2\)"),
        ([np.zeros((0, 2), np.uint8)], [1], r"shape \(0, 2\)"),
    ],
)
def test_images_that_the_converter_refuses(script, images, labels, message):
    with pytest.raises(DataError, match=message):
        script.to_crops(images, labels, Path("source"))


def test_sources_that_the_converter_refuses(script, tmp_path):
    from scipy.io import savemat

    (tmp_path / "a.mat").write_bytes(b"no mat file" * 30)
    with pytest.raises(DataError, match=r"a\.mat: cannot be read"):
        script.read_mat(tmp_path / "a.mat")
    with pytest.raises(DataError, match=r"absent\.mat: cannot be read"):
        script.read_mat(tmp_path / "absent.mat")
    savemat(tmp_path / "b.mat", {"Data": np.zeros(3), "labels": np.zeros(3)})
    with pytest.raises(DataError, match="no cell array"):
        script.read_mat(tmp_path / "b.mat")
    save_mat(tmp_path / "c.mat", [np.zeros((2, 2))], [1])
    with pytest.raises(DataError, match="cell 0 of 1 in 'Data' is no uint8 image"):
        script.read_mat(tmp_path / "c.mat")
    inner = np.empty((1, 1), object)
    inner[0, 0] = ONE
    save_mat(tmp_path / "c.mat", [inner], [1])
    with pytest.raises(DataError, match="cell 0 of 1"):
        script.read_mat(tmp_path / "c.mat")
    (tmp_path / "5.1.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"5\.1\.png: cannot be read"):
        script.read_folder(tmp_path)
    Image.new("L", (256, 4)).save(tmp_path / "5.1.png")
    with pytest.raises(DataError, match=r"5\.1\.png: 256×4 pixels"):
        script.read_folder(tmp_path)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float64, np.int64])
def test_mat_files_are_read_as_scipy_reads_them(script, tmp_path, compress, kind):
    from scipy.io import loadmat

    images, labels = digits(30)
    images += [
        np.array([[1]], np.uint8),
        np.array([[1, 2], [3, 4]], np.uint8),
    ]  # short enough for their own form
    save_mat(tmp_path / "a.mat", images, [*labels, 1, 2], compress, kind)
    ours, our_labels = script.read_mat(tmp_path / "a.mat")
    theirs = loadmat(tmp_path / "a.mat")
    assert our_labels == theirs["labels"].ravel().tolist() == [*labels, 1, 2]
    for a, b, source in zip(ours, theirs["Data"].ravel(), images, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
        np.testing.assert_array_equal(a, source, strict=True)


def test_mat_file_of_the_other_byte_order(script, tmp_path):
    def element(kind: int, data: bytes) -> bytes:
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    def matrix(kind: int, name: bytes, height: int, width: int, content: bytes) -> bytes:
        head = element(6, struct.pack(">II", kind, 0)) + element(5, struct.pack(">ii", height, width))
        return element(14, head + element(1, name) + content)

    cell = matrix(9, b"", 2, 3, element(2, bytes([1, 2, 3, 4, 5, 6])))
    whole = b"MATLAB".ljust(124) + b"\x01\x00MI"
    whole += matrix(1, b"Data", 1, 1, cell) + matrix(6, b"labels", 1, 1, element(9, struct.pack(">d", 7)))
    (tmp_path / "a.mat").write_bytes(whole)
    images, labels = script.read_mat(tmp_path / "a.mat")
    assert images[0].tolist() == [[1, 3, 5], [2, 4, 6]] and labels == [7]


def mat_variable(packed: bytes) -> bytes:
    return b"MATLAB".ljust(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(packed)) + packed


def test_mat_file_that_unpacks_to_too_much(script, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm.data.mat.MAX_BYTES", 1 << 20)
    (tmp_path / "a.mat").write_bytes(mat_variable(zlib.compress(bytes(1 << 24))))
    with pytest.raises(DataError, match="unpack to more than 1048576 bytes"):
        script.read_mat(tmp_path / "a.mat")


def test_mat_file_of_cells_within_cells(tmp_path):
    """A million of them, which would take the stack of a reader that follows them."""
    head = struct.pack("<IIII", 6, 8, 1, 0) + struct.pack("<IIii", 5, 8, 1, 1)
    name, sizes = struct.pack("<HHI", 1, 4, int.from_bytes(b"Data", "little")), range(0, 40_000_000, 48)
    nested = b"".join(struct.pack("<II", 14, 40 + size) + head + name for size in reversed(sizes))
    (tmp_path / "a.mat").write_bytes(mat_variable(zlib.compress(nested, 1)))
    done = convert(tmp_path / "a.mat", "--split", "train", cache=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_sources_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "7.1.png")
    for source in (tmp_path / "7.1.png", tmp_path, "/dev/zero", "a\x1b[31m\nb", tmp_path / "absent"):
        done = convert(source, "--split", "train", cache=tmp_path / "cache")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert "\x1b" not in done.stderr and not (tmp_path / "cache").exists()


def test_png_files_are_nothing_else(script, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "7.1.png", "BMP")
    with pytest.raises(DataError, match=r"7\.1\.png: cannot be read as an image \(not PNG\)"):
        script.read_folder(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "7.1.png")
    with (tmp_path / "7.1.png").open("r+b") as file:
        file.truncate(1 << 21)
    with pytest.raises(DataError, match="2097152 bytes, more than"):
        script.read_folder(tmp_path)
