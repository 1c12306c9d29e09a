"""Networks: `network(x_t (N, C, H, W), t (N,), y (N,) or None) → (N, C_out, H, W)`.

To add one, write the module, put it into `NETWORKS` and add `configs/model/<name>.yaml` with its parameters.
"""

from collections.abc import Callable

from torch import nn

from ddpm.networks.mlp import MLP
from ddpm.networks.unet import UNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "mlp": MLP}
