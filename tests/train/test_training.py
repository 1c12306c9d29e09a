"""The loop: what an update does, that it is exact and repeatable, and that no bad number gets into the weights."""

import copy
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpm.checkpoint import file as checkpoint
from ddpm.checkpoint import locate
from ddpm.config import hydra
from ddpm.config.schema import TrainConfig, check
from ddpm.data.batches import Batches
from ddpm.data.dataset import Dataset, Split
from ddpm.data.info import DatasetInfo
from ddpm.diffusion import schedules
from ddpm.errors import CheckpointError, UserError
from ddpm.runtime import device
from ddpm.train import loop, metrics_file, plots
from ddpm.train.checkpointing import restore
from ddpm.train.loop import fit
from ddpm.train.state import TrainState, prepare
from ddpm.train.step import _draw, learning_rate, losses, train_step

CPU = torch.device("cpu")
FACTS = DatasetInfo("tiny", 1, 8, 3, ("a", "b", "c"), 256)


def tiny_data(n: int = 50) -> Dataset:
    images = torch.randint(
        0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    split = Split(images, torch.arange(n) % 3)
    return Dataset(
        FACTS, split, Split(images[:10], split.labels[:10] if split.labels is not None else None), split
    )


def config(*overrides: str) -> TrainConfig:
    return check(TrainConfig, copy.deepcopy(composed(*overrides)))  # type: ignore[no-any-return]


@functools.cache
def composed(*overrides: str) -> dict[str, Any]:
    """Compose a small run, which takes a tenth of a second, once for each set of overrides."""
    small = [
        "model.channels=[8,16]",
        "model.head_dim=8",
        "trainer.batch_size=12",
        "trainer.max_steps=6",
        "trainer.log_every=1",
        "trainer.validate_every=3",
        "trainer.sample_every=0",
        "trainer.checkpoint_every=3",
        "optimizer.warmup_steps=2",
    ]
    return hydra.compose("train", [*small, *overrides])


def weights(run: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in [*run.network.parameters(), *run.ema.parameters()]])


def train(folder: Path, *overrides: str, data: Dataset | None = None) -> TrainState:
    data = data or tiny_data()
    run = prepare(config(*overrides), data, CPU)
    list(fit(run, data, folder))
    return run


@pytest.fixture(autouse=True)
def quick_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm.train.validation.EVALUATIONS", 34)
    monkeypatch.setattr("ddpm.train.loop.PREVIEWS", 2)


def test_one_step_equals_the_textbook(tmp_path: Path) -> None:
    """Against plain torch: AdamW, gradient clipping and EMA written out."""
    data, cfg = tiny_data(), config("trainer.channels_last=false", "optimizer.weight_decay=0.1")
    run = prepare(cfg, data, CPU)
    with torch.no_grad():  # the last layer starts at zero, which would hide most gradients
        for p in run.network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    run.ema.load_state_dict(run.network.state_dict())
    other = copy.deepcopy(run.network)
    batches = Batches(data.train, 12, cfg.seed, CPU)
    ema = [p.detach().clone() for p in other.parameters()]
    optimizer = torch.optim.AdamW(other.parameters(), betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(3):
        x_0, y = batches.batch(step)
        t, weight, eps, labels = _draw(run, x_0, y, torch.arange(12), run.step)
        assert labels is None and (weight == 1).all()
        alpha, sigma = (
            table.float()[t].view(-1, 1, 1, 1) for table in (run.schedule.alpha, run.schedule.sigma)
        )
        loss = (other(alpha * x_0 + sigma * eps, t) - eps).square().mean()
        optimizer.param_groups[0]["lr"] = (
            1e-3 * min(1, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * step / 6))
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        ema = [decay * e + (1 - decay) * p.detach() for e, p in zip(ema, other.parameters(), strict=True)]
        ours_loss, ours_norm = train_step(run, x_0, y)
        run.step += 1
        assert torch.allclose(ours_loss, loss, rtol=1e-5) and torch.allclose(ours_norm, norm, rtol=1e-4)
    theirs = torch.cat([p.detach().flatten() for p in [*other.parameters(), *ema]])
    # All but the few whose true gradient is 0 (a key's bias under softmax): there Adam makes whole steps of rounding.
    assert ((weights(run) - theirs).abs() > 2e-6).double().mean() < 2e-2


def test_same_seed_same_bits_other_seed_other_bits(tmp_path: Path) -> None:
    a, b, c = (train(tmp_path / name, f"seed={seed}") for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))


