"""Whether a training is compiled: the decision, and what becomes of it where compiling works, fails or must not be.

No GPU and no compiler here: both are fakes, the passes through the network are real.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddpm.config.schema import to_dict
from ddpm.errors import UserError
from ddpm.runtime.world import World
from ddpm.train import compile as compiling
from ddpm.train import loop
from ddpm.train.compile import COMPILE_SECONDS, SAVED, begin, decide
from ddpm.train.state import TrainState, prepare
from tests.train.test_training import CPU, config, tiny_data

CUDA = torch.device("cuda")
ENOUGH = round(2 * COMPILE_SECONDS / SAVED)  # steps of a second that are worth it twice over


def test_the_users_word_counts_unless_nothing_is_left_to_do() -> None:
    for device in ("cpu", "cuda"):
        assert decide("true", device, 1, obstacle="anything") == (True, "")
        assert decide("false", device, ENOUGH, 1.0) == (False, "")
        assert decide("true", device, 0) == (False, "")


def test_auto_compiles_where_the_rest_is_long_enough() -> None:
    assert decide("auto", "cpu", 10**9, 1.0) == (False, "not compiled, which does not pay on a CPU")
    assert decide("auto", "cuda", ENOUGH, 1.0, "no triton") == (False, "not compiled: no triton")
    just = COMPILE_SECONDS / SAVED
    for steps, seconds, expected in [
        (int(just) + 1, 1.0, True),
        (int(just) - 1, 1.0, False),
        (0, 1.0, False),
    ]:
        assert decide("auto", "cuda", steps, seconds)[0] is expected
    assert decide("auto", "cuda", 1000, 0.010)[1] == (
        "1,000 steps with passes of 10.0 ms would be about 3 s shorter, and compiling takes about 60 s"
    )


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
    """Passes run on the CPU, for a second each by the clock; triton is there."""
    now = [0.0]

    def on_cpu(run: TrainState, n: int) -> None:
        device, run.device = run.device, CPU
        try:
            loop.trial(run, n)
        finally:
            run.device = device
        now[0] += 1.0

    monkeypatch.setattr(compiling, "trial", on_cpu)
    monkeypatch.setattr(compiling, "_wait", lambda device: None)
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)
    monkeypatch.setattr("ddpm.train.compile.time.perf_counter", lambda: now[0])


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


def test_auto_on_a_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compiler := Compiler())
    note = begin(prepare(config("trainer.max_steps=1000000"), tiny_data(), CPU))
    assert note == "trainer.compile=auto: not compiled, which does not pay on a CPU" and not compiler.modes
    assert begin(prepare(config("trainer.compile=false"), tiny_data(), CPU)) == "" and not compiler.modes


def test_auto_counts_the_steps_that_are_left(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compiler := Compiler())
    run = on_gpu(f"trainer.max_steps={ENOUGH}")
    run.step = ENOUGH - 5
    assert "5 steps with passes of 1000.0 ms would be about 2 s shorter" in begin(run) and not compiler.modes
    run.step = 0
    assert begin(run).endswith("; compiled in 2 s") and compiler.modes == ["reduce-overhead"]


@pytest.mark.parametrize(
    ("override", "triton", "reason"),
    [
        ("trainer.deterministic=false", False, "triton is not installed"),
        ("trainer.deterministic=true", True, "no bit may depend on how long a step takes"),
    ],
)
def test_auto_heeds_what_speaks_against_it(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch, override: str, triton: bool, reason: str
) -> None:
    monkeypatch.setattr(torch, "compile", compiler := Compiler())
    monkeypatch.setattr(compiling, "find_spec", lambda name: name if triton else None)
    assert reason in begin(on_gpu(override, f"trainer.max_steps={ENOUGH}")) and not compiler.modes


def test_graphs_are_for_passes_that_make_a_steps_gradients_at_once(fake_gpu: None) -> None:
    one, parts, several = on_gpu(), on_gpu("trainer.accumulate=2"), on_gpu()
    several.world = World(0, 2)
    assert [compiling._mode(run) for run in (one, parts, several)] == ["reduce-overhead", None, None]
    one.device = CPU
    assert compiling._mode(one) is None


@pytest.mark.parametrize("setting", ["true", "auto"])
def test_a_compiler_that_fails(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """Asked for: one line. By itself: a note, and the training goes on without."""
    monkeypatch.setattr(torch, "compile", Compiler(RuntimeError("No working C++ compiler\n\nand much more")))
    run = on_gpu(f"trainer.compile={setting}", f"trainer.max_steps={ENOUGH}")
    said = "torch.compile does not work here: No working C++ compiler"
    if setting == "true":
        with pytest.raises(UserError) as caught:
            begin(run)
        assert str(caught.value) == f"trainer.compile=true: {said}; trainer.compile=false goes without"
    else:
        assert begin(run).endswith(said)
        compiling._pass(run)


def test_memory_that_ends_while_compiling(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for: the training ends, and says what would fit. By itself: it goes on uncompiled, where it may fit."""
    monkeypatch.setattr(torch, "compile", Compiler(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        begin(on_gpu("trainer.compile=true"))
    run = on_gpu("trainer.compile=auto", f"trainer.max_steps={ENOUGH}")
    assert begin(run).endswith("torch.compile does not work here: CUDA out of memory")
    compiling._pass(run)


def test_a_pass_is_of_one_process_s_part() -> None:
    run = prepare(config("trainer.batch_size=13", "trainer.accumulate=2"), tiny_data(), CPU)
    sizes = []
    run.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    compiling._pass(run)
    run.world = World(1, 2)
    compiling._pass(run)
    assert sizes == [7, 3]
