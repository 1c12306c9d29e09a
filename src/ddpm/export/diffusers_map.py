"""Rename our U-Net's weights and settings for diffusers' `UNet2DModel`, which computes the same.

diffusers itself is not imported.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

# Our names → theirs, applied in this order: first where a layer is, then which one in its block.
_RULES = [
    (r"^time\.0\.", "time_embedding.linear_1."),
    (r"^time\.2\.", "time_embedding.linear_2."),
    (r"^label\.", "class_embedding."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.0\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.1\.", r"\1_blocks.\2.attentions.\3."),
    (r"^down\.(\d+)\.resize\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"^up\.(\d+)\.resize\.", r"up_blocks.\1.upsamplers.0.conv."),
    (r"^middle\.0\.", "mid_block.resnets.0."),
    (r"^middle\.1\.", "mid_block.attentions.0."),
    (r"^middle\.2\.", "mid_block.resnets.1."),
    (r"(resnets\.\d+)\.(norm|conv)_([12])\.", r"\1.\2\3."),
    (r"(resnets\.\d+)\.time\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.shortcut\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
]


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a `UNet`'s state dict to one for `UNet2DModel(**diffusers_config(...))`, sharing its tensors."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:  # we project to queries, keys and values at once
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".to_{part}.")] = chunk
        else:
            renamed[name] = tensor
    return renamed


def diffusers_config(
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
) -> dict[str, object]:
    """Return `UNet2DModel`'s keyword arguments for those of `UNet`. Its last class is our null label."""
    down = ["AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(channels))]
    up = ["AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(range(len(channels)))]
    return {
        "sample_size": image_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(channels),
        "layers_per_block": num_blocks,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "attention_head_dim": head_dim,
        "norm_num_groups": norm_groups,
        "dropout": dropout,
        "num_class_embeds": num_classes + 1 if num_classes else None,
    }
