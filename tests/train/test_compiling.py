"""trainer.compile: what becomes of a training where compiling works, fails or must not be.

No GPU and no compiler here: both are fakes, the passes through the network are real.
"""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.config.schema import to_dict
from ddpm.errors import UserError
from ddpm.runtime.world import World
from ddpm.train import compile as compiling
from ddpm.train import loop
from ddpm.train.compile import begin
from ddpm.train.state import TrainState, prepare
from tests.train.test_training import CPU, config, tiny_data

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "inductor"))


def test_a_stored_config_of_before_there_was_auto() -> None:
    from ddpm.config.schema import TrainConfig, check

    for value, word in ((False, "false"), (True, "true"), ("auto", "auto")):
        raw = to_dict(config())
        assert raw["trainer"]["compile"] == "auto"
        raw["trainer"] = {**raw["trainer"], "compile": value}
        assert check(TrainConfig, raw).trainer.compile == word
    for wrong in (None, 1, 0, "True", "yes"):
        raw["trainer"]["compile"] = wrong
        with pytest.raises(UserError, match=r"trainer.compile=.*: must be one of auto, true, false"):
            check(TrainConfig, raw)


class Compiler:
    """In place of torch.compile: notes how it was asked, and gives what it is given, or what fails when called."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.modes, self.calls = error, list[str | None](), 0

    def __call__(self, call: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
        self.modes.append(mode)

        def compiled(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.error is not None:
                raise self.error
            return call(*args, **kwargs)

        return compiled


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes run on the CPU."""

    def on_cpu(run: TrainState, n: int) -> None:
        device, run.device = run.device, CPU
        try:
            loop.trial(run, n)
        finally:
            run.device = device

    monkeypatch.setattr(compiling, "trial", on_cpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def on_gpu(*overrides: str) -> TrainState:
    run = prepare(config(*overrides), tiny_data(), CPU)
    run.device = CUDA
    return run


def test_true_compiles_by_passes_that_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, run = (prepare(config("model.conditional=true"), tiny_data(), CPU) for _ in range(2))
    monkeypatch.setattr(torch, "compile", compiler := Compiler())
    run.config = config("trainer.compile=true")
    assert begin(run).startswith("trainer.compile=true: compiled in ")
    assert (compiler.modes, compiler.calls) == ([None], 2)
    assert not run.optimizer.state and all(p.grad is None for p in run.network.parameters())
    assert all(
        torch.equal(p, q) for p, q in zip(run.network.parameters(), plain.network.parameters(), strict=True)
    )


def test_auto_and_false_compile_nothing(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compiler := Compiler())
    for setting in ("auto", "false"):
        setting = f"trainer.compile={setting}"
        run = prepare(config("trainer.max_steps=1000000", setting), tiny_data(), CPU)
        assert begin(run) == begin(on_gpu("trainer.max_steps=1000000", setting)) == ""
    assert not compiler.modes


def test_nothing_is_compiled_where_no_step_is_left(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compiler := Compiler())
    run = on_gpu("trainer.compile=true")
    run.step = run.max_steps
    assert begin(run) == "" and not compiler.modes
    run.step = 0
    assert begin(run).startswith("trainer.compile=true: compiled in ")
    assert compiler.modes == ["reduce-overhead"]


def test_graphs_are_for_passes_that_make_a_steps_gradients_at_once(fake_gpu: None) -> None:
    one, parts, several = on_gpu(), on_gpu("trainer.accumulate=2"), on_gpu()
    several.world = World(0, 2)
    assert [compiling._mode(run) for run in (one, parts, several)] == ["reduce-overhead", None, None]
    one.device = CPU
    assert compiling._mode(one) is None


def test_a_compiler_that_fails(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the network is left as it was."""
    monkeypatch.setattr(torch, "compile", Compiler(RuntimeError("No working C++ compiler\n\nand much more")))
    run = on_gpu("trainer.compile=true")
    said = "torch.compile does not work here: No working C++ compiler"
    with pytest.raises(UserError) as caught:
        begin(run)
    assert str(caught.value) == f"trainer.compile=true: {said}; trainer.compile=false goes without"
    compiling._pass(run)


def test_memory_that_ends_while_compiling(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training ends, and says what would fit, with the network as it was."""
    monkeypatch.setattr(torch, "compile", Compiler(torch.OutOfMemoryError("CUDA out of memory")))
    run = on_gpu("trainer.compile=true")
    with pytest.raises(torch.OutOfMemoryError):
        begin(run)
    compiling._pass(run)


def test_a_pass_is_of_one_process_s_part() -> None:
    run = prepare(config("trainer.batch_size=13", "trainer.accumulate=2"), tiny_data(), CPU)
    sizes = []
    run.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    compiling._pass(run)
    run.world = World(1, 2)
    compiling._pass(run)
    assert sizes == [7, 3]


def test_compiled_code_is_kept_where_nobody_else_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would take /tmp/torchinductor_<user>, which another user may have made."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    assert compiling._cache() == str(tmp_path / "cache" / "inductor")
    assert stat.S_IMODE((tmp_path / "cache" / "inductor").stat().st_mode) == 0o700
    (tmp_path / "cache").chmod(0o777)
    other = Path(compiling._cache())
    assert tmp_path not in other.parents and stat.S_IMODE(other.stat().st_mode) == 0o700
    other.rmdir()
