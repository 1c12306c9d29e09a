"""Killed and resumed against never stopped, and three runs against each other: the SHA-256 of their tensors.

    python scripts/check_resume.py                                   digits, on the device there is
    python scripts/check_resume.py dataset=mnist device=cuda trainer.precision=bf16 trainer.max_steps=400

Runs the installed ddpm-train with trainer.deterministic=true. One run is killed (SIGKILL) when its first checkpoint
is there, given again with trainer.resume=auto, stopped by SIGTERM in the middle, and given again. Exits with 1 unless
all hashes of the final and the best checkpoint are equal.
"""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ddpm.checkpoint.file import read_meta
from ddpm.checkpoint.locate import saved_steps

SETTINGS = (
    "trainer.max_steps=200",
    "trainer.checkpoint_every=40",
    "trainer.validate_every=80",
    "trainer.sample_every=0",
    "trainer.deterministic=true",
)


def main() -> None:
    program = [str(Path(sys.executable).with_name("ddpm-train")), *SETTINGS, *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name in ("first", "second", "third"):
            subprocess.run([*program, f"run_dir={home / name}"], check=True, stdout=subprocess.DEVNULL)
        stopped = home / "stopped"
        again = [*program, f"run_dir={stopped}", "trainer.resume=auto"]
        print("killed:", interrupt(again, stopped, 1, signal.SIGKILL))
        print("stopped:", interrupt(again, stopped, 2, signal.SIGTERM))
        subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
        hashes = {name: of(home / name) for name in ("first", "second", "third", "stopped")}
    for name, (step, *digests) in hashes.items():
        print(f"{name:>8}: step {step}, tensors {digests[0]}, best {digests[1]}")
    equal = len(set(hashes.values())) == 1
    print("all equal" if equal else "NOT equal")
    sys.exit(not equal)


def interrupt(command: list[str], run: Path, checkpoints: int, number: signal.Signals) -> str:
    """Start, wait until so many step files are there, send the signal; returns how the process ended."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(saved_steps(run)) < checkpoints:
        if process.poll() is not None:
            sys.exit(f"ended before it could be interrupted, with status {process.returncode}")
        time.sleep(0.01)
    process.send_signal(number)
    status = process.wait()
    return f"status {status}, newest checkpoint {saved_steps(run)[-1].name}"


def of(run: Path) -> tuple[int, str, str]:
    last, _ = read_meta(saved_steps(run)[-1])
    best, _ = read_meta(run / "checkpoints" / "best.safetensors")
    return last.step, last.sha256, best.sha256


if __name__ == "__main__":
    main()