def test_previews_and_logging_change_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path / "a")
    busy = train(
        tmp_path / "b",
        "trainer.sample_every=1",
        "trainer.validate_every=1",
        "trainer.log_every=2",
        "trainer.checkpoint_every=1",
    )
    assert torch.equal(weights(plain), weights(busy))
    assert len(list((tmp_path / "b" / "samples").glob("*.png"))) == 6


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["objective.timesteps=loss_aware", "schedule.num_timesteps=20", "model.conditional=true"],
        ["trainer.accumulate=3"],
        ["model.dropout=0.3", "optimizer=muon", "model.channels=[8,32]"],
        ["trainer.precision=fp16"],
        ["trainer.log_every=4", "trainer.validate_every=0", "trainer.keep=1"],  # in the middle of a mean
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "killed", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_resumed_run_ends_with_the_same_bits(tmp_path: Path, overrides: list[str], killed: int) -> None:
    data = tiny_data()
    whole = train(tmp_path / "whole", *overrides)
    half = prepare(config(*overrides), data, CPU)
    for progress in fit(half, data, tmp_path / "half"):
        if progress.step == 1:
            loop.keep(half, tmp_path / "half", {})  # as on a signal
        if progress.step == killed:
            break
    resumed = prepare(config(*overrides, "seed=0"), data, CPU)
    source = locate.find(str(tmp_path / "half"))[0]
    restore(resumed, source)
    assert resumed.step == (1 if killed < 3 else 3)
    list(fit(resumed, data, tmp_path / "half"))
    assert torch.equal(weights(whole), weights(resumed))
    for name in ("step_0000006", "best"):
        a, b = (
            checkpoint.read_meta(tmp_path / run / "checkpoints" / f"{name}.safetensors")[0]
            for run in ("whole", "half")
        )
        assert a.sha256 == b.sha256 and a.step == b.step  # optimizer, scaler and loss history too
    a, b = (records(tmp_path / name) for name in ("whole", "half"))
    assert a == b and len({r["step"] for r in a}) == len(a)


def records(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    file = locate.find(str(tmp_path))[0]
    for override in ("model.channels=[8,24]", "model.num_blocks=2", "model.conditional=true"):
        other = prepare(config(override), tiny_data(), CPU)
        with pytest.raises(CheckpointError, match=r"does not fit its own config: '"):
            restore(other, file)


def test_half_a_line_of_metrics_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": 1.5}}\n' for step in range(1, 5)]
    for end in ('{"step": 5, "lo', "[" * 100_000, '{"step": 5, "loss": NaN}\n', '{"step": 5}\n', "7\n", "\0"):
        file.write_text("".join(lines) + end)
        metrics_file.cut(file, 9)
        assert file.read_text() == "".join(lines), end
    metrics_file.cut(file, 2)
    assert file.read_text() == "".join(lines[:2])
    monkeypatch.setattr(metrics_file, "MAX_BYTES", 30)
    with pytest.raises(OSError, match="more than the 30 allowed"):
        metrics_file.cut(file, 2)
    assert file.read_text() == "".join(lines[:2])


def test_metrics_are_read_alike_by_all_and_in_linear_time(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    of_validation = dict.fromkeys(metrics_file.VALIDATED, -0.5)  # an error below 0, a loss of 0, an integer
    lines = [json.dumps({"step": step, "loss": 0, "lr": 2**60, **of_validation}) + "\n" for step in range(50)]
    file.write_text("".join(lines) + "junk\n" + lines[0])
    with pytest.raises(ValueError, match="line 51 makes no sense"):
        list(metrics_file.read(file))
    metrics_file.cut(file, 10)
    assert [record["step"] for record in metrics_file.read(file)] == list(range(11))
    plots.plot_loss(file, tmp_path / "loss.png")
    file.write_text("".join(lines) * 400)  # 3 MB
    started = time.process_time()
    metrics_file.cut(file, 10**9)
    assert time.process_time() - started < 3 and len(list(metrics_file.read(file))) == 20_000


def test_accumulation_is_the_same_batch(tmp_path: Path) -> None:
    whole, parts = train(tmp_path / "a"), train(tmp_path / "b", "trainer.accumulate=4")
    assert ((weights(whole) - weights(parts)).abs() > 1e-5).double().mean() < 2e-2  # see the textbook test


def test_loss_falls_on_a_learnable_set(tmp_path: Path) -> None:
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :4] = 255
    data = Dataset(FACTS, Split(images, None), Split(images[:5], None), Split(images[:5], None))
    rare = ("trainer.validate_every=0", "trainer.checkpoint_every=0")
    train(tmp_path, "trainer.max_steps=60", "optimizer.lr=3e-3", *rare, data=data)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) / 10 < 0.3 < 0.9 < losses[0]


