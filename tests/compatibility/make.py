"""Make all of `made/`. Run once, at commit 0d6bd37, and not again: what it pins is what that commit did.

    python -m tests.compatibility.make

`made/` then holds, as that commit wrote them, one thread, on the CPU of `environment.json`:

finished/      the folder of a finished run: a U-Net with labels (AdamW, eps)
stopped_unet/  one stopped by SIGTERM midway: dropout, two parts a batch, loss-aware timesteps, v
stopped_mlp/   another: Muon, labels, learned variance, a best checkpoint beside the newest
environment.json  all factors that decide bits
expected.json  the commands, draws and figures, and of each resumed run metrics, result and a hash of each tensor
images.npz     the images of each draw
weights_*.safetensors  the averaged weights of each resumed run

Left out of the run folders are pictures, the lock, and the best checkpoint where it is the newest over again.
Before anything is kept, each resumed run is compared with one that was never stopped: equal in every bit.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import ddpm
from tests.compatibility.factors import bitwise_factors
from tests.conftest import run_script

MADE = Path(__file__).parent / "made"
PLUGIN = Path(__file__).with_name("old_plugin.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

COMMON = [
    *("data_root=data", "device=cpu", "schedule.num_timesteps=100", "trainer.log_every=10", "trainer.keep=1"),
    *("trainer.sample_every=0", "trainer.checkpoint_every=0", "model.conditional=true"),
]
UNET = ["model.channels=[4,4]", "model.norm_groups=2", "model.head_dim=4"]
FINISHED = [*UNET, "trainer.max_steps=400", "trainer.batch_size=32", "trainer.validate_every=0", "seed=3"]
STOPPED = {
    "unet": [
        *(*UNET, "model.dropout=0.1", "objective=v", "objective.timesteps=loss_aware", "schedule=cosine"),
        *(
            "trainer.max_steps=60",
            "trainer.batch_size=16",
            "trainer.accumulate=2",
            "trainer.validate_every=0",
        ),
    ],
    "mlp": [
        *("model=mlp", "model.hidden=32", "optimizer=muon", "objective.learned_variance=true"),
        *("trainer.max_steps=60", "trainer.validate_every=20"),
    ],
}
# What `ddpm.load(run).sample` is given.
DRAWS: dict[str, list[dict[str, Any]]] = {
    "finished": [
        {"n": 4, "seed": 1},
        {"n": 4, "seed": 1, "sampler": "ddim", "num_steps": 8, "label": [3, 7], "guidance_scale": 2.0},
        {"index": [5, 2], "seed": 1, "sampler": "ddim", "num_steps": 6, "eta": 0.5, "spacing": "trailing"},
        {"n": 4, "seed": 2, "sampler": "ddpm", "num_steps": 20, "label": 0, "guidance_scale": 0.5},
        {"n": 4, "seed": 2, "sampler": "dpmpp_2m", "num_steps": 6, "spacing": "karras", "clip": "dynamic"},
        {"n": 4, "seed": 2, "sampler": "dpmpp_2m_sde", "num_steps": 6, "eta": 0.7},
        {"n": 4, "seed": 2, "sampler": "heun", "num_steps": 5, "churn": 2.0, "label": 9},
        {"n": 4, "seed": 2, "sampler": "unipc", "num_steps": 6, "order": 3, "guidance_scale": 3.0},
    ],
    "unet": [{"n": 4, "seed": 4, "sampler": "dpmpp_2m", "num_steps": 6, "label": 8, "guidance_scale": 2.0}],
    "mlp": [{"n": 4, "seed": 4, "sampler": "ddpm", "num_steps": 10, "variance": "learned"}],
}
COMMANDS = {
    "sample": [
        *("ckpt=outputs/finished", "device=cpu", "n=6", "seed=7", "label=[3,7]", "guidance_scale=2.5"),
        *("guidance_rescale=0.5", "guidance_interval=[0.1,5]", "sampler=ddim", "sampler.num_steps=8"),
        *("save=[npz]", "out=outputs/drawn"),
    ],
    "eval": [
        *("ckpt=outputs/finished", "device=cpu", "n=50", "measure=[distance]", "data_root=data"),
        *("sampler=ddim", "sampler.num_steps=5", "out=outputs/judged"),
    ],
    "plugin train": [
        *("plugins=old_plugin", "dataset=discs", "schedule=arc", "schedule.power=1.5", "sampler=renoise"),
        *("dataset.count=100", "schedule.num_timesteps=100", "run_dir=runs/discs", "device=cpu"),
        *(*UNET, "model.num_blocks=1", "model.attention=[]", "trainer.max_steps=3", "trainer.batch_size=8"),
    ],
    "plugin sample": [
        *("plugins=old_plugin", "ckpt=runs/discs", "n=4", "device=cpu", "sampler.num_steps=4"),
        *("sampler.fresh=0.5", "save=[npz]", "out=drawn"),
    ],
}
FIGURES = ("fd", "pixel_fd", "kid")


def run(program: str, *arguments: str, cwd: Path) -> None:
    done = run_script(program, *arguments, cwd=cwd, **ONE_THREAD)
    if done.returncode:
        sys.exit(f"ddpm-{program} {' '.join(arguments)}: {done.stdout}{done.stderr}")


def run_until_stopped(arguments: list[str], run_dir: str, cwd: Path) -> None:
    """Train, and send SIGTERM after step 20. Again, a little later or earlier, until it stops between two lines."""
    script, metrics = Path(sys.executable).with_name("ddpm-train"), cwd / run_dir / "metrics.jsonl"
    command = [str(script), *arguments, f"run_dir={run_dir}"]
    for wait in (0.1, 0.2, 0.05, 0.3, 0.02, 0.15):  # seconds
        with subprocess.Popen(command, cwd=cwd, env={**os.environ, **ONE_THREAD}) as process:
            while not (metrics.exists() and '"step": 20,' in metrics.read_text()):
                time.sleep(0.002)
            time.sleep(wait)
            process.send_signal(signal.SIGTERM)
        if process.returncode == 128 + signal.SIGTERM and step_of(newest(cwd / run_dir)) % 10:
            return
        shutil.rmtree(cwd / run_dir)
    sys.exit(f"{run_dir}: could not be stopped between two lines of metrics.jsonl")


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step_*.safetensors"))


def step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step_"))


def hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Of dtype, shape and bytes, by the tensor's name."""
    return {
        name: hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode() + x.numpy().tobytes()).hexdigest()[:16]
        for name, x in sorted(tensors.items())
    }


