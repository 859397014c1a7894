"""Primitives of regional mixing: maps are (B, H, W, C), a region is (rows, cols), borders count what is real."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.errors import ConfigError

Region = tuple[int, int]


def region_pair(region_size: int | tuple[int, int]) -> Region:
    """`region_size` as (rows, cols).

    Args:
        region_size: positions along one side of a region, or (rows, cols); 1 keeps every position a token.

    Raises:
        ConfigError: not one or two whole numbers of at least 1.

    Example:
        >>> region_pair(2), region_pair((4, 2))
        ((2, 2), (4, 2))
    """
    sides = tuple(region_size) if isinstance(region_size, (tuple, list)) else (region_size, region_size)
    whole = [isinstance(side, numbers.Integral) and not isinstance(side, bool) for side in sides]
    if len(sides) != 2 or not all(whole):
        raise ConfigError(f"region_size={region_size!r}: give one whole number or (rows, cols), each 1 or more.")
    if min(sides) < 1:
        raise ConfigError(f"region_size={region_size!r}: a region has at least one position; use 1 or more.")
    return int(sides[0]), int(sides[1])


def region_grid(height: int, width: int, region: Region) -> tuple[int, int]:
    """How many regions cover a map: (Hr, Wr), the last row and column counted where they are ragged.

    Example:
        >>> region_grid(7, 8, (2, 4))
        (4, 2)
    """
    return -(-height // region[0]), -(-width // region[1])


def divisors(number: int) -> str:
    """The divisors of a number, as an error message lists them.

    Example:
        >>> divisors(6)
        '1, 2, 3 or 6'
    """
    *first, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(first)} or {last}" if first else last


def valid_counts(
    height: int,
    width: int,
    region: Region,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The number of real positions in each region.

    Shape:
        returns (Hr, Wr)

    Example:
        >>> valid_counts(3, 4, (2, 2)).tolist()
        [[4.0, 4.0], [2.0, 2.0]]
    """
    dtype = dtype or torch.get_default_dtype()
    rows, cols = region
    grid_h, grid_w = region_grid(height, width, region)
    valid_rows = (height - rows * torch.arange(grid_h, device=device)).clamp(max=rows)
    valid_cols = (width - cols * torch.arange(grid_w, device=device)).clamp(max=cols)
    return (valid_rows[:, None] * valid_cols).to(dtype)


