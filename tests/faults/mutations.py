"""Data files that someone damaged, by accident or with intent: every reader refuses them in one line or reads them."""

import gzip
import importlib.util
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.numpy

from ddpm.data import mnist
from ddpm.data.dataset import check_dataset
from ddpm.data.folder import folder as image_folder
from ddpm.data.hoda import Crops, load_crops, pack, read_cdb
from ddpm.errors import UserError, is_plain
from ddpm.io.cache import Arrays, content_hash
from ddpm.io.pictures import read_image
from tests.data.hoda_files import cdb, digits, header, record
from tests.faults.cases import Case

HANG = 10  # seconds of the processor that a trial may take
WAIT = 200  # seconds by the clock, which other programs can stretch
MEMORY = 1 << 30  # bytes that the readers may ask for beyond what Python, torch and Pillow have at the start
SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_persian.py"
EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFF0,
    0xFFFFFFFF,
)

Read = Callable[[bytes, Path], None]  # writes the bytes where they belong, reads them, checks what comes out


@dataclass(frozen=True)
class Target:
    """Valid files of one form, and how they are read. `mend` repairs the checksums, so that more is reached.

    `change` makes a file of two valid ones; None: `mutate`.
    """

    valid: Sequence[bytes]
    read: Read
    mend: Callable[[bytes], bytes] = bytes
    change: Callable[[bytes, bytes, random.Random], bytes] | None = None


# Mutations


def mutate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """One to four changes; `other` is a second valid file, to take parts from."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choice(CHANGES)(changed, other, draw)
    return bytes(changed)


def _flip(data: bytearray, other: bytes, draw: random.Random) -> None:
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _set_byte(data: bytearray, other: bytes, draw: random.Random) -> None:
    if data:
        data[draw.randrange(len(data))] = draw.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, draw.randrange(256)))


def _set_word(data: bytearray, other: bytes, draw: random.Random) -> None:
    at = draw.randrange(max(1, len(data) - 3)) & draw.choice((~0, ~3))
    data[at : at + 4] = draw.choice(EXTREMES).to_bytes(4, draw.choice(("little", "big")))


def _cut(data: bytearray, other: bytes, draw: random.Random) -> None:
    del data[draw.randint(0, len(data)) :]


def _insert(data: bytearray, other: bytes, draw: random.Random) -> None:
    at = draw.randint(0, len(data))
    data[at:at] = draw.randbytes(draw.choice((1, 4, 8, 300)))


def _remove(data: bytearray, other: bytes, draw: random.Random) -> None:
    at = draw.randint(0, len(data))
    del data[at : at + draw.choice((1, 4, 8, 64))]


def _repeat(data: bytearray, other: bytes, draw: random.Random) -> None:
    start, end = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
    data[end:end] = data[start:end] * draw.choice((1, 1, 2, 50))


def _splice(data: bytearray, other: bytes, draw: random.Random) -> None:
    start, end = sorted((draw.randint(0, len(other)), draw.randint(0, len(other))))
    at = draw.randint(0, len(data))
    data[at : at + draw.choice((0, end - start, len(data)))] = other[start:end]


CHANGES = (_flip, _set_byte, _set_word, _set_word, _cut, _insert, _remove, _repeat, _splice)


# Trials: in a process of their own, whose memory is limited and which a clock kills


def try_all(make_targets: Callable[[], list[Target]], folder: Path, count: int, memory: int = MEMORY) -> str:
    context = multiprocessing.get_context("fork")  # Python, torch and Pillow need not be loaded again
    child = context.Process(target=_child, args=(make_targets, folder, count, memory))
    child.start()
    child.join()
    report = folder / "report.json"
    found = json.loads(report.read_text()) if report.exists() else {}
    last = f"the last input is {folder / 'input'}"
    assert child.exitcode != -signal.SIGPROF, f"a trial took more than {HANG} seconds; {last}"
    assert child.exitcode != -signal.SIGALRM, f"a trial waited for more than {WAIT} seconds; {last}"
    assert child.exitcode == 0 and "failure" not in found, f"{found.get('failure', child.exitcode)}; {last}"
    assert (printed := (folder / "printed").read_text()) == "", f"a reader printed: {printed[:500]}"
    assert found["refused"] > count / 4, f"only {found['refused']} of {count} were refused: too gentle"
    return (
        f"{count} mutated files: {found['refused']} refused in one line, {count - found['refused']} read; "
        f"slowest {found['slowest']:.2f} s, {found['memory'] >> 20} MiB of memory at most"
    )


def _child(make_targets: Callable[[], list[Target]], folder: Path, count: int, memory: int) -> None:
    printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # kills even where C code hangs
    warnings.simplefilter("error")
    try:
        targets = make_targets()
        result: dict[str, object] = {**_trials(targets, folder, count, memory)}
    except BaseException:
        result = {"failure": traceback.format_exc()}
    (folder / "report.json").write_text(json.dumps(result))
    os._exit(0)  # nothing of pytest is run to its end twice


def _trials(targets: list[Target], folder: Path, count: int, memory: int) -> dict[str, float]:
    for target in targets:
        for data in target.valid:
            target.read(data, folder)  # what is not mutated can be read
    size, before = _status("VmSize"), _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.RLIM_INFINITY))
    refused, slowest = 0, 0.0
    for trial in range(count):
        draw = random.Random(f"mutations/{trial}")
        target = targets[trial % len(targets)]
        data = (target.change or mutate)(draw.choice(target.valid), draw.choice(target.valid), draw)
        (folder / "input").write_bytes(data)
        signal.alarm(WAIT)
        signal.setitimer(signal.ITIMER_PROF, HANG)
        data = target.mend(data) if draw.random() < 0.5 else data
        started = time.perf_counter()
        try:
            target.read(data, folder)
        except UserError as error:
            refused += 1
            text = str(error)
            assert text and is_plain(text) and len(text) < 1_000, repr(text)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - started)
    return {"refused": refused, "slowest": slowest, "memory": max(0, _status("VmHWM") - before)}


def _status(key: str) -> int:
    """A figure of this process in bytes, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) << 10


