"""Our GroupNorm for CPUs against float64, and when it is not taken."""

import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.io.cache import save_arrays
from ddpm.networks.kernels import group_norm, native
from ddpm.networks.kernels.group_norm import normed

SOURCE = Path(group_norm.__file__).with_suffix(".c")
compiled = pytest.mark.skipif(bool(group_norm.missing()), reason=group_norm.missing())
SHAPES = [(2, 8, 28, 28, 2), (3, 12, 5, 7, 4), (1, 6, 1, 1, 3), (5, 96, 7, 7, 8), (2, 4, 33, 1, 1)]


def reference(x: Tensor, extra: Tensor | None, norm: nn.GroupNorm, silu: bool) -> Tensor:
    """In float64, from the definition."""
    x = x.double() if extra is None else x.double() + extra.double()[:, :, None, None]
    parts = x.reshape(len(x), norm.num_groups, -1)
    mean, variance = parts.mean(2, keepdim=True), parts.var(2, correction=0, keepdim=True)
    h = ((parts - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    h = h * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    return F.silu(h) if silu else h


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, nn.GroupNorm]:
    n, c, h, w, groups = shape
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, c)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(n, c, h, w) * 3 + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    extra = torch.randn(n, c).to(dtype)
    return x.requires_grad_(), extra.requires_grad_(), torch.randn(n, c, h, w).to(dtype), norm


def gradients(y: Tensor, dy: Tensor, *of: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(y, of, dy.to(y.dtype))]


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-30))


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_values_and_gradients_are_those_of_the_definition(
    shape: tuple[int, ...], silu: bool, dtype: torch.dtype, close: float
) -> None:
    x, extra, dy, norm = inputs(shape, dtype)
    leaves = (x, extra, norm.weight, norm.bias)
    y, wanted = normed(norm, x, extra, silu=silu), reference(x, extra, norm, silu)
    assert type(y.grad_fn).__name__ == "_GroupNormBackward"
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert far(y.double(), wanted) < close
    exact = gradients(wanted, dy, *leaves)
    scale = max(float(g.abs().max()) for g in exact)
    for ours, theirs in zip(gradients(y, dy, *leaves), exact, strict=True):
        assert float((ours - theirs).abs().max()) < close * scale


@compiled
def test_without_a_bias_of_each_image() -> None:
    x, _, dy, norm = inputs(SHAPES[0], torch.float32)
    y, wanted = normed(norm, x), reference(x, None, norm, True)
    assert far(y.double(), wanted) < 2e-6
    assert far(*(gradients(out, dy, x)[0] for out in (y, wanted))) < 2e-6


@compiled
def test_a_large_mean_costs_no_digits() -> None:
    """Closer to float64 than PyTorch's own, whose scale and shift cancel as ours do, but not its variance."""
    x, _, _, norm = inputs(SHAPES[0], torch.float32, offset=1000.0)
    wanted = reference(x, None, norm, False)
    own, theirs = normed(norm, x, silu=False), norm(x)
    assert far(own.double(), wanted) < 2 * max(far(theirs.double(), wanted), 1e-5)


@compiled
def test_what_is_not_finite_stays_so_and_what_is_huge_does_not_become_it() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, extra, dy, norm = inputs(SHAPES[1], dtype)
        broken = x.detach().clone(memory_format=torch.preserve_format)
        broken[1, 3, 2, 2] = torch.nan
        y = normed(norm, broken.requires_grad_(), extra)
        own_group = slice(3, 6)
        assert y[1, own_group].isnan().all() and y[0].isfinite().all() and y[1, 6:].isfinite().all()
        assert gradients(y, dy, broken)[0][1, own_group].isnan().all()
        with torch.no_grad():
            norm.weight.fill_(1e30)
        for h in (
            normed(norm, x, extra),
            reference(x, extra, norm, True),
        ):  # far left SiLU is 0, far right x itself
            assert not h.isnan().any() and h.max() > 1e29 and h.min() > -1e-3


