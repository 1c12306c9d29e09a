"""Datasets that have to be downloaded: many processes at once, mirrors that fail, downloaders that are killed.

The outside alone is faked: a server on this machine stands in for the mirrors, and small files for the published.
"""

import gzip
import hashlib
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import numpy as np

from ddpm.data import mnist
from ddpm.errors import DataError, is_plain
from tests.faults.cases import Case
from tests.faults.processes import Script, no_traceback, refused, succeeded

SHAPES = {
    "train-images-idx3-ubyte": (300, 28, 28),
    "train-labels-idx1-ubyte": (300,),
    "t10k-images-idx3-ubyte": (40, 28, 28),
    "t10k-labels-idx1-ubyte": (40,),
}
HELD_OUT = 40
REAL_FROM = 8  # processes: so many are real commands; fewer only call the dataset, which is lighter
PATIENCE = 120.0  # seconds
FAULTS = (
    "absent",
    "breaks off",
    "wrong",
    "resets",
    "no HTTP",
    "strange reason",
    "bad redirect",
    "empty",
    "longer",
)


def _files() -> dict[str, bytes]:
    """The packed files by name; unpacked they are IDX files of random pixels."""
    generator = np.random.default_rng(0)
    packed = {}
    for name, shape in SHAPES.items():
        values = generator.integers(0, 10 if len(shape) == 1 else 256, shape, np.uint8)
        head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        packed[f"{name}.gz"] = gzip.compress(head + values.tobytes(), mtime=0)
    return packed


class Mirrors(ThreadingHTTPServer):
    """Answers `/<mirror>/<file>` as `behaviour[mirror, file]` says, with the whole file if it says nothing."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = _files()
        self.behaviour: dict[tuple[str, str], str] = {}
        self.asked: list[tuple[str, str]] = []  # (mirror, file) of every request
        self.stalled = threading.Event()  # set once a request stands still

    def url(self, mirror: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{mirror}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """The other side was killed: that is what is tried here."""
        if not isinstance(sys.exception(), ConnectionError):
            raise


class _Handler(BaseHTTPRequestHandler):
    server: Mirrors

    def do_GET(self) -> None:
        _, mirror, name = self.path.split("/")
        self.server.asked.append((mirror, name))
        data, how = self.server.files[name], self.server.behaviour.get((mirror, name), "good")
        if how == "absent":
            self.send_error(404)
        elif how == "strange reason":
            self.send_error(503, "busy \x1b[31m\x07 come back later")
        elif how == "bad redirect":
            self.send_response(302)
            self.send_header("Location", "http://[::1/\x07")
            self.end_headers()
        elif how == "no HTTP":
            self.wfile.write(b"\x00\xff" * 400)
        elif how == "wrong":
            self._send(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        elif how == "empty":
            self._send(b"")
        elif how == "longer":
            self._send(data + b"\0")
        elif how == "breaks off":
            self._send(data[: len(data) // 2], promised=len(data))
        elif how == "resets":
            self._send(data[: len(data) // 2], promised=len(data))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif how == "stalls":
            self._send(data[: len(data) // 2], promised=len(data))
            self.server.stalled.set()
            time.sleep(PATIENCE)
        else:
            self._send(data)

    def _send(self, data: bytes, promised: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if promised is None else promised))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _mirrors() -> Iterator[Mirrors]:
    with Mirrors() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


# What the processes load: it takes the small files for the published ones, and is the starting line.

PLUGIN = """
import os, time
from dataclasses import replace
from pathlib import Path
{imports}
from ddpm.data import mnist

{mirrors}
mnist.SHAPES, mnist.HELD_OUT, mnist.TIMEOUT = {shapes!r}, {held_out}, {timeout}
mnist._MNIST = replace(mnist._MNIST, md5={md5!r}, sha256={sha256!r})
Path(f"ready-{{os.getpid()}}").touch()
while not Path("go").exists():
    time.sleep(0.002)
"""
CALL = """
import sys
sys.path.insert(0, ".")
import local_mirror
from pathlib import Path
from ddpm.data.datasets import DATASETS
from ddpm.errors import UserError
try:
    print(int(DATASETS["mnist"](Path("data")).train.images.sum()))
except UserError as error:
    sys.exit(f"ddpm: {error}")
