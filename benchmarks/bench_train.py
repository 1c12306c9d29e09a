"""A training step of ours beside diffusers', denoising-diffusion-pytorch's and smalldiffusion's, in one run.

    python benchmarks/bench_train.py                                    batch 128, 2 threads of the CPU
    python benchmarks/bench_train.py --device cuda --batch-size 128 512 2048
    python benchmarks/bench_train.py --losses 50                        not how fast, but whether it is the same

diffusers' UNet2DModel is of the same topology and weights as ours: once both as their users run them, in float32, and
once best against best, where each side has the fastest of its settings: float32 or bf16, contiguous or channels_last,
with --compile also compiled (in the better precision), found before. The other two have networks of
their own of about the size, so what compares is the time per GFLOP, as torch.utils.flop_counter counts forward and
backward (a multiply-add is 2 FLOP).

What a step is, says sides.py. Each side is a process of its own, as ours keeps the memory it frees
(ddpm.runtime.memory), which a peer's user does not get; on a CPU further rows give it to the peers, too. Sides take
turns, the first step of each is not timed; quoted are medians over the turns, and of ratios to ours in the same round.
Needs the extra `bench`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sides import PEERS, Setting, difference, installed, losses, make
from timing import machine, save, seconds
from torch.utils.flop_counter import FlopCounterMode

from ddpm.runtime import memory

WARM_UP = 2
SCREENING = 3  # turns of each of a side's settings, to find the fastest
USUAL = Setting("ours", channels_last=True, keep_freed=True)
PEERS_USUAL = Setting("diffusers", fused=False)


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    if options.one:
        serve(Setting(**json.loads(options.one)), options.batch_size[0], device)
        return
    versions = installed()
    if "diffusers" not in versions:
        sys.exit('diffusers is not installed: pip install -e ".[bench]"')
    if options.losses:
        compare_losses(options.losses, options.batch_size[0], device)
        return
    print(", ".join(f"{key} {value}" for key, value in (machine(device) | versions).items()))
    if absent := [name for name in options.peers if name not in versions]:
        print(f"not installed and left out: {', '.join(absent)}")
    apart, largest = difference(device)
    print(
        f"same weights, same inputs: outputs of up to {largest:.2g} differ by at most {apart:.1e} (float32)"
    )
    sides = ["ours", *(name for name in options.peers if name in versions)]
    figures = {f"batch {n}": compare(sides, n, options) for n in options.batch_size}
    if options.save:
        chosen = {key: value for key, value in vars(options).items() if key not in ("one", "save", "losses")}
        save(options.save, chosen | versions, {"difference": apart} | figures, device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="timed in each turn (default: 2, on a GPU 20)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument(
        "--compile", action="store_true", help="try torch.compile, too: minutes for each side"
    )
    parser.add_argument("--losses", type=int, metavar="STEPS", help="compare ours and diffusers' instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, metavar="FILE", help="all figures, as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or (2 if options.device == "cpu" else 20)
    return options


def compare(sides: list[str], batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything at one batch size, printed as it comes; the raw figures."""
    print(f"\nbatch {batch_size}", flush=True)
    before = measured_peaks(batch_size, options)
    screened = {side: screen(side, batch_size, options) for side in sides}
    most = {name: max(speed, before[name]) for name, speed in measured_peaks(batch_size, options).items()}
    texts = [f"{name} {speed:,.0f}" for name, speed in most.items()]
    print(f"most GFLOP/s of 3×3 convolutions (and of bf16 matrices): {', '.join(texts)}", flush=True)
    best = [min(found, key=lambda setting: min(found[setting])) for found in screened.values()]
    groups = {"best against best": best}
    if "diffusers" in sides:
        groups = {"as their users run them": [USUAL, PEERS_USUAL], **groups}
    figures: dict[str, Any] = {"peaks": most}
    figures["screening"] = {str(s): values for found in screened.values() for s, values in found.items()}
    for title, (ours, *peers) in groups.items():
        if options.device == "cpu":
            peers += [replace(setting, keep_freed=True) for setting in peers]
        times, facts = in_turns([ours, *peers], options.rounds, options.steps, batch_size, options)
        print(f"{title}, {options.rounds} rounds of {options.steps} steps:")
        print_table(times, facts, most, batch_size)
        figures[title] = {str(s): {**facts[s], "seconds": times[s]} for s in times}
    return figures


