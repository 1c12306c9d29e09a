"""The U-Net of DDPM (Ho et al. 2020, appendix B), with the topology of diffusers' `UNet2DModel`.

Level 0 has full resolution; each further level has half the size. A level has residual blocks with time embedding,
and self-attention where configured. Skip connections join the downward and the upward path.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.networks.kernels.group_norm import normed

WIDE_HEAD, FEW_TOKENS = 32, 256  # limits for plain matrix products to beat fused attention in bf16 on a CPU


class UNet(nn.Module):
    """x (N, in_channels, S, S), t (N,), y (N,) or None → (N, out_channels, S, S); S = image_size.

    Times are indices 0 … T-1 and may be fractional. `num_classes` = 0 makes it unconditional; else labels
    run from 0 to num_classes, the last one (and None) meaning "no label" (Ho & Salimans 2022).

    channels: width of each level; num_blocks: residual blocks a level; attention: levels with self-attention
    (the middle always has it); head_dim: channels of an attention head; norm_groups: groups of each
    GroupNorm; dropout: in the residual blocks. Fastest in channels_last, where attention copies nothing.
    Raises ValueError for sizes that do not fit together, and for labels given to an unconditional network.
    """

    own_group_norm = True  # GroupNorm may run in `kernels`
    in_diffusers = True  # diffusers' UNet2DModel takes the weights

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        *,
        channels: Sequence[int],
        num_blocks: int,
        attention: Sequence[int],
        head_dim: int = 8,
        norm_groups: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(image_size, channels, num_blocks, attention, head_dim, norm_groups)
        time_dim, last = 4 * channels[0], len(channels) - 1
        self.frequencies = channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.label = class_table(num_classes, time_dim) if num_classes else None

        def block(width_in: int, width_out: int) -> ResBlock:
            return ResBlock(width_in, width_out, time_dim, norm_groups, dropout)

        def maybe_attention(level: int) -> nn.Module:
            return Attention(channels[level], head_dim, norm_groups) if level in attention else nn.Identity()

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        skips = [width := channels[0]]
        self.down = nn.ModuleList()
        for level, out in enumerate(channels):
            blocks = nn.ModuleList()
            for _ in range(num_blocks):
                blocks.append(nn.ModuleList([block(width, out), maybe_attention(level)]))
                skips.append(width := out)
            downsample = nn.Conv2d(out, out, 3, stride=2, padding=1) if level < last else None
            if downsample:
                skips.append(out)
            self.down.append(_level(blocks, downsample))

        self.middle = nn.ModuleList(
            [block(width, width), Attention(width, head_dim, norm_groups), block(width, width)]
        )

        self.up = nn.ModuleList()
        for level in reversed(range(len(channels))):
            out, blocks = channels[level], nn.ModuleList()
            for _ in range(num_blocks + 1):
                blocks.append(nn.ModuleList([block(width + skips.pop(), out), maybe_attention(level)]))
                width = out
            upsample = nn.Conv2d(out, out, 3, padding=1) if level else None
            self.up.append(_level(blocks, upsample))

        self.norm_out = nn.GroupNorm(norm_groups, width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        _zero(self.conv_out)  # the network starts by predicting 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time(sinusoids(t, self.frequencies).to(self.conv_in.weight.dtype))
        emb = F.silu(add_class(emb, self.label, y))
        x = self.conv_in(x)
        skips = [x]
        level: Any  # a ModuleDict, which a ModuleList does not say
        for level in self.down:
            for block, attention in level["blocks"]:
                skips.append(x := attention(block(x, emb)))
            if "resize" in level:
                skips.append(x := level["resize"](x))
        first, attention, second = self.middle
        x = second(attention(first(x, emb)), emb)
        for level in self.up:
            for block, attention in level["blocks"]:
                x = attention(block(torch.cat([x, skips.pop()], dim=1), emb))
            if "resize" in level:
                x = level["resize"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.conv_out(normed(self.norm_out, x))
        return x


class ResBlock(nn.Module):
    """(N, in, H, W), embedding (N, E) → (N, out, H, W)."""

    def __init__(
        self, width_in: int, width_out: int, time_dim: int, norm_groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(norm_groups, width_in)
        self.conv_1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.time = nn.Linear(time_dim, width_out)
        self.norm_2 = nn.GroupNorm(norm_groups, width_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        _zero(self.conv_2)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h: Tensor = self.conv_1(normed(self.norm_1, x))
        h = self.conv_2(self.dropout(normed(self.norm_2, h, self.time(emb))))
        x = self.shortcut(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the pixels of (N, C, H, W), with residual (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, width: int, head_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.GroupNorm(norm_groups, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        _zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        pixels = normed(self.norm, x, silu=False).permute(0, 2, 3, 1)
        qkv = self.qkv(pixels.reshape(n, h * w, c))  # a view in channels_last
        q, k, v = qkv.view(n, h * w, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.out(_attend(q, k, v).transpose(1, 2).reshape(n, h * w, c))
        return x + mixed.view(n, h, w, c).permute(0, 3, 1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k' / sqrt(d)) v for (N, heads, tokens, d) (Vaswani et al. 2017, eq. 1).

    On a CPU, the backward pass of PyTorch's fused attention is up to 12 times slower in bf16 than in float32. Plain
    matrix products are fastest with wide heads, which suit the CPU's bf16 units, and few tokens, as weights are stored.
    """
    mixed: Tensor
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        mixed = F.scaled_dot_product_attention(q, k, v)
    elif q.shape[-1] >= WIDE_HEAD and q.shape[-2] <= FEW_TOKENS:
        mixed = torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1).to(v.dtype) @ v
    else:
        with torch.autocast("cpu", enabled=False):  # autocast would cast back to bf16
            mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return mixed


