"""A projection and the depthwise reduction after it, composed into one linear map of a region's positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mrl.blocks.regions import Region, region_grid


def compose(weight: Tensor, taps: Tensor) -> Tensor:
    """The weight of "project, then reduce": out[c, (p, i)] = taps[c, p] * weight[c, i].

    Args:
        weight: of the projection.
        taps: of the depthwise convolution, one kernel a channel.

    Shape:
        weight: (C, I); taps: (C, 1, rows, cols); returns (C, rows * cols * I)

    Example:
        >>> compose(torch.ones(1, 2), torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)).tolist()
        [[3.0, 3.0, 4.0, 4.0]]
    """
    return (taps.flatten(1)[:, :, None] * weight[:, None, :]).flatten(1)


def region_patches(x: Tensor, region: Region) -> Tensor:
    """The positions of each region side by side, row by row; regions divide the map.

    Shape:
        x: (B, H, W, C); returns (B, Hr, Wr, rows * cols * C)

    Example:
        >>> region_patches(torch.arange(8.0).view(1, 2, 4, 1), (2, 2)).tolist()
        [[[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]]
    """
    _, height, width, dim = x.shape
    rows, cols = region
    cells = x.reshape(-1, height // rows, rows, width // cols, cols, dim).transpose(2, 3)  # (B, Hr, Wr, rows, cols, C)
    return cells.reshape(-1, height // rows, width // cols, rows * cols * dim)


def unpatch(patches: Tensor, region: Region) -> Tensor:
    """The map that `region_patches` came from: its inverse.

    Shape:
        patches: (B, Hr, Wr, rows * cols * C); returns (B, H, W, C)

    Example:
        >>> x = torch.randn(1, 4, 6, 2)
        >>> torch.equal(unpatch(region_patches(x, (2, 3)), (2, 3)), x)
        True
    """
    _, grid_h, grid_w, flat = patches.shape
    rows, cols = region
    cells = patches.reshape(-1, grid_h, grid_w, rows, cols, flat // (rows * cols)).transpose(2, 3)
    return cells.reshape(-1, grid_h * rows, grid_w * cols, flat // (rows * cols))


def region_linear(x: Tensor, weight: Tensor, region: Region) -> Tensor:
    """One linear map of each region's positions; for the backward pass it keeps `x` itself, not a copy in patches.

    Under autocast it multiplies in autocast's number format.

    Args:
        x: the map; regions divide it.
        weight: as `compose` makes it.
        region: (rows, cols).

    Shape:
        x: (B, H, W, C); weight: (D, rows * cols * C); returns (B, Hr, Wr, D)

    Example:
        >>> weight = compose(torch.ones(1, 1), torch.ones(1, 1, 2, 2))
        >>> region_linear(torch.arange(8.0).view(1, 2, 4, 1), weight, (2, 2)).flatten().tolist()
        [10.0, 18.0]
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RegionLinear.apply(x, weight, region)
    return F.linear(region_patches(x, region), weight)


class _RegionLinear(torch.autograd.Function):
    """F.linear on patches that recomputes the patches, a copy of the map, in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, region: Region) -> Tensor:
        return F.linear(region_patches(x, region), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.region = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = unpatch(grad @ weight, ctx.region)
        if ctx.needs_input_grad[1]:
            patches = region_patches(x, ctx.region)
            grad_weight = grad.reshape(-1, grad.shape[-1]).T @ patches.reshape(-1, patches.shape[-1])
        return grad_x, grad_weight, None


def tap_sums(taps: Tensor, height: int, width: int) -> Tensor:
    """The sum of each kernel's taps that lie on the map, region by region.

    Shape:
        taps: (C, 1, rows, cols); returns (Hr, Wr, C)

    Example:
        >>> tap_sums(torch.ones(1, 1, 2, 2), 3, 4).flatten().tolist()
        [4.0, 4.0, 2.0, 2.0]
    """
    rows, cols = taps.shape[2:]
    grid_h, grid_w = region_grid(height, width, (rows, cols))
    on_rows = torch.arange(grid_h * rows, device=taps.device).view(grid_h, rows) < height
    on_cols = torch.arange(grid_w * cols, device=taps.device).view(grid_w, cols) < width
    on_map = on_rows[:, None, :, None] & on_cols[None, :, None, :]  # (Hr, Wr, rows, cols)
    return on_map.flatten(2).to(taps.dtype) @ taps.flatten(1).T
