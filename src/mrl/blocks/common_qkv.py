"""Queries, keys and values from one common basis, and the attention without regions that is built on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.blocks.regions import LocalConv, RegionConv, RegionNorm, attend, divisors, region_mean
from mrl.errors import ConfigError


class CommonBasis(nn.Module):
    """q, k and v as three cheap views of one basis.

        basis = dropout(Linear(BN(reduce(x))));   q, k, v = BN(depthwise3x3(basis)), each with its own

    Args:
        dim: channels.
        region: (rows, cols) that become one position of the basis; None keeps every position and reduces nothing: a
            depthwise 3 x 3 convolution takes the place of the reduction.
        reduce: "depthwise", a learned reduction, or "mean", the mean of the region, without parameters.
        kv_stride: of the convolutions of k and v.
        bias: whether the linear layer has one.
        drop: rate at which whole channels of the basis are dropped in training.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        (B, H, W, C) -> q (B, Hr, Wr, C), k and v (B, Hr', Wr', C) with Hr' = ceil(Hr / kv_stride)

    Example:
        >>> q, k, v = CommonBasis(4, (2, 2))(torch.randn(1, 5, 6, 4))
        >>> q.shape
        torch.Size([1, 3, 3, 4])
    """

    def __init__(
        self,
        dim: int,
        region: tuple[int, int] | None,
        *,
        reduce: str = "depthwise",
        kv_stride: int = 1,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.region, self.kv_stride, self.drop = region, kv_stride, drop
        if region is None:
            self.conv = LocalConv(dim, 3, bias=False, **options)
        else:
            self.conv = RegionConv(dim, region, **options) if reduce == "depthwise" else None
        self.norm = RegionNorm(dim, **options)
        self.proj = nn.Linear(dim, dim, bias=bias, **options)
        for name in "qkv":
            stride = 1 if name == "q" else kv_stride
            self.add_module(f"{name}_conv", LocalConv(dim, 3, bias=False, stride=stride, **options))
            self.add_module(f"{name}_norm", RegionNorm(dim, **options))

    def extra_repr(self) -> str:
        """What the children do not show."""
        return f"region={self.region}, kv_stride={self.kv_stride}, drop={self.drop}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three maps."""
        basis = self.proj(_normed(self.norm, reduce_map(x, self.conv, self.region)))  # (B, Hr, Wr, C)
        if self.training and self.drop:
            basis = F.dropout2d(basis.permute(0, 3, 1, 2), self.drop).permute(0, 2, 3, 1)
        q, k, v = (_normed(getattr(self, f"{n}_norm"), getattr(self, f"{n}_conv")(basis)) for n in "qkv")
        return q, k, v


class CommonQKVAttention(nn.Module):
    """Softmax attention among all positions whose q, k and v come from a common basis: no regions, no local mixing.

        q, k, v = BN(depthwise3x3(Linear(BN(depthwise3x3(x)))));   y = proj(softmax(scale * q k^T) v)

    Args:
        dim: channels.
        num_heads: heads of the attention; divides `dim`.
        kv_stride: stride of the convolutions of k and v; 2 leaves a quarter of the keys.
        qkv_bias: whether the basis' linear layer has a bias.
        scale: factor on the logits; None is `dim ** -0.5`, as published.
        basis_drop: rate at which whole channels of the basis are dropped in training.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        (B, H, W, C) -> (B, H, W, C)

    Raises:
        ConfigError: heads that do not divide the channels, or a stride below 1.

    Reference:
        S. Mohta, H. Suganuma, Y. Tanaka, "MRL: Learning to Mix with Attention and Convolutions", arXiv:2208.13975, the
        appendix's baseline.

    Example:
        >>> CommonQKVAttention(8, 2, kv_stride=2)(torch.randn(1, 5, 6, 8)).shape
        torch.Size([1, 5, 6, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_stride: int = 1,
        qkv_bias: bool = True,
        scale: float | None = None,
        basis_drop: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads("CommonQKVAttention", dim, num_heads)
        if kv_stride < 1:
            raise ConfigError(f"CommonQKVAttention(kv_stride={kv_stride}): use 1 or more.")
        options = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        self.scale = dim**-0.5 if scale is None else scale
        self.register_module("folded", None)
        self.basis = CommonBasis(dim, None, kv_stride=kv_stride, bias=qkv_bias, drop=basis_drop, **options)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **options)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        """What the constructor was told and the children do not show."""
        return f"{self.dim}, num_heads={self.num_heads}, scale={self.scale:.4g}"

    def fold_(self) -> CommonQKVAttention:
        """Turns it into its inference form, in place: the norms go into the layers beside them; returns itself.

        Raises:
            ConfigError: it is folded already.

        Example:
            >>> attention, x = CommonQKVAttention(8, 2).eval(), torch.randn(1, 4, 4, 8)
            >>> y = attention(x)
            >>> torch.allclose(attention.fold_()(x), y, atol=1e-5)
            True
        """
        from mrl.blocks.fold import fold_

        return fold_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the positions of a normalised map."""
        check_map("CommonQKVAttention", x, self.dim)
        maps = self.basis(x) if self.folded is None else self.folded(x)[0]
        q, k, v = (t.flatten(1, 2) for t in maps)  # (B, H*W, C), (B, Nk, C), (B, Nk, C)
        drop = self.attn_drop.p if self.training else 0.0
        y = attend(q, k, v, self.num_heads, self.scale, dropout_p=drop).reshape(x.shape)  # (B, H, W, C)
        return self.proj_drop(self.proj(y))


def reduce_map(x: Tensor, conv: nn.Module | None, region: tuple[int, int] | None) -> Tensor:
    """A map at its basis' resolution: by a convolution, or the mean of each region where there is none."""
    return region_mean(x, region) if conv is None else conv(x)


def check_heads(who: str, dim: int, num_heads: int) -> None:
    """Raises ConfigError where the heads do not share the channels evenly."""
    if num_heads < 1 or dim % num_heads:
        raise ConfigError(
            f"{who}(dim={dim}, num_heads={num_heads}): {dim} is not a multiple of {num_heads}; use {divisors(dim)} heads."
        )


def check_map(who: str, x: Tensor, dim: int) -> None:
    """Raises ConfigError where `x` is not a map (B, H, W, dim)."""
    if x.ndim != 4 or x.shape[-1] != dim:
        raise ConfigError(f"{who}: got {tuple(x.shape)}; give a map (B, H, W, {dim}).")


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """As a list of tokens, which SyncBatchNorm (after a conversion for DDP) reads the same way as our norm."""
    return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
