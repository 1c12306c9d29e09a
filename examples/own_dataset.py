"""Train on a dataset of one's own: white discs anywhere on black.

python examples/own_dataset.py trainer.max_steps=500    on the command line: plugins=own_dataset dataset=discs
"""

import sys
from pathlib import Path

import torch

import ddpm
from ddpm.cli.entry import train
from ddpm.data.dataset import Dataset, Split, hold_out
from ddpm.data.info import DatasetInfo


@ddpm.register("dataset")
def discs(data_root: Path, image_size: int = 16, count: int = 2000) -> Dataset:
    """Images are uint8 (N, C, H, W). `data_root` is where files would lie; these need none."""
    center = torch.rand(2, count, 1, 1, generator=torch.Generator().manual_seed(0)) * image_size
    pixel = torch.arange(image_size) + 0.5
    distance = torch.hypot(pixel - center[0], pixel[:, None] - center[1])  # (N, H, W)
    images = 255 * (distance < image_size / 4).to(torch.uint8)
    rest, test = hold_out(Split(images[:, None], labels=None), count // 10)
    training, validation = hold_out(rest, count // 10)
    facts = DatasetInfo("discs", channels=1, image_size=image_size, num_classes=0, class_names=(), levels=2)
    return Dataset(facts, training, validation, test)


if __name__ == "__main__":
    sys.argv[1:1] = ["dataset=discs", "model=unet_tiny"]  # what is typed comes later and wins
    train()  # the whole of ddpm-train