def test_not_finite_never_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, original = tiny_data(), losses
    run = prepare(config(*(f"trainer.{key}_every=4" for key in ("log", "validate", "checkpoint"))), data, CPU)
    kept: dict[int, torch.Tensor] = {}

    def poisoned(*arguments: Any) -> torch.Tensor:
        kept[run.step] = weights(run)
        loss = original(*arguments)
        return loss * float("nan") if run.step == 2 else loss

    monkeypatch.setattr("ddpm.train.step.losses", poisoned)
    with pytest.raises(UserError, match=r"loss nan .* at step 3, at a learning rate of 0.00"):
        list(fit(run, data, tmp_path))
    network = sum(p.numel() for p in run.network.parameters())
    assert torch.equal(kept[2][:network], kept[3][:network])  # the bad update was skipped
    assert (
        weights(run).isfinite().all() and not (tmp_path / "checkpoints" / "step_0000004.safetensors").exists()
    )


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    run = prepare(config("trainer.checkpoint_every=0"), tiny_data(), CPU)
    with pytest.raises(CheckpointError, match=r"the weights are not finite at step 2 .*was not written"):
        for progress in fit(run, tiny_data(), tmp_path):
            if progress.step == 2:  # finite gradients can still overflow the weights
                next(run.network.parameters()).data.view(-1)[0] = float("inf")
                loop.keep(run, tmp_path, {})
    assert locate.saved_steps(tmp_path) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_close_to_float32(tmp_path: Path, precision: str) -> None:
    full, low = train(tmp_path / "a"), train(tmp_path / "b", f"trainer.precision={precision}")
    assert next(low.network.parameters()).dtype == torch.float32
    assert 0 < (weights(full) - weights(low)).abs().max() < 0.02


def test_epochs_and_retention(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.max_epochs=2", "trainer.checkpoint_every=1", "trainer.keep=2")
    assert run.step == 9  # 2 x 50 images in batches of 12
    assert [file.name for file in locate.saved_steps(tmp_path)] == [
        "step_0000008.safetensors",
        "step_0000009.safetensors",
    ]
    best, _ = checkpoint.read_meta(tmp_path / "checkpoints" / "best.safetensors")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert best.figures["val_eps_mse"] == min(r["val_eps_mse"] for r in records if "val_eps_mse" in r)


def test_batches_are_permutations_of_each_epoch() -> None:
    batches = Batches(tiny_data().train, 12, 0, CPU)
    order = batches.positions(0, 150)
    for epoch in range(3):
        assert torch.equal(order[50 * epoch : 50 * (epoch + 1)].sort().values, torch.arange(50))
    assert not torch.equal(order[:50], order[50:100])
    x_0, y = batches.batch(4)  # reaches over the end of the first epoch
    data = tiny_data().train
    assert data.labels is not None and y is not None and torch.equal(y, data.labels[order[48:60]])
    assert torch.equal(x_0, data.images[order[48:60]].float() / 127.5 - 1)


def test_learning_rate() -> None:
    cfg = config("optimizer.lr=1.0", "optimizer.warmup_steps=10").optimizer
    assert learning_rate(cfg, 0, 1000) == pytest.approx(0.1, rel=1e-4) and learning_rate(
        cfg, 500, 1000
    ) == pytest.approx(0.5)
    assert learning_rate(cfg, 999, 1000) < 1e-5
    constant = config("optimizer.lr=1.0", "optimizer.decay=constant").optimizer
    assert learning_rate(constant, 999, 1000) == 1.0
    typed = ("optimizer.decay=halving", "optimizer.halvings=5", "optimizer.warmup_steps=0")
    halving = config("optimizer.lr=1.0", *typed).optimizer
    every_ten_of_sixty_epochs = [0.5 ** (epoch // 10) for epoch in range(60)]  # of 7 steps each
    assert [learning_rate(halving, 7 * epoch + 3, 420) for epoch in range(60)] == every_ten_of_sixty_epochs
    assert learning_rate(halving, 69, 420) == 1.0 and learning_rate(halving, 70, 420) == 0.5


def test_labels_are_dropped_at_the_asked_rate() -> None:
    run = prepare(config("model.conditional=true", "objective.label_dropout=0.25"), tiny_data(), CPU)
    y = torch.arange(20_000) % 3
    _, _, _, labels = _draw(run, torch.zeros(20_000, 1, 1, 1), y, torch.arange(20_000), 0)
    assert labels is not None
    dropped = labels == 3
    assert abs(dropped.float().mean() - 0.25) < 0.015 and torch.equal(labels[~dropped], y[~dropped])


def test_bf16_on_a_cpu_that_lacks_it_is_said_by_the_key_that_was_typed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert device.slow_in_bf16("precision", "bf16", cpu).startswith("precision=bf16: this CPU")
    assert device.slow_in_bf16("precision", "fp32", cpu) == ""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert device.slow_in_bf16("precision", "bf16", cpu) == ""


@pytest.mark.parametrize("size", [28, 256, 512, 1024])
def test_pictures_of_large_images_are_not_larger_than_a_screen(size: int, tmp_path: Path) -> None:
    x_0 = torch.zeros(8, 1, size, size, dtype=torch.uint8)
    plots.draw_forward(x_0, schedules.cosine(10), tmp_path / "forward.png")
    with Image.open(tmp_path / "forward.png") as picture:
        assert max(picture.size) <= (2100 if size < 1024 else 3080)  # three images are the least
