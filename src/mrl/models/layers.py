"""The parts of the MRL networks: norm, embedding, block."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from mrl.blocks import RegionalLocalMixer


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, eps 1e-5, computed in at least float32 (torch's kernels do so for 16-bit inputs)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the channels."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return nn.functional.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x) as silu(1.702 x) / 1.702, which keeps one map less for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Activates; in inference without a second map beside the result."""
        x = 1.702 * x
        if torch.is_grad_enabled():
            return nn.functional.silu(x) * (1 / 1.702)
        return nn.functional.silu(x, inplace=True).mul_(1 / 1.702)


class OverlapEmbed(nn.Module):
    """Overlapping convolutional embedding and its norm: (B, C, H, W) -> (B, H', W', C')."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int, **options: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding, **options)
        self.norm = LayerNorm(dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds an image or a map."""
        x = self.proj(x.contiguous(memory_format=torch.channels_last))  # (B, C', H', W')
        return self.norm(x.permute(0, 2, 3, 1))  # (B, H', W', C')


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), on (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        region_size: int,
        group_size: int,
        mlp_ratio: float,
        drop_path: float,
        mixer_args: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__()
        mixer_args = {"scale": dim**-0.5, **mixer_args}
        self.norm1 = LayerNorm(dim, **options)
        self.mixer = RegionalLocalMixer(dim, num_heads, region_size, group_size, **mixer_args, **options)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **options)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=QuickGELU, **options)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Mixes positions, then channels."""
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    @torch.no_grad()
    def fold_activation_(self) -> None:
        """Rewrites x * sigmoid(1.702 x) as silu(1.702 x) / 1.702: one pass, the factors inside the layers."""
        plain = type(self.mlp.fc1) is type(self.mlp.fc2) is nn.Linear  # not LoRA's: their weight is not all they do
        if plain and isinstance(self.mlp.act, QuickGELU):
            self.mlp.fc1.weight.mul_(1.702)
            self.mlp.fc1.bias.mul_(1.702)
            self.mlp.fc2.weight.div_(1.702)
            self.mlp.act = nn.SiLU(inplace=True)
