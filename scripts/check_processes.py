"""One process against two and four: losses of the first 50 steps side by side, and the images they sample.

    python scripts/check_processes.py                                        digits, on the CPU
    python scripts/check_processes.py 1,8 device=cuda dataset=mnist trainer.batch_size=512

Runs the installed ddpm-train and ddpm-sample under torchrun in float32. Exits with 1 where a loss differs by more than
1e-4 of itself or a sampled image by more than one grey level. Numbers of processes come first, settings after them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STEPS = 50
SETTINGS = (
    f"trainer.max_steps={STEPS}",
    "trainer.batch_size=50",
    "trainer.log_every=1",
    "trainer.precision=fp32",
    "trainer.sample_every=0",
    "model.conditional=true",
    "objective.timesteps=loss_aware",
    "schedule.num_timesteps=100",
)
LOSS, LEVELS = 1e-4, 1


def main() -> None:
    arguments = sys.argv[1:]
    counts = [1, 2, 4]
    if arguments and "=" not in arguments[0]:
        counts = [int(count) for count in arguments.pop(0).split(",")]
    device = next((a for a in reversed(arguments) if a.startswith("device=")), "device=cpu")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for count in counts:
            together(count, "ddpm-train", *SETTINGS, device, *arguments, f"run_dir={home / str(count)}")
        losses = np.array([read_losses(home / str(count)) for count in counts])
        pictures = []
        for count in counts:
            out = home / f"drawn-{count}"
            ckpt = f"ckpt={home / str(counts[0])}"
            together(count, "ddpm-sample", ckpt, device, "n=50", "seed=1", "save=[npz]", f"out={out}")
            pictures.append(read_images(out))
    print("step  " + "  ".join(f"{f'{count} processes':>12}" for count in counts) + "  largest difference")
    apart = np.abs(losses - losses[0]).max(axis=0)
    for step in range(STEPS):
        print(
            f"{step + 1:>4}  "
            + "  ".join(f"{loss:>12.8f}" for loss in losses[:, step])
            + f"  {apart[step]:.1e}"
        )
    relative = float((apart / losses[0]).max())
    print(f"largest difference of a loss: {apart.max():.1e}, {relative:.1e} of it (allowed: {LOSS:.0e})")
    levels = [int(np.abs(other - pictures[0]).max()) for other in pictures]
    changed = [float((other != pictures[0]).mean()) for other in pictures]
    for count, level, part in zip(counts, levels, changed, strict=True):
        print(
            f"images by {count}: at most {level} of 255 grey levels off (allowed: {LEVELS}), {part:.2%} of pixels"
        )
    sys.exit(relative > LOSS or max(levels) > LEVELS)


def together(count: int, *command: str) -> None:
    """The command as so many processes; its output only where it fails."""
    bin = Path(sys.executable).parent
    torchrun = [str(bin / "torchrun"), "--standalone", f"--nproc-per-node={count}", "--no-python"]
    result = subprocess.run([*torchrun, str(bin / command[0]), *command[1:]], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed\n{result.stdout}{result.stderr}")


def read_losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_images(folder: Path) -> NDArray[np.int64]:
    return np.asarray(np.load(folder / "samples.npz")["images"], dtype=np.int64)


if __name__ == "__main__":
    main()
