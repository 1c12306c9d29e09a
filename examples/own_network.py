"""Train a network of one's own on scikit-learn's digits, convolutions at one resolution, and draw 16 images with it.

python examples/own_network.py outputs/net trainer.max_steps=500    elsewhere: plugins=own_network model=convnet
"""

import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

import ddpm
from ddpm.cli.entry import train
from ddpm.networks.unet import sinusoids


@ddpm.register("network")
class convnet(nn.Module):
    """x (N, in_channels, S, S), times t (N,) and no labels → (N, out_channels, S, S)."""

    def __init__(self, image_size, in_channels, out_channels, num_classes, width: int = 32):
        super().__init__()
        if num_classes:
            raise ValueError("it takes no labels: model.conditional must be false")
        self.times = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.begin, self.end = nn.Conv2d(in_channels, width, 1), nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h, emb = self.begin(x), sinusoids(t, self.begin.out_channels)
        for time, block in zip(self.times, self.blocks, strict=True):
            h = h + block(F.silu(h + time(emb)[:, :, None, None]))
        return self.end(h)


if __name__ == "__main__":
    folder, *overrides = sys.argv[1:]
    sys.argv[1:] = ["dataset=digits", "model=convnet", f"run_dir={folder}", *overrides]
    train()  # the whole of ddpm-train
    ddpm.save_grid(ddpm.load(folder).sample(16, seed=0), Path(folder) / "grid.png")
