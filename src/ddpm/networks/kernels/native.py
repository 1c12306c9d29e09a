"""Compile this package's C code on the user's machine at its first use, and cache the library.

Where that is impossible (no gcc, no Linux, a PyTorch with another OpenMP), callers use PyTorch's own operations.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from ddpm.errors import DataError
from ddpm.io.cache import cache_folder

OFF = "DDPM_NATIVE"  # environment variable; 0 switches compiled kernels off
# Exact arithmetic, apart from fused multiply-add. Without errno and floating-point traps gcc vectorizes the loops.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
TIMEOUT = 60  # seconds, for a compiler that hangs; it takes about one


class Unavailable(Exception):
    """The compiled code is not available; the text says why."""


def library(source: Path) -> ctypes.CDLL:
    """Load the library of `source`, compiled if it is not cached. Raises Unavailable."""
    if os.environ.get(OFF) == "0":
        raise Unavailable(f"{OFF}=0")
    if not sys.platform.startswith("linux"):
        raise Unavailable("only made for Linux")
    compiler = shutil.which("gcc")
    if compiler is None:
        raise Unavailable("there is no gcc")
    try:
        if not _gnu_threads():
            raise Unavailable(
                "this PyTorch does not use GNU OpenMP, and two kinds of threads hinder each other"
            )
        path = _folder() / f"{source.stem}-{_fingerprint(source, compiler)}.so"
        if not path.exists():
            _compile(compiler, source, path)
        _check_own(path)
        return _load(path)
    except (OSError, ValueError, DataError) as error:
        raise Unavailable(str(error)) from None


def _load(path: Path) -> ctypes.CDLL:
    """Load a library. Delete one that cannot be loaded, so that the next process compiles it anew."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _gnu_threads() -> bool:
    """Return whether PyTorch has loaded GNU OpenMP, whose threads code compiled with gcc then shares."""
    with open("/proc/self/maps", errors="replace") as maps:
        names = {line.rsplit("/", 1)[-1] for line in maps if "omp" in line}
    return any(name.startswith("libgomp.so.1") for name in names) and not any(
        name.startswith(("libomp", "libiomp")) for name in names
    )


def _folder() -> Path:
    """Create the cache folder for compiled code. Raises Unavailable if other users could write to it."""
    folder = cache_folder() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(folder)
    for above in folder.resolve().parents:
        found = above.stat()
        open_to_others = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
        if found.st_uid not in (0, os.geteuid()) or open_to_others:
            raise Unavailable(f"{above} is not yours alone, so that {folder} could be exchanged")
    return folder


def _check_own(path: Path) -> None:
    """Raise Unavailable unless only this user can write to the path, as ssh checks its keys."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise Unavailable(f"{path} must belong to you and be writable by nobody else")


def _fingerprint(source: Path, compiler: str) -> str:
    """Hash what the library depends on: source, flags, compiler and processor."""
    file = os.stat(compiler)
    with open("/proc/cpuinfo") as lines:
        processor = sorted(
            {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
        )
    parts = [*FLAGS, compiler, str(file.st_size), str(file.st_mtime_ns), *processor]
    return hashlib.sha256(source.read_bytes() + "\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, path: Path) -> None:
    """Compile in a temporary folder and rename, so that a file with the final name is complete."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        line = [compiler, *FLAGS, "-o", str(made), str(source), "-lm"]
        try:
            done = subprocess.run(
                line,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{compiler} took longer than {TIMEOUT} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise Unavailable(f"{compiler} failed: {said[0] if said else done.returncode}")
        made.chmod(0o700)
        os.replace(made, path)