# The Hoda set's own format, and the form that scripts/convert_persian.py writes


def hoda_targets() -> list[Target]:
    images, labels = digits(6)
    one_size = [np.eye(4, 5, k, dtype=np.uint8) * 255 for k in range(3)]
    files = [
        cdb(images, labels),
        cdb([np.full((200, 90), 255, np.uint8)], [3]),
        header([1] * 3, size=(4, 5)) + b"".join(record(image, 1, own_size=False) for image in one_size),
    ]
    dots = [np.full((1, 1), 255, np.uint8)] * 20  # a file in which labels and sizes are not rare
    stored = [
        _stored({"pixels": crops.pixels, "sizes": crops.sizes, "labels": crops.labels})
        for crops in (pack(images, labels), pack(dots, [1] * 20))
    ]
    return [
        Target(files, _read_official),
        Target(files, _read_official),
        Target(stored, _read_converted, mend=_hash_again),
    ]


def _read_official(data: bytes, folder: Path) -> None:
    (folder / "part.cdb").write_bytes(data)
    _check(read_cdb(folder / "part.cdb"))


def _read_converted(data: bytes, folder: Path) -> None:
    (folder / "part.safetensors").write_bytes(data)
    _check(load_crops(folder / "part.safetensors"))


def _check(crops: Crops) -> None:
    images = list(crops.images())
    assert len(images) == len(crops) >= 1 and crops.labels.max() <= 9
    assert sum(image.size for image in images) == len(crops.pixels)


def _stored(arrays: Arrays) -> bytes:
    """What `save_arrays` writes, with the right hash."""
    return safetensors.numpy.save(arrays, metadata={"sha256": content_hash(arrays)})


def _hash_again(data: bytes) -> bytes:
    try:
        return _stored(safetensors.numpy.load(data))
    except Exception:  # too broken to have a content: it is read as it is
        return data


# IDX


def idx_targets() -> list[Target]:
    mnist.SHAPES = {"images": (5, 4, 3), "labels": (5,)}  # in this process alone
    pixels = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    images, labels = idx(pixels), idx(np.arange(5, dtype=np.uint8))
    packed = [gzip.compress(images, mtime=0), gzip.compress(images, 0, mtime=0)]
    return [
        Target([images], partial(_read_idx, 0)),
        Target([labels], partial(_read_idx, 1)),
        Target(packed, _read_packed_idx),
        Target([images], lambda data, folder: _read_packed_idx(gzip.compress(data, 1), folder)),
    ]


def _read_idx(index: int, data: bytes, folder: Path) -> None:
    name, shape = list(mnist.SHAPES.items())[index]
    array = mnist.parse_idx(data, name, shape)
    assert array.shape == shape