def ragged_factor(height: int, width: int, region: Region, like: Tensor) -> Tensor:
    """What each region's depthwise sum is multiplied by: rows * cols / valid positions.

    Shape:
        returns (Hr, Wr, 1), in at least float32

    Example:
        >>> ragged_factor(3, 4, (2, 2), torch.ones(1)).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    counts = valid_counts(height, width, region, device=like.device, dtype=dtype)
    return (region[0] * region[1] / counts)[..., None]


def pad_to_regions(x: Tensor, region: Region) -> Tensor:
    """`x` with zeros on the right and bottom, up to a multiple of the region; `x` itself where nothing is missing.

    Shape:
        x: (B, H, W, C); returns (B, Hr * rows, Wr * cols, C)

    Example:
        >>> pad_to_regions(torch.ones(1, 3, 4, 1), (2, 2)).shape
        torch.Size([1, 4, 4, 1])
    """
    bottom, right = -x.shape[1] % region[0], -x.shape[2] % region[1]
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def region_mean(x: Tensor, region: Region) -> Tensor:
    """The mean of the valid positions of each region.

    Shape:
        x: (B, H, W, C); returns (B, Hr, Wr, C)

    Example:
        >>> region_mean(torch.arange(6.0).view(1, 2, 3, 1), (2, 2)).flatten().tolist()
        [2.0, 3.5]
    """
    _, height, width, dim = x.shape
    rows, cols = region
    grid_h, grid_w = region_grid(height, width, region)
    if (grid_h * rows, grid_w * cols) == (height, width):
        # Side by side rather than both at once: two inner reductions are fast in eager mode and in ONNX Runtime.
        x = x.reshape(-1, height, grid_w, cols, dim).mean(3) if cols > 1 else x
        return x.reshape(-1, grid_h, rows, grid_w, dim).mean(2) if rows > 1 else x
    dtype = torch.promote_types(x.dtype, torch.float32)
    counts = valid_counts(height, width, region, device=x.device, dtype=dtype)[..., None]
    total = pad_to_regions(x, region).reshape(-1, grid_h, rows, grid_w, cols, dim).sum((2, 4))
    return (total / counts).to(x.dtype)


def broadcast_regions(tokens: Tensor, height: int, width: int, region: Region) -> Tensor:
    """Gives every position its region's token.

    Shape:
        tokens: (B, Hr, Wr, C); returns (B, H, W, C)

    Example:
        >>> broadcast_regions(torch.tensor([2.0, 3.5]).view(1, 1, 2, 1), 2, 3, (2, 2)).flatten().tolist()
        [2.0, 2.0, 3.5, 2.0, 2.0, 3.5]
    """
    _, grid_h, grid_w, dim = tokens.shape
    rows, cols = region
    if region == (1, 1):
        return tokens
    full = tokens[:, :, None, :, None].expand(-1, -1, rows, -1, cols, -1)  # (B, Hr, rows, Wr, cols, C)
    full = full.reshape(-1, grid_h * rows, grid_w * cols, dim)
    return full if full.shape[1:3] == (height, width) else full[:, :height, :width]


def add_regions(source: Tensor, tokens: Tensor, region: Region, gain: float | Tensor = 1.0) -> Tensor:
    """Adds each region's token to its positions, gain * source + broadcast(tokens), without a broadcast map where they divide it.

    Args:
        source: the full-resolution map.
        tokens: one token a region.
        region: (rows, cols).
        gain: a number, or a tensor () or (C,).

    Shape:
        source: (B, H, W, C); tokens: (B, Hr, Wr, C); returns (B, H, W, C)

    Example:
        >>> source, tokens = torch.ones(1, 1, 4, 1), torch.tensor([2.0, 3.0]).view(1, 1, 2, 1)
        >>> add_regions(source, tokens, (1, 2), 0.5).flatten().tolist()
        [2.5, 2.5, 3.5, 3.5]
    """
    _, height, width, dim = source.shape
    rows, cols = region
    if region == (1, 1) or height % rows or width % cols:
        return _axpy(broadcast_regions(tokens, height, width, region), source, gain)
    cells = source.reshape(-1, height // rows, rows, width // cols, cols, dim)  # (B, Hr, rows, Wr, cols, C)
    return _axpy(tokens[:, :, None, :, None], cells, gain).reshape(source.shape)


def _axpy(y: Tensor, x: Tensor, gain: float | Tensor) -> Tensor:
    return gain * x + y if isinstance(gain, Tensor) else torch.add(y, x, alpha=gain)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: float,
    *,
    key_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention: softmax(scale * q k^T + key_bias) v, head by head.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        num_heads: heads that share the channels evenly.
        scale: factor on the logits.
        key_bias: added to the logits: (Nk,), or what broadcasts against (B, h, Nq, Nk); None keeps the fastest path.
        dropout_p: share of the attention weights that is dropped; pass 0 outside training.

    Shape:
        q: (B, Nq, C); k, v: (B, Nk, C); returns (B, Nq, C)

    Example:
        >>> q, k = torch.zeros(1, 1, 2), torch.zeros(1, 4, 2)
        >>> attend(q, k, torch.arange(8.0).view(1, 4, 2), 1, 1.0).flatten().tolist()
        [3.0, 4.0]
    """
    head_dim = q.shape[-1] // num_heads
    heads = [t.reshape(-1, t.shape[1], num_heads, head_dim).transpose(1, 2) for t in (q, k, v)]  # (B, h, N, d)
    if key_bias is not None:
        key_bias = key_bias.to(q.dtype)
        key_bias = key_bias[None, None, None] if key_bias.ndim == 1 else key_bias
    out = F.scaled_dot_product_attention(*heads, attn_mask=key_bias, dropout_p=dropout_p, scale=scale)  # (B, h, Nq, d)
    return out.transpose(1, 2).reshape(-1, q.shape[1], num_heads * head_dim)  # (B, Nq, C)


