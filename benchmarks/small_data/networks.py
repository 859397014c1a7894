"""MRL-13 and what is left of it without its convolution or without its attention, for training from scratch."""

from __future__ import annotations

import timm
from torch import Tensor, nn

import mrl.models  # noqa: F401  registers mrl_13
from mrl.blocks import LocalConv
from mrl.models.layers import Block

NETWORKS = ("mrl", "attention", "convolution")
ABOUT = {
    "mrl": "mrl_13: attention among regions of 4, 4 and 2 positions, then a 3 x 3 convolution",
    "attention": "the same with attention among all positions and no convolution (region 1, local gain 0, kernel 1)",
    "convolution": "the same without attention: a 3 x 3 convolution with wider groups takes over the parameters of q, k and v",
}


class LocalOnly(nn.Module):
    """proj(conv(x)): the mixer without attention; groups of about a third of the channels cost what q, k and v did.

    3 C^2 weights of three projections are those of a 3 x 3 convolution whose groups have C / 3 channels more, and both cost as
    many multiply-adds a position. The nearest divisor of C is taken.

    Shape:
        (B, H, W, C) -> (B, H, W, C)

    Example:
        >>> import torch
        >>> LocalOnly(192, 3).conv.weight.shape, LocalOnly(192, 3)(torch.randn(1, 4, 4, 192)).shape
        (torch.Size([192, 64, 3, 3]), torch.Size([1, 4, 4, 192]))
    """

    def __init__(self, dim: int, group_size: int) -> None:
        super().__init__()
        wanted = dim / 3 + group_size
        width = min((w for w in range(1, dim + 1) if dim % w == 0), key=lambda w: abs(w - wanted))
        self.conv = LocalConv(dim, 3, width)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes locally, then channels."""
        return self.proj(self.conv(x))


def network(name: str) -> nn.Module:
    """One of `NETWORKS` with random weights and no head.

    Example:
        >>> sizes = {name: sum(p.numel() for p in network(name).parameters()) / 1e6 for name in NETWORKS}
        >>> {name: round(size, 1) for name, size in sizes.items()}
        {'mrl': 19.8, 'attention': 19.5, 'convolution': 19.5}
    """
    if name == "attention":
        args = {"local_gain": 0.0, "kernel_size": 1}
        return timm.create_model("mrl_13", num_classes=0, region_size=1, group_size=1, mixer_args=args)
    net = timm.create_model("mrl_13", num_classes=0)
    if name == "convolution":
        for module in list(net.modules()):
            if isinstance(module, Block):
                group = module.mixer.local.weight.shape[1]
                module.mixer = LocalOnly(module.mixer.dim, group)
                nn.init.trunc_normal_(module.mixer.proj.weight, std=0.02)
                nn.init.zeros_(module.mixer.proj.bias)
    return net
