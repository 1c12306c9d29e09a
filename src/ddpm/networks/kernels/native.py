"""Compile this package's C code on the user's machine at its first use, and cache the library.

Where that is impossible (no gcc, no Linux, a PyTorch with another OpenMP), callers use PyTorch's own operations.
"""

import ctypes
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ddpm.errors import DataError
from ddpm.io.cache import cache_folder
from ddpm.io.folders import make_folder

if sys.platform != "win32":
    import fcntl
    import grp
    import pwd

OFF = "DDPM_NATIVE"  # environment variable; 0 switches compiled kernels off
# Exact arithmetic, apart from fused multiply-add. Without errno and floating-point traps gcc vectorizes the loops.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
TIMEOUT = 60  # seconds, for a compiler that hangs; it takes about one


class Unavailable(Exception):
    """The compiled code is not available; the text says why."""


def library(source: Path) -> tuple[ctypes.CDLL, str]:
    """Load the library of `source`, compiled if it is not cached, or not as it was written. Raises Unavailable.

    Returns the compiler and a hash of the code beside it: where they are equal, every bit of the results is.
    """
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
        name = f"{source.stem}-{_fingerprint(source, compiler)}"
        with _locked(own_folder("native")) as (folder, descriptor):
            path = next(filter(_whole, folder.glob(f"{name}-*.so")), None)
            if path is None:
                path = _compile(compiler, source, folder, name)
                os.fsync(descriptor)
        found = re.search(rb"GCC: \([ -~]{1,80}", path.read_bytes())
        made_by = found[0].decode() if found else "gcc"
        return _load(path), f"{made_by}, code {path.stem.rpartition('-')[2]}"
    except (OSError, ValueError, DataError) as error:
        raise Unavailable(str(error)) from None


@cache
def no_triton() -> str:
    """Return why Triton's kernels are not taken on a GPU, or an empty text."""
    if os.environ.get(OFF) == "0":
        return f"{OFF}=0"
    return "" if find_spec("triton") else "triton is not installed"


def _whole(path: Path) -> bool:
    """Return whether a library has the hash in its name. Loading a half-written one would end the process by SIGBUS."""
    _check_own(path)
    return path.stem.endswith(f"-{_hash(path.read_bytes())}")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


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


@contextmanager
def _locked(folder: Path) -> Iterator[tuple[Path, int]]:
    """Hold a shared lock on the folder while compiling. With no other holder, first remove leftovers of killed ones."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # somebody compiles, or there are no locks here
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob("tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield folder, descriptor
    finally:
        os.close(descriptor)


def own_folder(name: str) -> Path:
    """Create a folder for compiled code in the cache. Raises OSError, and Unavailable if others could write to it."""
    folder = cache_folder() / name
    make_folder(folder.parent, mode=0o755)
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_own(folder)
    for above in folder.resolve().parents:
        found = above.stat()
        if found.st_uid not in (0, os.geteuid()) or (
            _open_to_others(found) and not found.st_mode & stat.S_ISVTX
        ):
            raise Unavailable(f"{above} is not yours alone, so that {folder} could be exchanged")
    return folder


def _check_own(path: Path) -> None:
    """Raise Unavailable unless only this user can write to the path, as ssh checks its keys."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid() or _open_to_others(found):
        raise Unavailable(f"{path} must belong to you and be writable by nobody else")


def _open_to_others(found: os.stat_result) -> bool:
    """Return whether others may write: all, or the group, unless that is a user's own, for which umask 002 is made."""
    if not found.st_mode & stat.S_IWGRP:
        return bool(found.st_mode & stat.S_IWOTH)
    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(found.st_gid)
    except KeyError:
        return True
    members = {*group.gr_mem, *(each.pw_name for each in pwd.getpwall() if each.pw_gid == found.st_gid)}
    return bool(found.st_mode & stat.S_IWOTH) or group.gr_name != user or not members <= {user}


def _fingerprint(source: Path, compiler: str) -> str:
    """Hash what the library depends on: source, flags, compiler and processor."""
    file = os.stat(compiler)
    with open("/proc/cpuinfo") as lines:
        processor = sorted(
            {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
        )
    parts = [*FLAGS, compiler, str(file.st_size), str(file.st_mtime_ns), *processor]
    return hashlib.sha256(source.read_bytes() + "\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, folder: Path, name: str) -> Path:
    """Compile in a temporary folder and rename, so that a file with the final name is complete. Returns its path."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / f"{name}.so"
        line = [compiler, *FLAGS, "-o", str(made), str(source), "-lm"]
        try:
            done = subprocess.run(
                line,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": temporary},
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{compiler} took longer than {TIMEOUT} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise Unavailable(f"{compiler} failed: {said[0] if said else done.returncode}")
        made.chmod(0o700)
        with open(made, "rb") as file:
            path = folder / f"{name}-{_hash(file.read())}.so"
            os.fsync(file.fileno())
        os.replace(made, path)
        return path