def screen(side: str, batch_size: int, options: argparse.Namespace) -> dict[Setting, list[float]]:
    """Seconds a step of each sensible setting, which take turns; printed. What counts is the fastest turn, as other
    work on the machine can only add to it.
    """
    layouts, plain = (False, True), Setting(side, keep_freed=side == "ours")
    settings = [replace(plain, precision=p, channels_last=c) for p in ("fp32", "bf16") for c in layouts]
    found, _ = in_turns(settings, SCREENING, options.steps, batch_size, options)
    if options.compile:
        best = min(found, key=lambda setting: min(found[setting]))
        compiled = [replace(best, compile="default", channels_last=c) for c in layouts]
        found |= in_turns(compiled, SCREENING, options.steps, batch_size, options)[0]
    for setting, values in found.items():
        print(f"  {setting!s:<60} {1000 * min(values):8.1f} ms a step at best", flush=True)
    return found


def in_turns(
    settings: list[Setting], rounds: int, steps: int, batch_size: int, options: argparse.Namespace
) -> tuple[dict[Setting, list[float]], dict[Setting, dict[str, float]]]:
    """Seconds a step of each setting in each round, and what its process says of its network."""
    with ExitStack() as stack:
        workers, facts = {}, {}
        for setting in settings:  # one after the other, as only one may compute at a time
            line = command("bench_train.py", batch_size, options)
            line += ["--one", json.dumps(asdict(setting))]
            process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            workers[setting] = stack.enter_context(process)
            facts[setting] = answer(process)
        times: dict[Setting, list[float]] = {setting: [] for setting in settings}
        for number in range(rounds):
            for setting in settings if number % 2 == 0 else reversed(settings):
                print(steps, file=workers[setting].stdin, flush=True)
                times[setting].append(answer(workers[setting])["seconds"] / steps)
    return times, facts


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        sys.exit(f"a worker ended with status {process.wait()}; see above")
    return json.loads(line)


def serve(setting: Setting, batch_size: int, device: torch.device) -> None:
    """Say how large the network is; then take as many steps as each line asks for, and say how long it took."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    if setting.keep_freed:
        memory.keep_freed()
    side = make(setting, batch_size, device)
    eager = torch.compiler.set_stance("force_eager") if setting.compile else nullcontext()
    with eager, FlopCounterMode(display=False) as counter:
        side.step()
    for _ in range(WARM_UP):
        side.step()
    parameters = sum(parameter.numel() for parameter in side.network.parameters())
    gflop = counter.get_total_flops() / batch_size / 1e9
    print(json.dumps({"parameters": parameters, "gflop_an_image": gflop}), file=answers, flush=True)

    def turn(steps: int) -> None:
        for _ in range(steps):
            side.step()

    for line in sys.stdin:
        side.step()  # the others' turns have emptied the caches
        taken = seconds(partial(turn, int(line)), device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next worker needs it
        print(json.dumps({"seconds": taken}), file=answers, flush=True)


def print_table(
    times: dict[Setting, list[float]],
    facts: dict[Setting, dict[str, float]],
    peaks: dict[str, float],
    batch_size: int,
) -> None:
    """The first is ours."""
    ours = next(iter(times))
    for setting, values in times.items():
        gflop = facts[setting]["gflop_an_image"]
        speed = batch_size * gflop / statistics.median(values)
        print(
            f"  {setting!s:<60} {1000 * statistics.median(values):8.1f} ms a step ({1000 * min(values):.1f} to "
            f"{1000 * max(values):.1f}), {batch_size / statistics.median(values):,.0f} images/s; "
            f"{facts[setting]['parameters'] / 1e6:.2f} M parameters, {gflop:.3f} GFLOP an image, "
            f"{speed:,.0f} GFLOP/s, {100 * speed / peaks[setting.precision]:.0f} % of the convolutions'"
            + (
                f", {100 * speed / peaks['matrices']:.1f} % of a matrix product's"
                if "matrices" in peaks
                else ""
            )
        )
        if setting != ours:
            size = facts[ours]["gflop_an_image"] / gflop  # 1 for the same network
            ratios = [size * theirs / own for own, theirs in zip(times[ours], values, strict=True)]
            print(
                f"  {'':<60} per GFLOP ours is {statistics.median(ratios):.2f} times as fast "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


def compare_losses(steps: int, batch_size: int, device: torch.device) -> None:
    found = losses(steps, batch_size, device)
    worst = max(abs(ours - theirs) / theirs for ours, theirs in found)
    (_, first), (ours, theirs) = found[0], found[-1]
    print(
        f"{steps} steps, fp32, batch {batch_size}, {device}: from {first:.4f} to {ours:.6f} (ours) and {theirs:.6f} "
        f"(diffusers'); largest relative difference at any step {worst:.1e}"
    )


def command(script: str, batch_size: int, options: argparse.Namespace) -> list[str]:
    line = [sys.executable, str(Path(__file__).with_name(script)), "--batch-size", str(batch_size)]
    return [*line, "--threads", str(options.threads), "--device", options.device]


def measured_peaks(batch_size: int, options: argparse.Namespace) -> dict[str, float]:
    line = command("peaks.py", batch_size, options)
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