@compiled
def test_the_number_of_threads_changes_no_bit() -> None:
    x, extra, dy, norm = inputs((7, 32, 14, 14, 8), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = normed(norm, x, extra)
            found.append([y, *torch.autograd.grad(y, (x, extra, norm.weight, norm.bias), dy)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@compiled
def test_elsewhere_pytorch_gives_the_same() -> None:
    x, extra, _, norm = inputs(SHAPES[0], torch.float32)
    own = normed(norm, x, extra)
    plain = normed(norm, x.contiguous(), extra)  # another memory layout
    assert type(plain.grad_fn).__name__ == "SiluBackward0"
    assert far(own, plain) < 1e-5
    double = normed(norm.double(), x.double(), extra.double())
    assert double.dtype == torch.float64 and far(own.double(), double) < 1e-5


@compiled
def test_what_c_could_not_be_trusted_with_goes_to_pytorch() -> None:
    """One bias for all images is broadcast, as ever; what does not fit is PyTorch's error and no address of ours."""
    x, extra, _, norm = inputs(SHAPES[0], torch.float32)
    one = extra[:1]
    assert far(normed(norm, x, one), normed(norm, x, one.expand(len(x), -1).contiguous())) < 1e-5
    with pytest.raises(RuntimeError):
        normed(nn.GroupNorm(2, 6), x)
    with pytest.raises(RuntimeError):
        normed(norm, x, extra[:, :3])
    plain = nn.GroupNorm(2, 8)
    plain.bias = None  # type: ignore[assignment]
    assert type(normed(plain, x).grad_fn).__name__ == "SiluBackward0"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "native"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Something that is compiled faster."""
    (tmp_path / "small.c").write_text("int one(void) { return 1; }\n")
    return tmp_path / "small.c"


@compiled
def test_compiled_once_into_a_folder_that_only_its_owner_can_write(cache: Path, small: Path) -> None:
    native.library(small)
    (made,) = cache.iterdir()
    first = made.stat().st_mtime_ns
    assert stat.S_IMODE(cache.stat().st_mode) & 0o077 == 0
    native.library(small)
    assert made.stat().st_mtime_ns == first and list(cache.iterdir()) == [made]


@compiled
def test_code_that_somebody_else_could_have_written_is_not_loaded(cache: Path, small: Path) -> None:
    native.library(small)
    (made,) = cache.iterdir()
    made.chmod(0o722)
    with pytest.raises(native.Unavailable, match="writable by nobody else"):
        native.library(small)
    made.chmod(0o700)
    cache.chmod(0o777)
    with pytest.raises(native.Unavailable, match="writable by nobody else"):
        native.library(small)
    cache.chmod(0o700)
    cache.parent.chmod(0o777)
    with pytest.raises(native.Unavailable, match="could be exchanged"):
        native.library(small)
    cache.parent.chmod(0o1777)  # where, as in /tmp, others cannot rename what is yours
    native.library(small)
    made.rename(cache / "other.so")
    made.symlink_to("other.so")
    with pytest.raises(native.Unavailable, match="writable by nobody else"):
        native.library(small)


@compiled
@pytest.mark.parametrize("damage", ["half", "empty", "a page of zeros", "a bit"])
def test_code_that_a_power_cut_left_half_written_is_compiled_anew(
    cache: Path, small: Path, damage: str
) -> None:
    """Loading it would end the process, so that no later command could mend it."""
    native.library(small)
    (made,) = cache.iterdir()
    whole = made.read_bytes()
    broken = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "a page of zeros": whole[:-4096] + bytes(4096),
        "a bit": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    }[damage]
    (cache / "new").write_bytes(broken)  # another file: the old one is loaded in this process
    (cache / "new").chmod(0o700)
    (cache / "new").replace(made)
    native.library(small)
    assert list(cache.iterdir()) == [made] and made.read_bytes() == whole


@compiled
def test_what_is_compiled_is_on_the_disk_before_it_gets_its_name(
    cache: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), flush(file))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b))[1])
    native.library(small)
    assert done == ["fsync", "rename", "fsync"]


@compiled
def test_what_a_killed_compiler_left_is_removed_and_what_a_running_one_needs_is_not(
    cache: Path, small: Path, tmp_path: Path
) -> None:
    fake = tmp_path / "bin" / "gcc"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\ntouch "$TMPDIR/part.s"; exec sleep 60\n')
    fake.chmod(0o700)
    code = f"from ddpm.networks.kernels import native\nimport pathlib\nnative.library(pathlib.Path({str(small)!r}))"
    path = f"{fake.parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [sys.executable, "-c", f"import torch\n{code}"], env={**os.environ, "PATH": path}
    ) as slow:
        while not (found := list(cache.glob("tmp*/part.s"))):
            assert slow.poll() is None
            time.sleep(0.02)
        children = Path(f"/proc/{slow.pid}/task/{slow.pid}/children").read_text().split()
        native.library(small)
        assert found[0].exists()
        slow.kill()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    native.library(small)
    (made,) = cache.iterdir()
    assert made.suffix == ".so"


@compiled
def test_with_a_umask_that_lets_the_group_write(
    cache: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders made here are closed to the group; others may be open to a user's own group, and to no other."""
    before = os.umask(0o002)
    try:
        save_arrays(cache.parent / "a.safetensors", {"a": np.zeros(1)})
        native.library(small)
        (made,) = cache.iterdir()
        assert not (stat.S_IMODE(cache.parent.stat().st_mode) | made.stat().st_mode) & 0o022
    finally:
        os.umask(before)
    cache.parent.chmod(0o775)
    me = pwd.getpwuid(os.geteuid())
    own = SimpleNamespace(gr_name=me.pw_name, gr_mem=[me.pw_name])
    shared = SimpleNamespace(gr_name=me.pw_name, gr_mem=["someone"])
    users = SimpleNamespace(gr_name="users", gr_mem=[])
    monkeypatch.setattr(native.pwd, "getpwall", lambda: [me])
    for group, works in ((own, True), (shared, False), (users, False)):
        monkeypatch.setattr(native.grp, "getgrgid", lambda number, group=group: group)
        with nullcontext() if works else pytest.raises(native.Unavailable, match="could be exchanged"):
            native.library(small)
    other = SimpleNamespace(pw_name="someone", pw_gid=cache.parent.stat().st_gid)
    monkeypatch.setattr(native.grp, "getgrgid", lambda number: own)
    monkeypatch.setattr(native.pwd, "getpwall", lambda: [me, other])
    with pytest.raises(native.Unavailable, match="could be exchanged"):
        native.library(small)


@compiled
def test_the_same_code_has_the_same_name_and_another_compiler_another(
    cache: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, first), (_, again) = native.library(small), native.library(small)
    assert first == again and re.fullmatch(r"GCC: .*, code [0-9a-f]{16}", first)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS[1:], "-O1"))
    assert native.library(small)[1] != first and len(list(cache.iterdir())) == 2


@compiled
def test_what_cannot_be_compiled_or_loaded_is_a_reason_and_no_crash(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("int f( {")
    with pytest.raises(native.Unavailable, match=r"gcc failed: .*broken\.c"):
        native.library(broken)
    assert list(cache.iterdir()) == []
    fake = tmp_path / "bin" / "gcc"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho no library > "$9"\n')
    fake.chmod(0o700)
    monkeypatch.setenv("PATH", str(fake.parent))
    with pytest.raises(native.Unavailable, match=r"too short|invalid"):
        native.library(SOURCE)
    assert list(cache.iterdir()) == []  # the next start compiles it anew
    monkeypatch.setenv("PATH", "")
    with pytest.raises(native.Unavailable, match="no gcc"):
        native.library(SOURCE)
    monkeypatch.setenv("DDPM_NATIVE", "0")
    with pytest.raises(native.Unavailable, match="DDPM_NATIVE=0"):
        native.library(SOURCE)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to have something to switch off")
@pytest.mark.slow
def test_a_training_without_it_says_so_and_comes_to_the_same_loss(tmp_path: Path) -> None:
    line = [
        str(Path(sys.executable).with_name("ddpm-train")),
        *("trainer.max_steps=3", "trainer.batch_size=8", "model=unet_tiny"),
    ]
    said, losses = [], []
    for name, switch in (("own", "1"), ("torch", "0")):
        ran = subprocess.run(
            [*line, f"run_dir={tmp_path / name}"],
            env={**os.environ, "DDPM_NATIVE": switch},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        said.append(ran.stdout)
        record = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]
        losses.append(float(record.split('"loss": ')[1].split(",")[0]))
    assert "DDPM_NATIVE=0" not in said[0] and "DDPM_NATIVE=0" in said[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_triton_kernels_are_right() -> None:
    """By Triton's interpreter, which has to be chosen before the module is imported: in a process of its own."""
    pytest.importorskip("triton")
    line = [sys.executable, "-m", "tests.networks.triton_worker"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        line, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\n") == 16
