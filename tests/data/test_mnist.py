"""IDX files, their verification and their download, on small stand-ins for the published files."""

import gzip
import hashlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.data import mnist as module
from ddpm.data.mnist import parse_idx
from ddpm.errors import DataError, is_plain

SHAPES = {
    "train-images-idx3-ubyte": (30, 28, 28),
    "train-labels-idx1-ubyte": (30,),
    "t10k-images-idx3-ubyte": (10, 28, 28),
    "t10k-labels-idx1-ubyte": (10,),
}
REAL = os.environ.get("DDPM_TEST_DATA")


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: generator.integers(0, 10 if len(shape) == 1 else 256, shape, np.uint8)
        for name, shape in SHAPES.items()
    }


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def published(tmp_path, monkeypatch) -> dict[str, bytes]:
    """The unpacked small files; the module takes them for the published MNIST, and never goes outside."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    files = {name: idx(array) for name, array in arrays().items()}
    monkeypatch.setattr(module, "SHAPES", SHAPES)
    monkeypatch.setattr(module, "HELD_OUT", 5)
    monkeypatch.setattr(module, "_mirrors", lambda _: [])
    variant = replace(
        module._MNIST,
        md5=tuple(hashlib.md5(gzip.compress(data, mtime=0)).hexdigest() for data in files.values()),
        sha256=tuple(hashlib.sha256(data).hexdigest() for data in files.values()),
    )
    monkeypatch.setattr(module, "_MNIST", variant)
    monkeypatch.setattr(module, "_KMNIST", replace(module._KMNIST, md5=variant.md5))
    return files


def put(folder: Path, files: dict[str, bytes], packed: bool = False) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
    return folder


def test_values_and_splits(tmp_path, published):
    put(tmp_path / "MNIST" / "raw", published)
    data = module.mnist(tmp_path)
    source = arrays()
    np.testing.assert_array_equal(data.test.images[:, 0], source["t10k-images-idx3-ubyte"])
    assert data.test.labels.tolist() == source["t10k-labels-idx1-ubyte"].tolist()
    assert data.test.labels.dtype == torch.int64 and data.train.images.dtype == torch.uint8
    assert [len(split) for split in (data.train, data.val, data.test)] == [25, 5, 10]
    ours = [(image.numpy().tobytes(), int(label)) for split in (data.train, data.val)
            for image, label in zip(split.images, split.labels, strict=True)]  # fmt: skip
    theirs = zip(source["train-images-idx3-ubyte"], source["train-labels-idx1-ubyte"], strict=True)
    assert sorted(ours) == sorted((image.tobytes(), int(label)) for image, label in theirs)
    facts = data.facts
    assert (facts.channels, facts.image_size, facts.num_classes, facts.levels) == (1, 28, 10, 256)


def test_sizes(tmp_path, published):
    put(tmp_path / "MNIST" / "raw", published)
    small = module.mnist(tmp_path).test.images
    padded = module.mnist(tmp_path, image_size=32).test.images
    assert torch.equal(padded[..., 2:-2, 2:-2], small) and padded.sum() == small.sum()
    large = module.mnist(tmp_path, image_size=64)
    assert large.test.images.shape == (10, 1, 64, 64) and large.facts.image_size == 64
    means = [images.float().mean(dim=(1, 2, 3)) for images in (large.test.images, small)]
    assert torch.allclose(*means, atol=3)
    with pytest.raises(DataError, match=r"image_size=20 .*28, 32, 64"):
        module.mnist(tmp_path, image_size=20)


@pytest.mark.parametrize("name", SHAPES)
def test_one_flipped_bit(tmp_path, published, name):
    raw = put(tmp_path / "MNIST" / "raw", published)
    data = bytearray(published[name])
    data[-3] ^= 1
    (raw / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: its SHA-256"):
        module.mnist(tmp_path)


def test_without_a_known_sha256_the_packed_file_vouches(tmp_path, published):
    raw = put(tmp_path / "KMNIST" / "raw", published, packed=True)
    assert module.kmnist(tmp_path).facts.class_names[:2] == ("o", "ki")
    name = "t10k-images-idx3-ubyte"
    flipped = published[name][:-1] + bytes([published[name][-1] ^ 1])
    (raw / name).write_bytes(flipped)
    with pytest.raises(DataError, match=f"{name}: it is not the published"):
        module.kmnist(tmp_path)
    (raw / f"{name}.gz").write_bytes(gzip.compress(flipped, mtime=0))
    with pytest.raises(DataError, match=f"{name}: it is not the published"):
        module.kmnist(tmp_path)


@pytest.mark.parametrize(("function", "folder"), [(module.mnist, "MNIST"), (module.kmnist, "KMNIST")])
def test_second_start_does_not_read_what_is_packed(tmp_path, published, function, folder):
    raw = put(tmp_path / folder / "raw", published, packed=True)
    first = function(tmp_path)
    for packed in raw.glob("*.gz"):
        packed.write_bytes(b"whoever reads this will not get far")
    assert torch.equal(function(tmp_path).train.images, first.train.images)


def test_without_a_note_what_is_packed_is_read_again(tmp_path, published):
    raw = put(tmp_path / "KMNIST" / "raw", published, packed=True)
    (tmp_path / "cache").write_text("a file in the way")  # so that none can be written
    first = module.kmnist(tmp_path)
    assert torch.equal(module.kmnist(tmp_path).test.images, first.test.images)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"not what was published")
    with pytest.raises(DataError, match="it is not the published"):
        module.kmnist(tmp_path)


def test_second_start_does_not_scale_again(tmp_path, published, monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ddpm.io.cache.WORTH", 0)
    put(tmp_path / "MNIST" / "raw", published)
    first = module.mnist(tmp_path, image_size=64)
    monkeypatch.setattr(module, "_scale", None)
    second = module.mnist(tmp_path, image_size=64)
    for a, b in ((first.train, second.train), (first.test, second.test)):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("function", [module.fashion_mnist, module.kmnist])
def test_unpacked_files_alone_are_not_believed(tmp_path, published, monkeypatch, function):
    folder = {module.fashion_mnist: "FashionMNIST", module.kmnist: "KMNIST"}[function]
    raw = put(tmp_path / folder / "raw", published)
    for name, data in published.items():  # a note beside the files comes from where they come from
        (raw / f"{name}.sha256").write_text(hashlib.sha256(data).hexdigest())
    with pytest.raises(DataError, match=r"put train-images-idx3-ubyte\.gz.*whose MD5 are known"):
        function(tmp_path)


def test_unpacked_files_are_compared_with_downloaded_ones(tmp_path, published, server, monkeypatch):
    monkeypatch.setattr(module, "_mirrors", lambda _: [server.url])
    name = "t10k-labels-idx1-ubyte"
    label = bytearray(published[name])
    label[8 + 4] = (label[8 + 4] + 1) % 10
    raw = put(tmp_path / "KMNIST" / "raw", published | {name: bytes(label)})
    with pytest.raises(DataError, match=f"{name}: it is not the published"):
        module.kmnist(tmp_path)
    (raw / name).unlink()
    assert len(module.kmnist(tmp_path).train) == 25
    assert len(server.asked) == 4, "each once"
    for packed in raw.glob("*.gz"):
        packed.unlink()
    assert len(module.kmnist(tmp_path).train) == 25, "they have been verified before"
    (tmp_path / "cache" / "KMNIST-train-images-idx3-ubyte.sha256").unlink()
    module.kmnist(tmp_path)
    assert "/train-images-idx3-ubyte.gz" in server.asked[4:]


GOOD = idx(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))


def test_idx():
    assert parse_idx(GOOD, "f", (3, 2, 2)).tolist() == np.arange(12).reshape(3, 2, 2).tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0"),
        (GOOD[:15], "ends at byte 15, inside the header of 16"),
        (b"\x1f\x8b" + GOOD[2:], "magic number 1f8b0803"),
        (GOOD[:3] + b"\x01" + GOOD[4:], "magic number 00000801"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], "magic number 00000d03"),
        (GOOD[:4] + b"\xff\xff\xff\xff" + GOOD[8:], "4294967295×2×2 at byte 4 are not 3×2×2"),
        (GOOD[:-1], "has 27 bytes, not 28"),
        (GOOD + b"\0", "has 29 bytes, not 28"),
    ],
)
def test_malformed_idx(data, message):
    with pytest.raises(DataError, match="^f: .*" + message):
        parse_idx(data, "f", (3, 2, 2))


# Download


@pytest.fixture
def server(published):
    """Serves the packed files on this machine and notes the requests; tests may change `answers`."""
    answers = {f"/{name}.gz": gzip.compress(data, mtime=0) for name, data in published.items()}
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = answers.get(self.path)
            if http.reason:
                self.send_error(503, http.reason)
            elif self.path.startswith("/away/"):
                self.send_response(302)
                self.send_header("Location", "http://[::1/")
                self.end_headers()
            else:
                self.send_response(404 if data is None else 200)
                self.end_headers()
                for byte in data or b"" if http.pause else [data or b""]:
                    time.sleep(http.pause)
                    self.wfile.write(bytes([byte]) if http.pause else byte)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        http.reason, http.pause = "", 0.0
        http.answers, http.asked, http.url = answers, asked, f"http://127.0.0.1:{http.server_port}/"
        yield http
        http.shutdown()


def test_download_then_read(tmp_path, published, server, monkeypatch, capfd):
    monkeypatch.setattr(module, "_mirrors", lambda _: [server.url + "absent/", server.url])
    assert len(module.mnist(tmp_path).test) == 10
    raw = tmp_path / "MNIST" / "raw"
    assert all((raw / name).read_bytes() == data for name, data in published.items())
    assert not list(raw.glob("*.part"))
    assert len(server.asked) == 8, "the first mirror has none of the four"
    module.mnist(tmp_path)
    assert len(server.asked) == 8, "nothing is downloaded again"
    assert capfd.readouterr() == ("", ""), "a library does not print"


def test_packed_files_at_hand_are_used(tmp_path, published):
    raw = put(tmp_path / "MNIST" / "raw", published, packed=True)
    for name in published:
        (raw / name).unlink()
    assert len(module.mnist(tmp_path).test) == 10


def test_nothing_is_left_that_could_be_trusted(tmp_path, server, monkeypatch):
    monkeypatch.setattr(module, "_mirrors", lambda _: [server.url])
    bad = "/t10k-images-idx3-ubyte.gz"
    good, server.answers[bad] = server.answers[bad], server.answers[bad][:-20]
    with pytest.raises(DataError, match=r"wrong MD5.*dataset=digits") as error:
        module.mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    assert str(raw) in str(error.value) and all(name in str(error.value) for name in SHAPES)
    assert "\n" not in str(error.value)
    assert not (raw / bad[1:]).exists() and not (raw / bad[1:-3]).exists()
    server.answers[bad] = good
    assert len(module.mnist(tmp_path).train) == 25, "goes on where it stopped"


def test_no_words_of_a_mirror_reach_the_terminal(tmp_path, server, monkeypatch):
    monkeypatch.setattr(module, "_mirrors", lambda _: [server.url])
    server.reason = "busy \x1b[31m\x07"
    with pytest.raises(DataError, match=r"busy \\x1b\[31m\\x07") as error:
        module.mnist(tmp_path)
    assert is_plain(str(error.value))


def test_mirror_that_sends_a_byte_now_and_then(tmp_path, server, monkeypatch):
    monkeypatch.setattr(module, "_mirrors", lambda _: [server.url])
    monkeypatch.setattr(module, "DEADLINE", 0.3)
    server.pause = 0.01
    with pytest.raises(DataError, match="not complete within 0 seconds"):
        module.mnist(tmp_path)


def test_mirror_that_redirects_to_no_address(tmp_path, published, server, monkeypatch):
    monkeypatch.setattr(module, "_mirrors", lambda _: [server.url + "away/", server.url])
    assert len(module.mnist(tmp_path).test) == 10


def test_what_a_killed_download_left_is_taken_away(tmp_path, server, monkeypatch):
    monkeypatch.setattr(module, "_mirrors", lambda _: [server.url])
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / ".t10k-labels-idx1-ubyte.gz.1.00000000.tmp").write_bytes(b"half")
    module.mnist(tmp_path)
    assert not list(raw.glob("*.tmp"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_pipe_instead_of_a_file(tmp_path, published, suffix):
    raw = put(tmp_path / "KMNIST" / "raw", published, packed=True)
    name = "train-labels-idx1-ubyte" + suffix
    (raw / name).unlink()
    os.mkfifo(raw / name)
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        module.kmnist(tmp_path)


def test_packed_file_that_unpacks_to_too_much():
    bomb = gzip.compress(bytes(1 << 24))
    assert len(module._unpack(bomb, Path("f.gz"), (30,))) == 8 + 30 + 1


def test_no_network(tmp_path, published, monkeypatch):
    monkeypatch.setattr(module, "_mirrors", lambda _: ["http://127.0.0.1:9/"])
    with pytest.raises(DataError, match=r"Connection refused.*dataset=digits"):
        module.mnist(tmp_path)


def test_folder_that_cannot_be_made(tmp_path, published):
    (tmp_path / "MNIST").write_text("a file in the way")
    with pytest.raises(DataError, match="dataset=digits"):
        module.mnist(tmp_path)


def test_several_processes_download_once(tmp_path, server, monkeypatch):
    script = f"""
