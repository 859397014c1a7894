"""Windowed attention: timm's and torchvision's Swin and SwinV2, transformers' Swin.

Windows and shifts go: MRL mixes the whole grid. What is kept is the relative position bias, read between the first positions of
two regions; V1 tables stop at the window's reach, where the last entry goes on, and V2's small network is asked at any
distance. With regions of 1 x 1 on a grid of one window this is the original; on a larger grid it sees farther.
Where windows are cut outside the attention module (timm, transformers), the block's class is exchanged as well, so that it hands
the whole grid over.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from typing import Any

import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from torchvision.models import swin_transformer as torchvision_swin

from mrl.blocks.regions import region_grid
from mrl.errors import SwapError
from mrl.swap.adapters import Site
from mrl.swap.adapters.base import AdapterBase, Swapped, device_hook, fused_qkv, headwise
from mrl.swap.adapters.transformers_vit import OLD, hf_kind
from mrl.swap.config import SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid

TIMM = {
    swin_transformer.WindowAttention: swin_transformer.SwinTransformerBlock,
    swin_transformer_v2.WindowAttention: swin_transformer_v2.SwinTransformerV2Block,
}
TORCHVISION = (torchvision_swin.ShiftedWindowAttention, torchvision_swin.ShiftedWindowAttentionV2)


class SwappedWindowAttention(Swapped):
    """A windowed attention with MRL over the whole grid inside; `tupled` returns (output, None).

    Shape:
        (B, H, W, C) -> (B, H, W, C)
    """

    inherited = (
        *("qkv", "q_proj", "k_proj", "v_proj", "o_proj", "proj", "attn_drop", "proj_drop", "cpb_mlp"),
        *("softmax", "relative_position_bias"),
    )
    own = (
        *("q_bias", "k_bias", "v_bias", "logit_scale"),
        *("relative_position_bias_table", "relative_coords_table", "relative_position_index"),
    )

    def __init__(self, original: nn.Module, core: RegionCore) -> None:
        super().__init__(original, core)
        self.tupled = bool(hf_kind(original))
        self.window = _window(original)
        drop = getattr(original, "attention_dropout", getattr(original, "attn_drop", 0.0))
        core.attn_drop = float(getattr(drop, "p", drop))

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Mixes the whole grid (a mask of windows is not needed)."""
        _, height, width, _ = x.shape
        if self.mrl.config.bias == "error":
            raise SwapError(
                "SwapConfig(bias='error'): this model has relative position biases; use bias='pool', which reads them "
                "between regions."
            )
        norms = (self._cosine_q, self._cosine_k) if self.logit_scale is not None else None
        bias = self.region_bias(height, width)
        y = self.mrl(x.flatten(1, 2), self._project, norms, size=(height, width), region_bias=bias)
        y = (self.o_proj if self.tupled else self.proj)(y)
        if self.proj_drop is not None:
            y = self.proj_drop(y)
        else:
            y = nn.functional.dropout(y, float(self.original.get("dropout", 0.0)), self.training)
        y = y.unflatten(1, (height, width))
        return (y, None) if self.tupled else y

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.tupled:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_bias is not None:
            return fused_qkv(self, x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.logit_scale is not None and self.qkv.bias is not None:  # torchvision's V2 leaves the bias of k out
            k = k - self.qkv.bias.chunk(3)[1].to(k.dtype)
        return q, k, v

    def _cosine_q(self, t: Tensor) -> Tensor:
        factor = self.logit_scale.clamp(max=math.log(100.0)).exp().flatten()[:, None]
        return headwise(lambda q: nn.functional.normalize(q, dim=-1) * factor, self.mrl.num_heads)(t)

    def _cosine_k(self, t: Tensor) -> Tensor:
        return headwise(lambda k: nn.functional.normalize(k, dim=-1), self.mrl.num_heads)(t)

    def region_bias(self, height: int, width: int) -> Tensor:
        """The relative position bias between regions, (1, heads, R, R)."""
        table = self._table(height, width)  # (2 Hr - 1, 2 Wr - 1, heads), by the distance in regions
        table = table - table.amax((0, 1), keepdim=True)  # the same softmax, and what matters stays exact in bf16
        rows, cols = region_grid(height, width, self.mrl.region)
        y, x = (torch.arange(n, device=table.device) for n in (rows, cols))
        dy, dx = y[:, None] - y[None] + rows - 1, x[:, None] - x[None] + cols - 1  # (Hr, Hr), (Wr, Wr)
        bias = table[dy[:, None, :, None], dx[None, :, None, :]]  # (Hr, Wr, Hr, Wr, heads)
        return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)[None]

    def _table(self, height: int, width: int) -> Tensor:
        rows, cols = region_grid(height, width, self.mrl.region)
        device = next(self.parameters()).device
        steps = [torch.arange(1 - n, n, device=device) * r for n, r in zip((rows, cols), self.mrl.region, strict=True)]
        if self.logit_scale is not None:
            return self._asked(*steps)
        table = self.relative_position_bias_table
        if table is None:
            table = self.relative_position_bias.relative_position_bias_table
        table = table.unflatten(0, (2 * self.window[0] - 1, 2 * self.window[1] - 1))
        dy, dx = (s.clamp(1 - w, w - 1) + w - 1 for s, w in zip(steps, self.window, strict=True))
        return table[dy][:, dx]

    def _asked(self, dy: Tensor, dx: Tensor) -> Tensor:
        """V2: what its network answers at these distances, as it scales them."""
        known = self.original.get("pretrained_window_size") or (0, 0)
        dtype = self.cpb_mlp[0].weight.dtype
        sides = [max(n - 1, 1) for n in (known if known[0] > 0 else self.window)]
        scaled = [8 * d.float() / side for d, side in zip((dy, dx), sides, strict=True)]
        scaled = [s.sign() * torch.log2(s.abs() + 1) / 3 for s in scaled]
        places = torch.stack(torch.meshgrid(*scaled, indexing="ij"), -1).to(dtype)
        return 16 * torch.sigmoid(self.cpb_mlp(places))

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Nothing: the whole grid is mixed, whatever the window (timm calls this on a new input size)."""


class WholeGrid(nn.Module):
    """A block's own windowed attention, called with the whole grid as its replacement is.

    Args:
        block: what cuts the windows; only its plain attributes and masks are kept.
        leaf: name of the attention in it.
        module: the attention.
    """

    def __init__(self, block: nn.Module, leaf: str, module: nn.Module) -> None:
        super().__init__()
        shell = copy.copy(block)
        shell._modules, shell._buffers, shell._parameters = {leaf: module}, dict(block._buffers), {}
        shell.__class__ = _own_class(block)
        self.block, self.leaf = shell, leaf
        self.train(module.training)

    @property
    def inner(self) -> nn.Module:
        """The attention module itself."""
        return getattr(self.block, self.leaf)

    def forward(self, x: Tensor) -> Any:
        """Cuts the windows, attends, puts them together, as the block does."""
        if not hf_kind(self.block):
            return _own_class(self.block)._attn(self.block, x)
        layer, module = self.block, sys.modules[_own_class(self.block).__module__]
        _, height, width, channels = x.shape
        layer.set_shift_and_window_size((height, width))
        padded, _ = layer.maybe_pad(x, height, width)
        _, high, wide, _ = padded.shape
        side = int(layer.window_size)
        windows = module.window_partition(layer.cyclic_shift(padded), side).view(-1, side * side, channels)
        mask = layer.get_attn_mask(high, wide, dtype=x.dtype, device=x.device)
        out, weights = self.inner(windows, mask)
        out = module.window_reverse(out.view(-1, side, side, channels), side, high, wide)
        return layer.cyclic_shift(out, reverse=True)[:, :height, :width].contiguous(), weights


class Windows(AdapterBase):
    """The adapter of windowed attention."""

    name = "windows"
    layout = "(B, H, W, C)"

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""
        hf = hf_kind(module) == "swin.SwinAttention"
        if type(module) not in (*TIMM, *TORCHVISION) and not hf:
            return None
        parent = model.get_submodule(name.rpartition(".")[0])
        extras = ["whole grid instead of windows", "relative bias between regions"]
        site = Site(name, module, parent, grid_from="the call's shape", extras=extras)
        if hf and not hasattr(module, "q_proj"):
            site.reason = OLD
        elif hf and hf_kind(parent) != "swin.SwinLayer":
            site.reason = "no SwinLayer around it hands the whole grid over"
        elif type(module) in TIMM and type(parent) is not TIMM[type(module)]:
            site.reason = f"{type(parent).__name__} around it does not hand the whole grid over"
        site.reason = site.reason or device_hook(module)
        return site

    def original(self, site: Site) -> nn.Module:
        """The module as it is called once `enter` was: with the whole grid."""
        if type(site.module) in TORCHVISION:
            return site.module
        return WholeGrid(site.owner, site.name.rpartition(".")[2], site.module)

    def enter(self, parent: nn.Module) -> None:
        """Makes a block hand the whole grid to its attention."""
        if type(parent) in TIMM.values() or hf_kind(parent) == "swin.SwinLayer":
            parent.__class__ = _whole(type(parent))

    def leave(self, parent: nn.Module) -> None:
        """Gives the block its own class back."""
        parent.__class__ = _own_class(parent)

    def grid(self, site: Site) -> Grid:
        """A grid that is not asked: the call's shape tells it."""
        return Grid(None, site.owner)

    def hook_point(self, site: Site) -> None:
        """None: the call's shape tells the grid."""

    def call_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """The (H, W) of a call."""
        return tuple(args[0].shape[1:3])

    def width(self, site: Site) -> int:
        """Channels of the module's input."""
        return (getattr(site.module, "qkv", None) or site.module.q_proj).in_features

    def probe_input(self, site: Site, grid: tuple[int, int], batch: int) -> Tensor:
        """A random input of the module on this grid."""
        return super().probe_input(site, grid, batch).unflatten(1, grid)

    def probe_grid(self, site: Site, region: tuple[int, int]) -> tuple[int, int]:
        """The grid that a block was built for, where its masks know no other; two windows of transformers; else a small one."""
        if hf_kind(site.module):
            rows, cols = _window(site.module)
            return rows, 2 * cols
        fixed = type(site.module) in TIMM and not getattr(site.owner, "dynamic_mask", False)
        return tuple(site.owner.input_resolution) if fixed else super().probe_grid(site, region)

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's projections and its position bias."""
        module = site.module
        heads = getattr(module, "num_attention_heads", None) or module.num_heads
        attn_dim = (getattr(module, "proj", None) or module.o_proj).in_features
        scale = 1.0 if getattr(module, "logit_scale", None) is not None else (attn_dim // heads) ** -0.5
        return SwappedWindowAttention(module, self.core(site, (attn_dim, heads, scale), region, config, grid))


def _window(module: nn.Module) -> tuple[int, int]:
    bias = getattr(module, "relative_position_bias", None)
    return tuple(bias.window_size if bias is not None else module.window_size)


@functools.cache
def _whole(kind: type[nn.Module]) -> type[nn.Module]:
    """A block's class whose attention sees the whole grid."""

    def _attn(self: nn.Module, x: Tensor) -> Tensor:
        return self.attn(x)

    def forward(
        self: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        x = self.layernorm_before(hidden_states).unflatten(1, tuple(input_dimensions))
        mixed, weights = self.attention(x)
        hidden_states = hidden_states + self.drop_path(self.dropout(mixed).flatten(1, 2))
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states))), weights

    body: dict[str, Any] = {"forward": forward} if hasattr(kind, "set_shift_and_window_size") else {"_attn": _attn}
    return type(kind.__name__, (kind,), {**body, "__module__": kind.__module__, "mrl_own_class": kind})


def _own_class(block: nn.Module) -> type[nn.Module]:
    return getattr(type(block), "mrl_own_class", type(block))
