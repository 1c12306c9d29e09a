"""What a start costs: ddpm's commands beside the least that does the same, each in a process of its own.

    python benchmarks/bench_startup.py                       digits alone
    DDPM_DATA=… python benchmarks/bench_startup.py           MNIST, too, where $DDPM_DATA holds it

--help, two mistakes and TAB beside the smallest Hydra application; ddpm-train to the end of its first step, and
ddpm-sample to the end of its first network call, beside a process that imports torch and torchvision, builds the same
network and calls it once on as many images: forward, backward and a step of AdamW, or forward.

The two sides take turns. Printed are the medians of seconds by the clock and of seconds of CPU (user and system, of
that process alone, which mean something on a busy machine, too), and the median of the pairwise ratios with their
range. The first round is a warm-up: after it all files are in memory, and datasets in their cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import machine, save

from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.data.dataset import Dataset, Split
from ddpm.data.info import DatasetInfo
from ddpm.train.checkpointing import save as save_run
from ddpm.train.state import prepare

BARE = """
import sys

import hydra

@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(config):
    if config.optimizer.lr <= 0:
        sys.exit(f"optimizer.lr={config.optimizer.lr}: must be above 0")

main()
"""
BARE_CONFIG = "optimizer:\n  lr: 0.0002\n  weight_decay: 0.0\n"

# The commands as they are installed, but that they end with their first step, or their first call of the network.
TRAIN = """
import os, sys, ddpm.cli.entry, ddpm.train.loop
step = ddpm.train.loop.train_step
def first(*given):
    loss, _ = step(*given)
    print("loss", loss.item(), flush=True)
    os._exit(0)
ddpm.train.loop.train_step = first
ddpm.cli.entry.train()
"""
SAMPLE = """
import os, sys, ddpm.cli.entry, ddpm.diffusion.denoiser
evaluate = ddpm.diffusion.denoiser.Denoiser._evaluate
def first(*given):
    print("mean", evaluate(*given).mean().item(), flush=True)
    os._exit(0)
ddpm.diffusion.denoiser.Denoiser._evaluate = first
ddpm.cli.entry.sample()
"""
PLAIN = """
import json, os, sys
import torch, torchvision
from ddpm.networks import NETWORKS
given = json.loads(sys.argv[1])
network = NETWORKS[given["name"]](**given["network"]).to(given["device"], memory_format=torch.channels_last)
x = torch.randn(given["shape"], device=given["device"]).contiguous(memory_format=torch.channels_last)
t = torch.randint(1000, (len(x),), device=given["device"])
if given["train"]:
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    loss = (network(x, t) - torch.randn_like(x)).square().mean()
    loss.backward()
    optimizer.step()
    print("loss", loss.item(), flush=True)
else:
    with torch.inference_mode():
        print("mean", network.eval()(x, t).mean().item(), flush=True)
