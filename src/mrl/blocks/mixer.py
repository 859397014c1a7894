"""The MRL block's mixer: softmax attention among region tokens, then a convolution over the re-assembled map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mrl.blocks.regions import (
    LocalConv,
    RegionConv,
    RegionNorm,
    attend,
    broadcast_regions,
    divisors,
    region_mean,
    region_pair,
    valid_counts,
)
from mrl.errors import ConfigError


class RegionalLocalMixer(nn.Module):
    """Mixes a map regionally (attention among region tokens) and locally (a convolution over all positions).

        q, k, v = BN(reduce(Linear(x)))
        u = local_gain * source + broadcast(softmax(scale * q k^T + log(valid / r^2)) v)
        y = proj(conv(u))

    With `region_size=1`, unit depthwise weights, identity norms, a gain of 0 and a delta convolution it is plain
    softmax attention.

    Args:
        dim: channels.
        num_heads: heads of the regional attention; divides `dim`.
        region_size: positions along one side of a region, or (rows, cols); 1 attends at full resolution.
        group_size: channels the local convolution mixes together; 1 is depthwise, `dim` is dense.
        kernel_size: of the local convolution, odd; 1 mixes nothing locally.
        qkv: "separate", three projections (the paper's main block).
        qkv_bias: whether the three projections have a bias.
        scale: factor on the logits; None is `head_dim ** -0.5`, the published networks use `dim ** -0.5`.
        local: "conv", the convolution of the paper's main block.
        local_gain: how much of the source is added to the regional tokens; 1 is the paper, 0 drops it.
        local_source: "input", the normed input (the paper), or "value", the full-resolution value projection.
        reduce: "depthwise", project each position, then a learned depthwise reduction (the paper), or "mean", average
            the regions first, then project: cheaper by the region's area.
        basis_drop: only the common projection has a basis to drop from; 0 here.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        learn_local_gain: None keeps the gain fixed; "scalar" or "channel" makes it a parameter that starts there.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        x: (B, H, W, C) -> (B, H, W, C); with prefix (B, P, C) -> the map and (B, P, C)

    Raises:
        ConfigError: an argument that is out of its range, or a variant that is not in this version.

    Reference:
        S. Mohta, H. Suganuma, Y. Tanaka, "MRL: Learning to Mix with Attention and Convolutions", arXiv:2208.13975.
        Ours: any height and width, `local_gain`, `local_source="value"`, `reduce="mean"`, `kernel_size`, prefix tokens.

    Example:
        >>> mixer = RegionalLocalMixer(dim=32, num_heads=4, region_size=2)
        >>> mixer(torch.randn(2, 7, 8, 32)).shape
        torch.Size([2, 7, 8, 32])
        >>> y, prefix = mixer(torch.randn(2, 8, 8, 32), torch.randn(2, 1, 32))
        >>> prefix.shape
        torch.Size([2, 1, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        region_size: int | tuple[int, int],
        group_size: int = 1,
        *,
        kernel_size: int = 3,
        qkv: str = "separate",
        qkv_bias: bool = True,
        scale: float | None = None,
        local: str = "conv",
        local_gain: float = 1.0,
        local_source: str = "input",
        reduce: str = "depthwise",
        basis_drop: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        learn_local_gain: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(
                f"RegionalLocalMixer(dim={dim}, num_heads={num_heads}): {dim} is not a multiple of {num_heads}; "
                f"use {divisors(dim)} heads."
            )
        _check_variant("qkv", qkv, ("separate",), later="common")
        _check_variant("local", local, ("conv",), later="p4m")
        _check_variant("local_source", local_source, ("input", "value"))
        _check_variant("reduce", reduce, ("depthwise", "mean"))
        _check_variant("learn_local_gain", learn_local_gain, (None, "scalar", "channel"))
        if basis_drop:
            raise ConfigError(
                f"RegionalLocalMixer(basis_drop={basis_drop}): qkv='separate' has no basis to drop from; use 0."
            )
        options = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        self.region_size = region_pair(region_size)
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.local_source, self.reduce = local_source, reduce
        for name in ("q", "k", "v"):
            self.add_module(f"{name}_proj", nn.Linear(dim, dim, bias=qkv_bias, **options))
        for name in ("q", "k", "v"):
            if reduce == "depthwise":
                self.add_module(f"{name}_conv", RegionConv(dim, self.region_size, **options))
            self.add_module(f"{name}_norm", RegionNorm(dim, **options))
        self.attn_drop = nn.Dropout(attn_drop)
        if learn_local_gain is None:
            self.local_gain = float(local_gain)
        else:
            shape = (dim,) if learn_local_gain == "channel" else ()
            self.local_gain = nn.Parameter(torch.full(shape, float(local_gain), **options))
        self.local = LocalConv(dim, kernel_size, group_size, **options)
        self.proj = nn.Linear(dim, dim, **options)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        """What the constructor was told and the children do not show."""
        gain = "learned" if isinstance(self.local_gain, nn.Parameter) else self.local_gain
        return (
            f"{self.dim}, num_heads={self.num_heads}, region_size={self.region_size}, scale={self.scale:.4g}, "
            f"local_gain={gain}, local_source={self.local_source!r}, reduce={self.reduce!r}"
        )

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mixes a normalised map; prefix tokens (CLS, registers) join the region tokens, the convolution skips them."""
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ConfigError(f"RegionalLocalMixer: got {tuple(x.shape)}; give a map (B, H, W, {self.dim}).")
        _, height, width, dim = x.shape
        q, k, v, source = self._project(x)
        grid_h, grid_w = q.shape[1:3]
        q, k, v = (t.reshape(-1, grid_h * grid_w, dim) for t in (q, k, v))  # (B, Hr*Wr, C)
        count = 0
        if prefix is not None:
            count = prefix.shape[1]
            extra = (self.q_proj(prefix), self.k_proj(prefix), self.v_proj(prefix))
            q, k, v = (torch.cat([p.to(t.dtype), t], dim=1) for p, t in zip(extra, (q, k, v), strict=True))
        drop = self.attn_drop.p if self.training else 0.0
        bias = self._key_bias(x, count)
        tokens = attend(q, k, v, self.num_heads, self.scale, key_bias=bias, dropout_p=drop)  # (B, P + Hr*Wr, C)
        regional = tokens[:, count:].reshape(-1, grid_h, grid_w, dim)
        u = broadcast_regions(regional, height, width, self.region_size)  # (B, H, W, C)
        if source is not None:
            u = self.local_gain * source + u
        y = self.proj_drop(self.proj(self.local(u)))
        if prefix is None:
            return y
        return y, self.proj_drop(self.proj(tokens[:, :count]))  # (B, H, W, C), (B, P, C)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Region tokens q, k, v (B, Hr, Wr, C) and the full-resolution source, None where its gain is fixed at 0."""
        fixed_zero = isinstance(self.local_gain, float) and self.local_gain == 0.0
        source = None if fixed_zero or self.local_source == "value" else x
        if self.reduce == "mean":
            pooled = region_mean(x, self.region_size)
            q, k, v = self.q_proj(pooled), self.k_proj(pooled), self.v_proj(pooled)
            if not fixed_zero and self.local_source == "value":
                source = self.v_proj(x)
        else:
            full = self.v_proj(x)
            q, k, v = self.q_conv(self.q_proj(x)), self.k_conv(self.k_proj(x)), self.v_conv(full)
            if not fixed_zero and self.local_source == "value":
                source = full
        # As a list of tokens, which SyncBatchNorm (after a conversion for DDP) reads the same way as our norm.
        q, k, v = (
            norm(t.reshape(-1, self.dim)).reshape(-1, *t.shape[1:])
            for norm, t in zip((self.q_norm, self.k_norm, self.v_norm), (q, k, v), strict=True)
        )
        return q, k, v, source

    def _key_bias(self, x: Tensor, prefix: int) -> Tensor | None:
        """What the number of positions behind each key adds to its logit; None where that is the same for every key."""
        _, height, width, _ = x.shape
        rows, cols = self.region_size
        ragged = height % rows or width % cols
        if not ragged and (not prefix or rows * cols == 1):
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        counts = valid_counts(height, width, self.region_size, device=x.device, dtype=dtype).flatten()
        if not prefix:
            return (counts / (rows * cols)).log()
        return torch.cat([counts.new_zeros(prefix), counts.log()])


def _check_variant(name: str, value: str | None, allowed: tuple[str | None, ...], later: str | None = None) -> None:
    if value in allowed:
        return
    choices = " or ".join(repr(choice) for choice in allowed)
    if later is not None and value == later:
        raise ConfigError(f"RegionalLocalMixer({name}={value!r}): this variant is not in this version; use {choices}.")
    raise ConfigError(f"RegionalLocalMixer({name}={value!r}): not known; use {choices}.")