def _zero(layer: nn.Conv2d | nn.Linear) -> None:
    """Zero the last layer of a residual branch, so that the block starts as its shortcut.

    As in the code of Ho et al. (2020) and of Dhariwal & Nichol (2021).
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _level(blocks: nn.ModuleList, resize: nn.Module | None) -> nn.ModuleDict:
    return nn.ModuleDict({"blocks": blocks} if resize is None else {"blocks": blocks, "resize": resize})


def class_table(num_classes: int, width: int) -> nn.Embedding:
    """Return an nn.Embedding with a row for each class and a last one for "no label", N(0, 1) as usual.

    On the meta device nn.Embedding's own initialization would import torch's compiler, which takes two seconds.
    """
    table = torch.empty(num_classes + 1, width)
    if not table.is_meta:
        nn.init.normal_(table)
    return nn.Embedding(num_classes + 1, width, _weight=table)


def add_class(emb: Tensor, table: nn.Embedding | None, y: Tensor | None) -> Tensor:
    """Add the embedding of the labels y (N,) to emb (N, dim); that of "no label" where y is None.

    Raises ValueError for labels given to an unconditional network, which has no table.
    """
    if table is None:
        if y is not None:
            raise ValueError("labels given to an unconditional network")
        return emb
    if y is None:
        y = torch.full((len(emb),), table.num_embeddings - 1, device=emb.device)
    embedded: Tensor = table(y)
    return emb + embedded


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """Return cosines, then sines, of t (N,) at dim / 2 frequencies: (N, dim) float32.

    Frequencies fall from 1 to almost 1/10000 (Vaswani et al. 2017, section 3.5). Float32 under autocast, too: bf16
    tells apart only half of 1,000 times.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _check(
    image_size: int,
    channels: Sequence[int],
    num_blocks: int,
    attention: Sequence[int],
    head_dim: int,
    norm_groups: int,
) -> None:
    if not channels or num_blocks < 1:
        raise ValueError(
            f"channels={list(channels)}, num_blocks={num_blocks}: needs at least one level and one block"
        )
    factor = 2 ** (len(channels) - 1)
    if image_size % factor:
        low = image_size // factor * factor
        fit = (image_size & -image_size).bit_length()
        sizes = " and ".join(str(size) for size in (low, low + factor) if size)
        raise ValueError(
            f"channels={list(channels)}: {len(channels)} levels need an image_size that {factor} divides, "
            f"{image_size} is not one; the nearest are {sizes}, and {image_size} fits at most {fit} "
            f"level{'s' if fit > 1 else ''}"
        )
    for level, width in enumerate(channels):
        attends = level in attention or level == len(channels) - 1  # the middle, of the last level's width
        if width % norm_groups or width % 2 or (attends and width % head_dim):
            raise ValueError(
                f"channels={list(channels)}: {width} must be even and divisible by norm_groups={norm_groups}"
                + (f" and, with attention, by head_dim={head_dim}" if attends else "")
            )
    for level in attention:
        if not 0 <= level < len(channels):
            raise ValueError(f"attention={list(attention)}: levels run from 0 to {len(channels) - 1}")