def keep(folder: Path, home: Path, best: bool) -> None:
    """Copy what a resumption needs into `made/`."""
    left_out = ["*.png", "samples", ".lock", *([] if best else ["best.safetensors"])]
    shutil.copytree(home / "outputs" / folder, MADE / folder, ignore=shutil.ignore_patterns(*left_out))


def resumed(name: str, home: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What must come of the stopped run; it was kept before."""
    folder, whole = home / "outputs" / f"stopped_{name}", home / "whole" / name
    run("train", f"trainer.resume=outputs/stopped_{name}", "data_root=data", "device=cpu", cwd=home)
    run("train", *COMMON, *STOPPED[name], f"run_dir=whole/{name}", cwd=home)
    tensors = load_file(newest(folder))
    assert hashes(tensors) == hashes(load_file(newest(whole))), (
        f"{name}: not as the run that was never stopped"
    )
    expected = {
        "tensors": hashes(tensors),
        "metrics": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "result": json.loads((folder / "result.json").read_text()),
    }
    return expected, {key: x for key, x in tensors.items() if key.startswith("ema.")}


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir()
    expected: dict[str, Any] = {"draws": DRAWS, "commands": COMMANDS, "resumed": {}}
    images: dict[str, np.ndarray[Any, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        run("train", *COMMON, *FINISHED, "run_dir=outputs/finished", cwd=home)
        keep(Path("finished"), home, best=False)
        for name, arguments in STOPPED.items():
            place = f"outputs/stopped_{name}"
            run_until_stopped([*COMMON, *arguments], place, home)
            keep(Path(f"stopped_{name}"), home, best=name == "mlp")
            expected["resumed"][name], weights = resumed(name, home)
            save_file(weights, MADE / f"weights_{name}.safetensors")
        for run_name, draws in DRAWS.items():
            model = ddpm.load(
                home / "outputs" / (run_name if run_name == "finished" else f"stopped_{run_name}")
            )
            for i, draw in enumerate(draws):
                images[f"{run_name}_{i}"] = model.sample(**draw).numpy()
        run("sample", *COMMANDS["sample"], cwd=home)
        drawn = np.load(home / "outputs" / "drawn" / "samples.npz")
        images |= {"command": drawn["images"], "command_labels": drawn["labels"]}
        run("eval", *COMMANDS["eval"], cwd=home)
        figures = json.loads((home / "outputs" / "judged" / "evaluation.json").read_text())["figures"]
        expected["figures"] = {key: figures[key]["value"] for key in FIGURES}
        shutil.copy(PLUGIN, home)
        run("train", *COMMANDS["plugin train"], cwd=home)
        run("sample", *COMMANDS["plugin sample"], cwd=home)
        images["plugin"] = np.load(home / "drawn" / "samples.npz")["images"]
        environment = json.loads((home / "outputs" / "stopped_unet" / "environment.json").read_text())
    np.savez_compressed(MADE / "images.npz", **images)
    for name, content in (("expected", expected), ("environment", bitwise_factors(environment))):
        (MADE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