def _read_packed_idx(data: bytes, folder: Path) -> None:
    shape = mnist.SHAPES["images"]
    assert mnist.parse_idx(mnist._unpack(data, folder / "images.gz", shape), "images", shape).shape == shape


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


# The converter's .mat


def mat_targets() -> list[Target]:
    from scipy.io import savemat

    images, labels = digits(6)
    cells = np.empty((len(images), 1), object)
    cells[:, 0] = images
    files = []
    for compressed, numbers in ((True, np.uint8), (False, np.uint8), (False, np.float64)):
        file = io.BytesIO()
        savemat(
            file, {"labels": np.array(labels, numbers)[:, None], "Data": cells}, do_compression=compressed
        )
        files.append(file.getvalue())
    read = partial(_read_mat, _converter())
    return [
        Target(files, read),
        Target(files[1:], read),
        Target(files[1:], lambda data, folder: read(_packed_variables(data), folder)),
    ]


def _read_mat(script: ModuleType, data: bytes, folder: Path) -> None:
    path = folder / "full.mat"
    path.write_bytes(data)
    _check(script.to_crops(*script.read_mat(path), path))


def _packed_variables(data: bytes) -> bytes:
    """The same .mat file with its two variables compressed, if they still begin where they say."""
    size = int.from_bytes(data[132:136], "little")
    parts = [data[128 : 136 + size], data[136 + size :]] if size < len(data) else [data[128:]]
    packed = [zlib.compress(part, 1) for part in parts]
    tags = [(15).to_bytes(4, "little") + len(part).to_bytes(4, "little") for part in packed]
    return data[:128] + b"".join(tag + part for tag, part in zip(tags, packed, strict=True))


def _converter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_persian", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


# Pictures


def picture_targets() -> list[Target]:
    pngs, others = _pictures()
    return [
        Target(pngs, _read_picture, mend=_mend_png),
        Target(pngs, partial(_read_digit, _converter()), mend=_mend_png),
        Target(pngs + others, _read_folder, mend=_mend_png),
        Target(others, _read_picture),
    ]


def _pictures() -> tuple[list[bytes], list[bytes]]:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (14, 19, 4), np.uint8)
    colour = Image.fromarray(pixels)
    grey = colour.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    frames = [grey.convert("P"), Image.new("P", grey.size, 3)]

    def save(image: Image.Image, form: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    pngs = [
        save(colour, "PNG", exif=exif),
        save(grey, "PNG"),
        save(grey.convert("1"), "PNG"),
        save(colour.convert("P"), "PNG", transparency=3),
    ]
    others = [
        save(colour.convert("RGB"), "JPEG", exif=exif, progressive=True),
        save(colour.convert("CMYK"), "JPEG"),
        save(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        save(colour.convert("RGB"), "BMP"),
        save(frames[0], "BMP"),
        save(colour, "WEBP", lossless=True, exif=exif),
        save(colour.convert("RGB"), "WEBP"),
    ]
    return pngs, others


def _read_picture(data: bytes, folder: Path) -> None:
    (folder / "picture.png").write_bytes(data)
    for nearest in (False, True):
        image = read_image(folder / "picture.png", 8, nearest)
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8


def _read_digit(script: ModuleType, data: bytes, folder: Path) -> None:
    (folder / "digits").mkdir(exist_ok=True)
    (folder / "digits" / "7.1.png").write_bytes(data)
    crops = script.to_crops(*script.read_folder(folder / "digits"), folder)
    _check(crops)
    assert crops.labels.tolist() == [7]


def _read_folder(data: bytes, folder: Path) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a.png", "b.jpg", "c.webp"):
        (folder / "images" / name).write_bytes(data)
    check_dataset(image_folder(folder, path=str(folder / "images"), image_size=8))


def _mend_png(data: bytes) -> bytes:
    """Right checksums, as far as the chunks can be followed."""
    mended, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        mended[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(mended)


def _case(form: str, make_targets: Callable[[], list[Target]]) -> Case:
    return Case(
        name=f"mutated {form}",
        promise=f"A damaged or malicious {form} file is refused in one line; no crash, no hang, little memory.",
        short=150,
        long=2_500,
        run=partial(try_all, make_targets),
    )


CASES = (
    _case(".cdb (and its converted form)", hoda_targets),
    _case("IDX (and .gz)", idx_targets),
    _case(".mat", mat_targets),
    _case("PNG (and JPEG, GIF, BMP, WEBP)", picture_targets),
)