class RegionConv(nn.Conv2d):
    """One token a region: a depthwise convolution whose kernel and stride are the region, without bias.

    Ragged regions are padded with zeros on the right and bottom, and rescaled by rows * cols / valid positions.

    Args:
        dim: channels.
        region: (rows, cols).
        device: where the weight lives.
        dtype: of the weight.

    Shape:
        (B, H, W, C) -> (B, Hr, Wr, C)

    Example:
        >>> conv = RegionConv(2, (2, 2)).init_average_()
        >>> conv(torch.ones(1, 3, 4, 2)).detach().unique().tolist()
        [1.0]
    """

    def __init__(
        self, dim: int, region: Region, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        region = region_pair(region)
        super().__init__(dim, dim, region, stride=region, groups=dim, bias=False, device=device, dtype=dtype)

    @torch.no_grad()
    def init_average_(self) -> RegionConv:
        """Makes it the mean of the region's valid positions; returns itself."""
        self.weight.fill_(1 / (self.kernel_size[0] * self.kernel_size[1]))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Reduces a map to its region tokens."""
        _, height, width, _ = x.shape
        rows, cols = self.kernel_size
        padded = pad_to_regions(x, (rows, cols)).permute(0, 3, 1, 2)
        tokens = (self._wide(padded) if self._learns_in_half(x) else super().forward(padded)).permute(0, 2, 3, 1)
        if height % rows == 0 and width % cols == 0:
            return tokens
        return (tokens * ragged_factor(height, width, (rows, cols), x)).to(tokens.dtype)

    def _learns_in_half(self, x: Tensor) -> bool:
        """Whether this pass has a backward in half precision on a processor: there torch's is 10 to 20 times float32's."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or not (x.requires_grad or self.weight.requires_grad):
            return False
        half = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
        return half or x.dtype in (torch.bfloat16, torch.float16)

    def _wide(self, x: Tensor) -> Tensor:
        """The convolution in float32, its result in the format that it would have had."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.float(), self.weight.float(), stride=self.stride, groups=self.groups).to(dtype)


class RegionNorm(nn.BatchNorm2d):
    """BatchNorm over every axis but the last, computed in at least float32 whatever the input's type.

    The running statistics stay in at least float32 when the model is turned to half precision. In training, where it
    would see a single value a channel, it uses its running statistics instead of failing.

    Shape:
        (..., C) -> (..., C)

    Example:
        >>> norm = RegionNorm(2)
        >>> norm(torch.ones(1, 1, 1, 2)).shape
        torch.Size([1, 1, 1, 2])
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        super().__init__(dim, eps=eps, momentum=momentum, device=device, dtype=wide)
        self.to(dtype)  # the statistics stay wide

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RegionNorm:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.is_floating_point() and after.element_size() < 4:
                self._buffers[name] = buffer.to(after.device, torch.float32)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the channels of a map or of a list of tokens."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if self.training and x.numel() > x.shape[-1]:
            flat = x.to(dtype).reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, N, 1), channels last
            self.num_batches_tracked.add_(1)
            out = F.batch_norm(flat, self.running_mean, self.running_var, weight, bias, True, self.momentum, self.eps)
            return out.permute(0, 2, 3, 1).reshape(x.shape).to(x.dtype)
        if x.dtype != dtype and self.running_var.dtype == dtype:  # one kernel, which computes in float32
            flat = x.reshape(-1, x.shape[-1])
            out = F.batch_norm(flat, self.running_mean, self.running_var, weight, bias, False, self.momentum, self.eps)
            return out.reshape(x.shape)
        gain = weight * torch.rsqrt(self.running_var.to(dtype) + self.eps)
        return torch.addcmul(bias - self.running_mean.to(dtype) * gain, x.to(dtype), gain).to(x.dtype)


class LocalConv(nn.Conv2d):
    """The local mixing: a k x k convolution over the whole map, `group_size` channels a group.

    Args:
        dim: channels.
        kernel_size: odd; the padding is kernel_size // 2, so the map keeps its size.
        group_size: channels that are mixed together; 1 is depthwise, `dim` is dense.
        bias: whether it has one.
        stride: 1 keeps the map's size; s leaves every s-th position.
        device: where the weights live.
        dtype: of the weights.

    Shape:
        (B, H, W, C) -> (B, H, W, C), or (B, ceil(H / stride), ceil(W / stride), C)

    Raises:
        ConfigError: an even kernel, or a group size that does not divide the channels.

    Example:
        >>> x = torch.randn(1, 3, 5, 4)
        >>> torch.equal(LocalConv(4, group_size=2).init_delta_()(x), x)
        True
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        group_size: int = 1,
        *,
        bias: bool = True,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"LocalConv(kernel_size={kernel_size}): the local kernel is odd; use 1, 3, 5 or 7.")
        if group_size < 1 or dim % group_size:
            raise ConfigError(
                f"LocalConv(dim={dim}, group_size={group_size}): {dim} is not a multiple of {group_size}; "
                f"use {divisors(dim)}."
            )
        options: dict[str, Any] = {"stride": stride, "bias": bias, "device": device, "dtype": dtype}
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim // group_size, **options)

    @torch.no_grad()
    def init_delta_(self) -> LocalConv:
        """Makes it the identity: centre tap 1, everything else 0; returns itself."""
        channel = torch.arange(self.out_channels, device=self.weight.device)
        centre = self.kernel_size[0] // 2
        self.weight.zero_()
        self.weight[channel, channel % self.weight.shape[1], centre, centre] = 1
        if self.bias is not None:
            self.bias.zero_()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Mixes each position with its neighbours."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