from pathlib import Path
from dataclasses import replace
import ddpm.data.mnist as module
module.SHAPES = {SHAPES!r}
module.HELD_OUT = 5
module._MNIST = replace(module._MNIST, md5={module._MNIST.md5!r}, sha256={module._MNIST.sha256!r})
module._mirrors = lambda _: [{server.url!r}]
print(int(module.mnist(Path({str(tmp_path)!r})).train.images.sum()))
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    sums = [run.communicate(timeout=60)[0] for run in runs]
    assert sums[0].strip().isdigit() and len(set(sums)) == 1
    assert sorted(server.asked) == sorted(server.answers), "each file once"


def test_hashes_and_mirrors_are_those_of_torchvision():
    import torchvision.datasets

    for variant in (module._MNIST, module._FASHION_MNIST, module._KMNIST):
        published = getattr(torchvision.datasets, variant.folder).resources
        assert [
            (f"{name}.gz", md5) for name, md5 in zip(module.SHAPES, variant.md5, strict=True)
        ] == published
        assert all(url.endswith("/") for url in module._mirrors(variant))


@pytest.mark.skipif(REAL is None, reason="DDPM_TEST_DATA does not name a folder with the real data")
def test_real_mnist_is_what_torchvision_reads():
    import torchvision.datasets

    data = module.mnist(Path(REAL))
    theirs = torchvision.datasets.MNIST(REAL, train=False, download=False)
    assert torch.equal(data.test.images[:, 0], theirs.data) and torch.equal(data.test.labels, theirs.targets)
    assert len(data.train) == 55_000 and len(data.val) == 5_000
    ours = torch.bincount(torch.cat([data.train.labels, data.val.labels]))
    assert torch.equal(ours, torch.bincount(torchvision.datasets.MNIST(REAL, train=True).targets))