"""


def _variant(files: dict[str, bytes]) -> mnist._Variant:
    return replace(
        mnist._MNIST,
        md5=tuple(hashlib.md5(data).hexdigest() for data in files.values()),
        sha256=tuple(hashlib.sha256(gzip.decompress(data)).hexdigest() for data in files.values()),
    )


def _write_plugin(folder: Path, server: Mirrors, mirrors: tuple[str, ...], real: bool) -> None:
    variant, urls = _variant(server.files), [server.url(mirror) for mirror in mirrors]
    text = PLUGIN.format(
        imports="import torchvision.datasets" if real else "",  # which takes its time
        mirrors=("torchvision.datasets.MNIST.mirrors = " if real else "mnist._mirrors = lambda _: ")
        + f"{urls}",
        shapes=SHAPES,
        held_out=HELD_OUT,
        timeout=PATIENCE / 2,  # on a busy machine the next process may take its time to start
        md5=variant.md5,
        sha256=variant.sha256,
    )
    (folder / "local_mirror.py").write_text(text)


def _train(folder: Path, number: int) -> Script:
    return Script(
        "train",
        "dataset=mnist",
        "plugins=[local_mirror]",
        f"run_dir=run_{number}",
        "model.channels=[8,16]",
        "model.attention=[]",
        "model.head_dim=8",
        "trainer.batch_size=16",
        "trainer.max_steps=1",
        "trainer.log_every=1",
        "trainer.sample_every=0",
        "device=cpu",
        cwd=folder,
    )


def _call(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CALL], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _whole_and_nothing_else(raw: Path, server: Mirrors) -> None:
    """The four files as published, packed and unpacked, and at most the lock besides."""
    for name, data in server.files.items():
        assert (raw / name).read_bytes() == data, f"{name} is not what the mirror has"
        assert (raw / name[:-3]).read_bytes() == gzip.decompress(data), f"{name[:-3]} is not what was packed"
    _no_others(raw, server)


def _no_others(raw: Path, server: Mirrors) -> None:
    allowed = {"download.lock", *server.files, *(name[:-3] for name in server.files)}
    others = {path.name for path in raw.iterdir()} - allowed if raw.is_dir() else set()
    assert not others, f"left behind: {others}"


# Cases


def race(folder: Path, count: int) -> str:
    """`count` processes at once; every file fails at the first mirror, in its own way, and is whole at the second."""
    real = count >= REAL_FROM
    with _mirrors() as server:
        for name, fault in zip(server.files, ("absent", "breaks off", "wrong", "resets"), strict=True):
            server.behaviour["first", name] = fault
        _write_plugin(folder, server, ("first", "second"), real)
        if real:
            _race_of_commands(folder, count)
        else:
            _race_of_calls(folder, count)
        asked = sorted(server.asked)
        assert asked == sorted((mirror, name) for mirror in ("first", "second") for name in server.files), (
            f"each file should be asked for once at each mirror: {asked}"
        )
        _whole_and_nothing_else(folder / "data" / "MNIST" / "raw", server)
    kind = "ddpm-train" if real else "processes"
    return f"{count} {kind} at once: each of 4 files fetched once, after one failure each; all ended well"


def _race_of_commands(folder: Path, count: int) -> None:
    scripts = [_train(folder, number) for number in range(count)]
    _wait_until_ready(folder, count, scripts[0].running)
    (folder / "go").touch()
    for script in scripts:
        script.finish()
        succeeded(script)


def _race_of_calls(folder: Path, count: int) -> None:
    calls = [_call(folder) for _ in range(count)]
    _wait_until_ready(folder, count, lambda: calls[0].poll() is None)
    (folder / "go").touch()
    ends = [(*call.communicate(timeout=PATIENCE), call.returncode) for call in calls]
    assert all(end == (ends[0][0], "", 0) for end in ends) and ends[0][0].strip().isdigit(), ends


def _wait_until_ready(folder: Path, count: int, alive: Callable[[], bool]) -> None:
    """Until so many stand at the starting line, or one has ended before, whose exit status will be looked at."""
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob("ready-*"))) < count and alive():
        assert time.monotonic() < end, "the processes do not get to their start"
        time.sleep(0.01)


def faults(folder: Path, count: int) -> str:
    """Two mirrors with random faults: success if any has the file, else one line; and it goes on where it stopped."""
    succeeded_at_once = refusals = 0
    with _mirrors() as server:
        settings = {
            "SHAPES": SHAPES,
            "HELD_OUT": HELD_OUT,
            "TIMEOUT": 5.0,
            "_MNIST": _variant(server.files),
            "_mirrors": lambda _: [server.url("first"), server.url("second")],
        }
        with patch.multiple(mnist, **settings):
            for trial in range(count):
                if _one_fault(folder / f"{trial}", server, random.Random(f"downloads/{trial}")):
                    succeeded_at_once += 1
                else:
                    refusals += 1
    assert min(succeeded_at_once, refusals) > 0, "both ends should have been reached"
    return (
        f"{count} downloads from faulty mirrors: {succeeded_at_once} complete, {refusals} refused in one line "
        f"and completed later"
    )


def _one_fault(root: Path, server: Mirrors, draw: random.Random) -> bool:
    raw = root / "MNIST" / "raw"
    share = draw.choice((0.3, 0.8))
    keys = [(mirror, name) for mirror in ("first", "second") for name in server.files]
    server.behaviour = {key: draw.choice(FAULTS) for key in keys if draw.random() < share}
    server.asked.clear()
    reachable = all(
        any((mirror, name) not in server.behaviour for mirror in ("first", "second")) for name in server.files
    )
    try:
        mnist.mnist(root)
        complete = True
    except DataError as error:
        complete, text = False, str(error)
        assert is_plain(text) and "dataset=digits" in text and str(raw) in text, repr(text)
    assert complete == reachable, f"{server.behaviour}: complete is {complete}"
    _no_others(raw, server)
    had = {path.name for path in raw.glob("*.gz")}
    assert all((raw / name).read_bytes() == server.files[name] for name in had), "a file that is not whole"
    server.behaviour = {}
    server.asked.clear()
    mnist.mnist(root)
    assert {name for _, name in server.asked} == server.files.keys() - had, "fetched again, or never"
    _whole_and_nothing_else(raw, server)
    return complete


def killed(folder: Path, count: int) -> str:
    """A process is killed in the middle of a file while another waits for it: that one takes over."""
    for trial in range(count):
        _kill_one(folder / f"{trial}", trial)
    return (
        f"{count} downloads killed midway with another process waiting: it went on, and fetched no file twice"
    )


def _kill_one(folder: Path, trial: int) -> None:
    raw = folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / f".{next(iter(SHAPES))}.gz.1.00000000.tmp").write_bytes(b"left by one killed while it was writing")
    with _mirrors() as server:
        _write_plugin(folder, server, ("only",), real=False)
        (folder / "go").touch()
        place = ("only", list(server.files)[trial % 4])
        server.behaviour[place] = "stalls"
        first = _call(folder)
        assert server.stalled.wait(PATIENCE), "the first process asks for nothing"
        second = _call(folder)
        _wait_until_ready(folder, 2, lambda: second.poll() is None)
        time.sleep(random.Random(f"killed/{trial}").uniform(0.0, 0.3))
        server.behaviour.clear()
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=PATIENCE)
        out, err = second.communicate(timeout=PATIENCE)
        assert second.returncode == 0 and err == "" and out.strip().isdigit(), (out, err)
        assert server.asked.count(place) == 2 and len(server.asked) == 5, server.asked
        _whole_and_nothing_else(raw, server)


def nowhere(folder: Path, count: int) -> str:
    """The real command, and no mirror has what it needs."""
    for trial in range(count):
        here = folder / f"{trial}"
        here.mkdir()
        with _mirrors() as server:
            bad = random.Random(f"nowhere/{trial}")
            keys = [(mirror, name) for mirror in ("first", "second") for name in server.files]
            server.behaviour = {key: bad.choice(FAULTS) for key in keys}
            _write_plugin(here, server, ("first", "second"), real=True)
            (here / "go").touch()
            script = _train(here, trial)
            script.finish()
            refused(script, "cannot be downloaded", "dataset=digits")
            no_traceback(script)
            assert is_plain(script.err[0]), repr(script.err[0])
            left = [path.name for path in (here / "data").rglob("*") if path.is_file()]
            assert left in ([], ["download.lock"]) and not list(here.glob("run_*")), f"left behind: {left}"
    return f"{count} ddpm-train without a working mirror: one line each, nothing left"


CASES = (
    Case(
        name="download race",
        promise="Processes that start at once on an empty data folder download each file once, and all end well.",
        short=3,
        long=8,
        run=race,
    ),
    Case(
        name="faulty mirrors",
        promise="A file that breaks off, is wrong or absent is taken from the next mirror, or refused in one line.",
        short=20,
        long=100,
        run=faults,
    ),
    Case(
        name="downloader killed",
        promise="A process killed in the middle of a download leaves nothing that is trusted or stands in the way.",
        short=1,
        long=4,
        run=killed,
    ),
    Case(
        name="no mirror",
        promise="Without a mirror that works ddpm-train says so in one line and leaves nothing behind.",
        short=1,
        long=3,
        run=nowhere,
    ),
)