os._exit(0)
"""
DRAWN = 64  # images of ddpm-sample, all at once


@dataclass(frozen=True)
class Side:
    """A command, and what it says when it has done what it is here for."""

    command: list[str]
    says: str
    environment: dict[str, str] = field(default_factory=dict)

    def run(self) -> tuple[float, float]:
        """Seconds by the clock, and of CPU."""
        with tempfile.TemporaryFile("w+") as output:
            environment, begun = {**os.environ, **self.environment}, time.perf_counter()
            process = subprocess.Popen(self.command, stdout=output, stderr=output, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - begun
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            if self.says not in (text := output.read()):
                sys.exit(f"{' '.join(self.command)} said nothing of '{self.says}' but:\n{text}")
        return wall, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="the cases that begin so: train, 'sample digits', TAB, …")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, help="write machine, options and all figures there, as JSON")
    options = parser.parse_args()
    about = machine(torch.device(options.device))
    print(", ".join(f"{name} {value}" for name, value in about.items()) + f"; median of {options.rounds}")
    print(f"{'':<14}  seconds: ours  theirs  ratio            CPU seconds: ours  theirs  ratio")
    with tempfile.TemporaryDirectory() as folder:
        cases = {**of_hydra(Path(folder)), **of_torch(Path(folder), options.device)}
        wanted = [name for name in cases if name.startswith(tuple(options.only or [""]))]
        figures = {name: measure(name, *cases[name], options.rounds) for name in wanted}
    if options.save:
        settings = {"rounds": options.rounds, "device": options.device}
        save(options.save, settings, figures, torch.device(options.device))


def measure(name: str, ours: Side, theirs: Side, rounds: int) -> dict[str, Any]:
    runs = [(ours.run(), theirs.run()) for _ in range(rounds + 1)][1:]  # the first is the warm-up
    figures: dict[str, Any] = {}
    line = f"{name:<14}"
    for number, kind in enumerate(("seconds", "cpu_seconds")):
        pairs = [(own[number], other[number]) for own, other in runs]
        ratios = [own / other for own, other in pairs]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        own, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        line += f"{own:15.2f}{other:8.2f}  {middle:.2f} ({low:.2f} to {high:.2f})"
        figures[kind] = {"ours": own, "theirs": other, "ratio": middle, "range": [low, high], "pairs": pairs}
    print(line, flush=True)
    return figures


def of_hydra(folder: Path) -> dict[str, tuple[Side, Side]]:
    """What needs no torch. Both have a learning rate that must be above 0, in a group or file `optimizer`."""
    (folder / "config.yaml").write_text(BARE_CONFIG)
    app = folder / "app.py"
    app.write_text(BARE)
    ours, theirs = [script("train")], [sys.executable, str(app)]

    def tab(command: str) -> dict[str, str]:
        line = f"{command} optimizer."
        return {"COMP_LINE": line, "COMP_POINT": str(len(line))}

    asked = ["-sc", "query=bash"]
    return {
        "--help": (
            Side([*ours, "--help"], "optimizer="),
            Side([*theirs, "--help"], "optimizer:"),
        ),
        "unknown key": (
            Side([*ours, "optimizer.lrr=1"], "unknown key 'optimizer.lrr'"),
            Side([*theirs, "optimizer.lrr=1"], "Could not override 'optimizer.lrr'"),
        ),
        "wrong value": (
            Side([*ours, "optimizer.lr=-1"], "optimizer.lr=-1: must be"),
            Side([*theirs, "optimizer.lr=-1", f"hydra.run.dir={folder}"], "optimizer.lr=-1: must be"),
        ),
        "TAB": (
            Side([*ours, *asked], "optimizer.lr=", tab("ddpm-train")),
            Side([*theirs, *asked], "optimizer.lr=", tab("python app.py")),
        ),
    }


def of_torch(folder: Path, device: str) -> dict[str, tuple[Side, Side]]:
    """Of digits and, where it is there, MNIST, as their recipes have them."""
    cases = {}
    for dataset, size in {"digits": 8, "mnist": 28}.items():
        if dataset == "mnist" and not (Path(os.environ.get("DDPM_DATA", "data")) / "MNIST").is_dir():
            continue
        typed = [f"dataset={dataset}", f"device={device}", "trainer.precision=fp32"]
        config, ckpt = check(TrainConfig, compose("train", typed)), folder / f"{dataset}.safetensors"
        untrained(config, size, ckpt)
        params = {key: value for key, value in config.model.params.items() if key != "conditional"}
        sizes = {"image_size": size, "in_channels": 1, "out_channels": 1, "num_classes": 0}
        plain = {"name": config.model.name, "network": {**sizes, **params}, "device": device}

        def theirs(train: bool, says: str, n: int, plain: dict[str, Any] = plain, size: int = size) -> Side:
            given = {**plain, "train": train, "shape": [n, 1, size, size]}
            return Side([sys.executable, "-c", PLAIN, json.dumps(given)], says)

        fresh = [*typed, f"run_dir={folder / 'fresh'}", "overwrite=true"]
        drawn = [f"ckpt={ckpt}", f"device={device}", f"n={DRAWN}"]
        cases[f"train {dataset}"] = (
            Side([sys.executable, "-c", TRAIN, *fresh], "loss"),
            theirs(True, "loss", config.trainer.batch_size),
        )
        cases[f"sample {dataset}"] = (
            Side([sys.executable, "-c", SAMPLE, *drawn], "mean"),
            theirs(False, "mean", DRAWN),
        )
    return cases


def untrained(config: TrainConfig, size: int, path: Path) -> None:
    """A checkpoint before the first step."""
    split = Split(torch.zeros(1, 1, size, size, dtype=torch.uint8), None)
    facts = DatasetInfo(config.dataset.name, 1, size, 0, (), 256)
    save_run(prepare(config, Dataset(facts, split, split, split), torch.device("cpu")), path, {})


def script(program: str) -> str:
    """The installed command."""
    return str(Path(sys.executable).with_name(f"ddpm-{program}"))


if __name__ == "__main__":
    main()
