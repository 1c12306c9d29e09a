"""The fully connected denoiser of introductory lectures, with time and class: a baseline."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.networks.unet import add_class, class_table, sinusoids


class MLP(nn.Module):
    """x (N, in_channels, S, S), t (N,), y (N,) or None → (N, out_channels, S, S); S = image_size.

    Pixels → hidden (× num_layers) → pixels, 784-512-784 for MNIST; the embedding of time (and label) is added
    to every hidden layer. Times and labels as in `UNet`.
    Raises ValueError for sizes it cannot have, and for labels given to an unconditional network.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        *,
        hidden: int = 512,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        if hidden < 2 or hidden % 2:
            raise ValueError(f"hidden={hidden}: must be even, for as many sines as cosines of the time")
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers}: the time enters at hidden layers, so at least 1")
        self.hidden = hidden
        self.out_shape = (out_channels, image_size, image_size)
        widths = [in_channels * image_size**2] + [hidden] * num_layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.times = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num_layers))
        self.label = class_table(num_classes, hidden) if num_classes else None
        self.out = nn.Linear(hidden, out_channels * image_size**2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = sinusoids(t, self.hidden).to(self.out.weight.dtype)
        emb = add_class(emb, self.label, y)
        h = x.flatten(1)
        for layer, time in zip(self.layers, self.times, strict=True):
            h = F.silu(layer(h) + time(emb))
        out: Tensor = self.out(h)
        return out.view(-1, *self.out_shape)
