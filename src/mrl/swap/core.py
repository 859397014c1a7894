"""The regional attention that takes the place of a softmax attention, given somebody else's projections."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mrl.blocks.regions import (
    LocalConv,
    RegionConv,
    RegionNorm,
    attend,
    broadcast_regions,
    region_mean,
    valid_counts,
)
from mrl.errors import SwapError
from mrl.swap.config import SwapConfig
from mrl.swap.grid import Grid

Project = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Norm = Callable[[Tensor], Tensor]


class Shift(nn.Module):
    """What is left of a folded norm: x + shift.

    Example:
        >>> Shift(torch.ones(2))(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Adds it."""
        return x + self.shift


class RegionCore(nn.Module):
    """Regional attention and local convolution between inherited projections.

    q, k, v of the patch tokens are reduced to one token a region; region (and prefix) tokens attend to each other; each
    position receives its region's token, plus `local_gain` times the local source; a small convolution mixes locally.
    Prefix tokens (CLS, registers) attend to every position as before (`prefix="exact"`) or go with the region tokens.
    With regions of 1 x 1 and the parameters it starts from, this is softmax attention.

    Args:
        dim: width A of q, k and v together.
        num_heads: attention heads.
        scale: factor of the logits, inherited from the replaced module.
        region: (rows, columns) of a region, in positions.
        num_prefix_tokens: leading tokens that are not on the grid.
        config: the choices of the swap.
        grid: where (H, W) comes from.
        queries_only: the network reduces keys and values itself (PVT, SegFormer, CvT): only q is pooled, by `query`.
        device: of the new parameters.
        dtype: of the new parameters.

    Shape:
        tokens (B, N, C) with N = P + H * W -> (B, N, A).

    Raises:
        SwapError: channels that `group_size` does not divide.

    Reference:
        arXiv:2208.13975; differs in its start (average regions, identity norms, delta convolution), prefix tokens and ragged edges.

    Example:
        >>> core = RegionCore(8, 2, 0.5, (2, 2), 1, SwapConfig(), Grid((2, 3)))
        >>> core(torch.randn(1, 7, 8), lambda x: (x, x, x)).shape
        torch.Size([1, 7, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        scale: float,
        region: tuple[int, int],
        num_prefix_tokens: int,
        config: SwapConfig,
        grid: Grid,
        *,
        queries_only: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % config.group_size:
            raise SwapError(f"SwapConfig(group_size={config.group_size}): {dim} channels are not a multiple of it.")
        self.dim, self.num_heads, self.scale, self.region = dim, num_heads, scale, region
        self.num_prefix_tokens, self.config, self.grid = num_prefix_tokens, config, grid
        self.attn_drop, self.reduced = 0.0, "q" if queries_only else "qkv"
        new = {"device": device, "dtype": dtype}
        depthwise = config.reduce == "depthwise"
        for name in self.reduced:
            self.add_module(f"reduce_{name}", RegionConv(dim, region, **new) if depthwise else None)
            self.add_module(f"norm_{name}", RegionNorm(dim, device=device))
        self.local = LocalConv(dim, config.kernel_size, config.group_size, **new)
        gain = config.local_gain
        if config.learn_local_gain is not None:
            size = dim if config.learn_local_gain == "channel" else 1
            gain = nn.Parameter(torch.full((size,), float(gain), **new))
        self.local_gain = gain
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Average regions, neutral norms, a delta convolution."""
        for name in self.reduced:
            conv, norm = getattr(self, f"reduce_{name}"), getattr(self, f"norm_{name}")
            if conv is not None:
                conv.init_average_()
            with torch.no_grad():
                norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps))
                norm.bias.copy_(norm.running_mean)
        self.local.init_delta_()

    @torch.no_grad()
    def fold_(self) -> RegionCore:
        """The inference form: each norm goes into the region convolution before it, and a shift is left; returns itself.

        Without such a convolution (`reduce="mean"`) the norm stays: the projection before it serves other tokens too.

        Raises:
            SwapError: it is folded already, or a norm is not ours (SyncBatchNorm: fold before converting).
        """
        if any(isinstance(m, Shift) for m in self.children()):
            raise SwapError("fold_: this mixer is folded already.")
        parts = {n: (getattr(self, f"reduce_{n}"), getattr(self, f"norm_{n}")) for n in self.reduced}
        for name, (_, norm) in parts.items():
            if not isinstance(norm, RegionNorm):
                raise SwapError(f"fold_: norm_{name} is a {type(norm).__name__}; fold before converting the norms.")
        for name, (conv, norm) in parts.items():
            if conv is not None:
                gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
                conv.weight.copy_(conv.weight * gain[:, None, None, None])
                shift = (norm.bias.double() - norm.running_mean.double() * gain).to(conv.weight.dtype)
                setattr(self, f"norm_{name}", Shift(shift))
        return self.eval()

    @property
    def full_resolution(self) -> bool:
        """Whether q, k and v of every position are needed."""
        c = self.config
        return (
            c.reduce == "depthwise" or c.local_source == "value" or (c.prefix == "exact" and self.num_prefix_tokens > 0)
        )

    def forward(
        self,
        x: Tensor,
        project: Project,
        norms: tuple[Norm, Norm] | None = None,
        mask: Tensor | None = None,
        rotate: Norm | None = None,
        *,
        size: tuple[int, int] | None = None,
        source: Tensor | None = None,
        region_bias: Tensor | None = None,
    ) -> Tensor:
        """Mixes the tokens.

        Args:
            x: the module's input, (B, N, C).
            project: the inherited projections, tokens (B, n, C) -> q, k, v (B, n, A) each.
            norms: inherited norms of q and k, (B, n, A) -> same.
            mask: an additive or boolean attention mask that broadcasts to (B, heads, N, N).
            rotate: the rotary positions of q and k at full resolution, (B, N, A) -> same; it comes before the pooling.
            size: (H, W) where the call itself tells; None asks the grid.
            source: the module's input where `x` carries more than it, (B, N, C).
            region_bias: added to the logits of region tokens, (1, heads, R, R).
        """
        prefix = self.num_prefix_tokens
        height, width = size or self.grid.size(x.shape[1] - prefix)
        norm_q, norm_k = norms or (nn.Identity(), nn.Identity())
        full = None
        early = self.config.reduce == "depthwise" or rotate is not None  # norms before the pooling, or after it
        if self.full_resolution or rotate is not None:
            q, k, v = full = project(x)
            if early:
                q, k = norm_q(q), norm_k(k)
                q, k = (q, k) if rotate is None else (rotate(q), rotate(k))
                full = (q, k, v)
            tokens = [self._reduce(t, name, height, width) for t, name in zip((q, k, v), "qkv", strict=True)]
        else:
            pooled = region_mean(x[:, prefix:].unflatten(1, (height, width)), self.region).flatten(1, 2)
            tokens = [
                self._normed(t, name)
                for t, name in zip(project(torch.cat([x[:, :prefix], pooled], 1)), "qkv", strict=True)
            ]
        if not early:
            tokens[0], tokens[1] = norm_q(tokens[0]), norm_k(tokens[1])
            if full is not None:
                full = (norm_q(full[0][:, :prefix]), norm_k(full[1]), full[2]) if prefix else full
        region_out, prefix_out = self._attend(tokens, full, mask, height, width, region_bias)
        inputs = x if source is None else source
        value = inputs if full is None or self.config.local_source == "input" else full[2]
        out = self._local(value[:, prefix:], region_out, height, width)
        return out if prefix_out is None else torch.cat([prefix_out, out], 1)

    def query(
        self, x: Tensor, project: Norm, k: Tensor, v: Tensor, source: Tensor, size: tuple[int, int], mask: Tensor | None
    ) -> Tensor:
        """Mixes where the network reduced keys and values itself: only the queries become one a region.

        What precedes the H * W positions in `x` are prefix tokens; they keep their own queries, so their rows stay exact.
        The local source is the module's input, because values exist at the network's own resolution only.

        Args:
            x: what the queries are projected from, (B, P + H * W, C).
            project: the inherited projection, (B, n, C) -> (B, n, A).
            k: keys, (B, M, A).
            v: values, (B, M, A).
            source: the module's input, (B, P + H * W, A).
            size: (H, W).
            mask: additive or boolean, broadcasting to (B, heads, N, M).

        Returns:
            (B, P + H * W, A).
        """
        height, width = size
        prefix = x.shape[1] - height * width
        if prefix < 0:
            raise SwapError(
                f"{x.shape[1]} tokens came with a grid of {height} x {width}; tokens were dropped on the way."
            )
        head = project(x[:, :prefix]) if prefix else None
        conv, patches = self.reduce_q, x[:, prefix:]
        if conv is None:
            regions = project(region_mean(patches.unflatten(1, size), self.region).flatten(1, 2))
        else:
            regions = conv(project(patches).unflatten(1, size)).flatten(1, 2)
        q = self._norm("q", regions)
        q = q if head is None else torch.cat([head, q], 1)
        if mask is not None:
            mask = _additive(mask, torch.float32)
            if mask.shape[-2] > 1:
                mask = torch.log(self._averages(height, width, q, prefix) @ torch.exp(mask.clamp(min=-1e30)))
        drop = self.attn_drop if self.training else 0.0
        out = attend(q, k, v, self.num_heads, self.scale, key_bias=mask, dropout_p=drop)
        mixed = self._local(source[:, prefix:], out[:, prefix:], height, width)
        return torch.cat([out[:, :prefix], mixed], 1) if prefix else mixed

    def _reduce(self, t: Tensor, name: str, height: int, width: int) -> Tensor:
        """Full-resolution tokens (B, P + H*W, A) -> prefix and region tokens (B, P + R, A)."""
        prefix = self.num_prefix_tokens
        conv = getattr(self, f"reduce_{name}")
        patches = t[:, prefix:].unflatten(1, (height, width))
        regions = conv(patches) if conv is not None else region_mean(patches, self.region)
        regions = self._norm(name, regions.flatten(1, 2))
        return torch.cat([t[:, :prefix], regions], 1) if prefix else regions

    def _norm(self, name: str, regions: Tensor) -> Tensor:
        """The norm of q, k or v on region tokens (B, R, A), as a list that SyncBatchNorm (after a conversion) reads the same way."""
        return getattr(self, f"norm_{name}")(regions.flatten(0, 1)).view_as(regions)

    def _normed(self, t: Tensor, name: str) -> Tensor:
        """Projected prefix and region tokens with the norm on the region tokens."""
        prefix = self.num_prefix_tokens
        regions = self._norm(name, t[:, prefix:])
        return torch.cat([t[:, :prefix], regions], 1) if prefix else regions

    def _attend(
        self,
        tokens: list[Tensor],
        full: tuple[Tensor, ...] | None,
        mask: Tensor | None,
        height: int,
        width: int,
        region_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of region tokens, and of prefix tokens as the configuration says."""
        prefix, q = self.num_prefix_tokens, tokens[0]
        exact = prefix > 0 and self.config.prefix == "exact"
        drop = self.attn_drop if self.training else 0.0
        bias = self._key_bias(height, width, q)
        if region_bias is not None:
            bias = (region_bias if bias is None else region_bias + bias).to(q.dtype)
        if mask is not None:
            pooled = _pool_mask(mask, self._averages(height, width, q, prefix))
            bias = (pooled if bias is None else pooled + bias).to(q.dtype)
        if exact:
            own = bias[..., prefix:, :] if mask is not None else bias
            regions = attend(q[:, prefix:], *tokens[1:], self.num_heads, self.scale, key_bias=own, dropout_p=drop)
            rows = None if mask is None else _additive(mask, q.dtype)[..., :prefix, :]
            head = attend(full[0][:, :prefix], *full[1:], self.num_heads, self.scale, key_bias=rows, dropout_p=drop)
            return regions, head
        out = attend(q, *tokens[1:], self.num_heads, self.scale, key_bias=bias, dropout_p=drop)
        return out[:, prefix:], out[:, :prefix] if prefix else None

    def _key_bias(self, height: int, width: int, like: Tensor) -> Tensor | None:
        """log(valid positions) of each region's key beside prefix keys; relative to a full region without them."""
        ragged = height % self.region[0] or width % self.region[1]
        prefix, area = self.num_prefix_tokens, self.region[0] * self.region[1]
        if area == 1 or not (prefix or ragged):
            return None
        counts = valid_counts(height, width, self.region, device=like.device, dtype=torch.float32).flatten()
        bias = torch.log(counts if prefix else counts / area)
        return torch.cat([bias.new_zeros(prefix), bias]).to(like.dtype)

    def _averages(self, height: int, width: int, like: Tensor, prefix: int) -> Tensor:
        """The (P + R, P + H*W) matrix that averages the valid positions of each region and copies prefix tokens."""
        rows, cols = self.region
        across = math.ceil(width / cols)
        y = torch.arange(height, device=like.device) // rows
        x = torch.arange(width, device=like.device) // cols
        owner = (y[:, None] * across + x[None]).flatten() + prefix
        owner = torch.cat([torch.arange(prefix, device=like.device), owner])
        member = torch.nn.functional.one_hot(owner).T.to(torch.float32)
        return member / member.sum(1, keepdim=True)

    def _local(self, source: Tensor, regions: Tensor, height: int, width: int) -> Tensor:
        """Broadcast to every position, add the local source (B, H*W, A), convolve: (B, R, A) -> (B, H*W, A)."""
        rows = math.ceil(height / self.region[0])
        mixed = broadcast_regions(regions.unflatten(1, (rows, -1)), height, width, self.region)
        if isinstance(self.local_gain, Tensor) or self.local_gain != 0:
            mixed = mixed + self.local_gain * source.unflatten(1, (height, width))
        return self.local(mixed).flatten(1, 2)

    def extra_repr(self) -> str:
        """The region and the choices, for `print(model)`."""
        c = self.config
        return f"region={self.region}, reduce={c.reduce}, source={c.local_source}, prefix={c.prefix}"


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def _pool_mask(mask: Tensor, averages: Tensor) -> Tensor:
    """The log of the mean of exp(mask) over the pairs of two regions, up to a constant a query, which softmax ignores."""
    logits = _additive(mask, torch.float32)
    logits = logits.expand(*logits.shape[:-2], logits.shape[-1], -1)
    logits = logits - logits.amax(dim=-1, keepdim=True).clamp(min=-1e30)
    return torch.log(averages @ torch.exp(logits) @ averages.T)
