"""scripts/convert_persian.py: other forms of the Hoda set become a file that dataset=persian reads."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.datasets.hoda import load_crops
from ddpm.errors import DataError
from tests.hoda_files import digits, same

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_persian.py"
ONE = np.full((2, 3), 255, np.uint8)


def convert(*args: object, cache: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"DDPM_CACHE": str(cache)}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def save_mat(path: Path, images: list[np.ndarray], labels: list[int]) -> None:
    from scipy.io import savemat

    cells = np.empty((len(images), 1), object)
    cells[:, 0] = images
    savemat(path, {"Data": cells, "labels": np.array(labels, np.uint8)[:, None]}, do_compression=True)


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


def test_command_converts_png_files_and_explains_errors(tmp_path):
    images, labels = digits(12)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(255 - image).save(tmp_path / f"{label}.{i}.png")  # dark on light
    out = tmp_path / "new" / "out.safetensors"
    done = convert(tmp_path, "--split", "test", "--out", out, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    order = sorted(range(12), key=lambda i: f"{labels[i]}.{i}.png")
    same(load_crops(out), [images[i] for i in order], [labels[i] for i in order])

    (tmp_path / "x.png").write_bytes((tmp_path / "0.0.png").read_bytes())
    done = convert(tmp_path, "--split", "test", cache=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "x.png" in done.stderr


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
    (tmp_path / "5.1.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"5\.1\.png: cannot be read"):
        script.read_folder(tmp_path)
    Image.new("L", (256, 4)).save(tmp_path / "5.1.png")
    with pytest.raises(DataError, match=r"5\.1\.png: 256×4 pixels"):
        script.read_folder(tmp_path)
