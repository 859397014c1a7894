"""A literal transcription of the formulas of MRL, for timing and as a second opinion; never imported by the package.

Written from the paper's steps one after the other: maps are (B, C, H, W), every projection runs at full resolution, the
attention is written out, nothing is fused, folded or cached. Parameters have the names of `mrl.models`, so that one
state dict fits both. Regions divide the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPECS = {
    "mrl_13": ((64, 192, 384), (1, 2, 10), (1, 3, 6), (4, 4, 2), (1, 3, 6)),
    "mrl_21": ((64, 192, 384), (1, 4, 16), (1, 3, 6), (4, 4, 2), (1, 3, 6)),
    "mrl_tiny": ((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), (4, 4, 2, 1), (1, 2, 8, 4)),
    "mrl_small": ((96, 192, 384, 768), (2, 2, 18, 2), (1, 2, 4, 8), (4, 4, 2, 1), (2, 2, 16, 2)),
    "mrl_hovernet": ((96, 192, 384, 768), (2, 2, 8, 2), (1, 2, 4, 8), (4, 4, 2, 1), (1, 2, 4, 8)),
    "test_mrl": ((16, 32), (1, 2), (1, 2), (2, 2), (1, 2)),
}


def tokens(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return maps.flatten(2).transpose(1, 2).contiguous()


def maps(rows: Tensor, height: int) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W)."""
    return rows.transpose(1, 2).unflatten(2, (height, -1)).contiguous()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """softmax(scale q k^T) v on (B, N, C), head by head."""
    q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, h, N, d)
    return ((scale * q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Projection(nn.Module):
    """Steps 1 and 2 of one of q, k, v: linear, depthwise strided convolution, BatchNorm."""

    def __init__(self, dim: int, region: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, region, stride=region, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, rows: Tensor, height: int) -> Tensor:
        return self.norm(self.conv(maps(self.proj(rows), height)))


class Basis(nn.Module):
    """Steps 1 and 2 with a common basis: depthwise strided convolution, BatchNorm, 1x1 convolution; then q, k, v."""

    def __init__(self, dim: int, region: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, region, stride=region, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.proj = nn.Conv2d(dim, dim, 1)
        for name in "qkv":
            self.add_module(f"{name}_conv", nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(dim))

    def forward(self, rows: Tensor, height: int) -> list[Tensor]:
        basis = self.proj(self.norm(self.conv(maps(rows, height))))
        return [getattr(self, f"{n}_norm")(getattr(self, f"{n}_conv")(basis)) for n in "qkv"]


class Mixer(nn.Module):
    """The mixer of the paper on (B, H*W, C)."""

    def __init__(self, dim: int, num_heads: int, region: int, group_size: int, qkv: str = "separate") -> None:
        super().__init__()
        self.num_heads, self.region, self.scale, self.common = num_heads, region, dim**-0.5, qkv == "common"
        if self.common:
            self.basis = Basis(dim, region)
        else:
            for name in "qkv":
                self.add_module(name, Projection(dim, region))
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim // group_size)
        self.proj = nn.Linear(dim, dim)

    def forward(self, rows: Tensor, height: int) -> Tensor:
        parts = self.basis(rows, height) if self.common else [getattr(self, n)(rows, height) for n in "qkv"]
        small = parts[0].shape[2]
        regional = softmax_attention(*(tokens(p) for p in parts), self.num_heads, self.scale)
        regional = maps(regional, small).repeat_interleave(self.region, 2).repeat_interleave(self.region, 3)
        return self.proj(tokens(self.local(maps(rows, height) + regional)))


class Block(nn.Module):
    """x + mixer(norm(x)), x + mlp(norm(x)) on (B, H*W, C)."""

    def __init__(self, dim: int, num_heads: int, region: int, group_size: int, qkv: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = Mixer(dim, num_heads, region, group_size, qkv)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, rows: Tensor, height: int) -> Tensor:
        rows = rows + self.mixer(self.norm1(rows), height)
        hidden = self.fc1(self.norm2(rows))
        return rows + self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class Network(nn.Module):
    """A published network, written out; images whose sides are multiples of its strides and regions."""

    def __init__(self, name: str = "mrl_13", qkv: str = "separate", num_classes: int = 1000) -> None:
        super().__init__()
        self.embeds, self.norms, self.stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        previous = 3
        for i, (dim, depth, heads, region, group) in enumerate(zip(*SPECS[name], strict=True)):
            kernel, stride, padding = (7, 4, 2) if i == 0 else (3, 2, 1)
            self.embeds.append(nn.Conv2d(previous, dim, kernel, stride=stride, padding=padding))
            self.norms.append(nn.LayerNorm(dim))
            self.stages.append(nn.ModuleList(Block(dim, heads, region, group, qkv) for _ in range(depth)))
            previous = dim
        self.norm, self.head = nn.LayerNorm(previous), nn.Linear(previous, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for embed, norm, blocks in zip(self.embeds, self.norms, self.stages, strict=True):
            x = embed(x)
            height = x.shape[2]
            rows = norm(tokens(x))
            for block in blocks:
                rows = block(rows, height)
            x = maps(rows, height)
        return self.head(self.norm(rows).mean(1))


def from_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a published network of `mrl.models` with the names above, for a strict load."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("head.fc.", "head.")
        if key.startswith("stages."):
            _, stage, rest = key.split(".", 2)
            part, rest = rest.split(".", 1)
            if part == "patch_embed":
                kind, rest = rest.split(".", 1)
                key = f"{'embeds' if kind == 'proj' else 'norms'}.{stage}.{rest}"
            else:
                key = f"stages.{stage}.{rest.replace('mlp.', '')}"
                if ".basis." not in key and ".mixer." in key:
                    for n in "qkv":
                        for what in ("proj", "conv", "norm"):
                            key = key.replace(f".mixer.{n}_{what}.", f".mixer.{n}.{what}.")
        if key.endswith("basis.proj.weight"):
            value = value[:, :, None, None]
        renamed[key] = value
    return renamed
