"""Train on scikit-learn's digits without the command line, then draw 16 images.

python examples/train_from_python.py outputs/example trainer.max_steps=500
"""

import sys
from pathlib import Path

import torch

import ddpm
from ddpm import build
from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.train.loop import fit
from ddpm.train.state import prepare


def main(folder: Path, overrides: list[str]) -> None:
    config = check(
        TrainConfig, compose("train", ["dataset=digits", *overrides])
    )  # configs/train.yaml, checked
    data = build.dataset(config.dataset, config.data_root)
    state = prepare(config, data, torch.device("cpu"))
    for progress in fit(state, data, folder):  # one iteration a step; checkpoints go to folder/checkpoints
        if progress.record:
            print(f"step {progress.step}: loss {progress.record['loss']:.4f}")
    images = ddpm.load(folder).sample(16, seed=0)  # (16, 1, 8, 8) in [-1, 1]
    ddpm.save_grid(images, folder / "grid.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
