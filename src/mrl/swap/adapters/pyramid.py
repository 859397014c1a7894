"""Attention that reduces its own keys and values: PVT, PVTv2, Twins' global attention, SegFormer, CvT.

The call tells the grid. The network's own reduction of keys and values stays; MRL pools the queries to regions and adds the
local convolution, whose source is the module's input, since values exist at the reduced resolution only.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import pvt_v2, twins
from torch import Tensor, nn

from mrl.swap.adapters import Site
from mrl.swap.adapters.base import AdapterBase, Swapped, device_hook
from mrl.swap.adapters.timm import checked_mask
from mrl.swap.adapters.transformers_vit import OLD, hf_kind
from mrl.swap.config import SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid

Parts = tuple[Tensor, nn.Module, Tensor, Tensor]


class SwappedPyramidAttention(Swapped):
    """An attention with spatial reduction and MRL for its queries; a subclass a network.

    Shape:
        (B, N, C), height, width -> (B, N, C), or a tuple that starts with it.
    """

    def __init__(self, original: nn.Module, core: RegionCore) -> None:
        super().__init__(original, core)
        drop = getattr(original, "attention_dropout", None)
        if drop is None:
            drop = getattr(original, "attn_drop", None) or getattr(original, "dropout", None)
        core.attn_drop = float(getattr(drop, "p", drop) or 0.0)

    def _mixed(self, x: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        made, project, k, v = self.parts(x, size)
        return self.mrl.query(made, project, k, v, x, size, mask)

    def parts(self, x: Tensor, size: tuple[int, int]) -> Parts:
        """What the queries are made from, their projection, the keys and the values."""
        raise NotImplementedError

    @staticmethod
    def _map(x: Tensor, size: tuple[int, int]) -> Tensor:
        return x.transpose(1, 2).unflatten(2, size)  # (B, C, H, W)


class SwappedTimmReduced(SwappedPyramidAttention):
    """timm's PVTv2 `Attention` and Twins' `GlobalSubSampleAttn`."""

    inherited = ("q", "kv", "attn_drop", "proj", "proj_drop", "pool", "sr", "norm", "act")

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Mixes the tokens of a grid `feat_size`."""
        return self.proj_drop(self.proj(self._mixed(x, tuple(feat_size))))

    def parts(self, x: Tensor, size: tuple[int, int]) -> Parts:
        """What the queries are made from, their projection, the keys and the values."""
        keys = x
        if self.sr is not None:
            found = self._map(x, size)
            found = found if self.pool is None else self.pool(found)
            keys = self.norm(self.sr(found).flatten(2).transpose(1, 2))
            keys = keys if self.act is None else self.act(keys)
        return x, self.q, *self.kv(keys).chunk(2, dim=-1)


class SwappedSegformer(SwappedPyramidAttention):
    """transformers' `SegformerAttention`; returns (output, None)."""

    inherited = ("q_proj", "k_proj", "v_proj", "o_proj", "sequence_reduction")

    def forward(
        self, hidden_states: Tensor, height: int, width: int, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Mixes the tokens of a grid (height, width)."""
        mask = checked_mask(self.mrl.config, hidden_states, attention_mask)
        return self.o_proj(self._mixed(hidden_states, (int(height), int(width)), mask)), None

    def parts(self, x: Tensor, size: tuple[int, int]) -> Parts:
        """What the queries are made from, their projection, the keys and the values."""
        keys = self.sequence_reduction(x, *size) if self.sequence_reduction is not None else x
        return x, self.q_proj, self.k_proj(keys), self.v_proj(keys)


class SwappedPvt(SwappedPyramidAttention):
    """transformers' `PvtEfficientSelfAttention` and `PvtV2SelfAttention`; returns (output,), and None beside it for weights."""

    inherited = (
        "query",
        "key",
        "value",
        "dropout",
        "attn_drop",
        "proj",
        "proj_drop",
        "sequence_reduction",
        "pool",
        "spatial_reduction",
        "layer_norm",
        "act",
    )

    def forward(
        self, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """Mixes the tokens of a grid (height, width)."""
        y = self._mixed(hidden_states, (int(height), int(width)))
        if self.proj is not None:
            y = self.proj_drop(self.proj(y))
        return (y, None) if output_attentions else (y,)

    def parts(self, x: Tensor, size: tuple[int, int]) -> Parts:
        """What the queries are made from, their projection, the keys and the values."""
        reduce, keys = self.sequence_reduction or self.spatial_reduction, x
        if reduce is not None:
            found = self._map(x, size)
            found = self.pool(found) if self.pool is not None else found
            keys = self.layer_norm(reduce(found).flatten(2).transpose(1, 2))
            keys = self.act(keys) if self.act is not None else keys
        return x, self.query, self.key(keys), self.value(keys)


class SwappedCvt(SwappedPyramidAttention):
    """transformers' `CvtSelfAttention`; returns a tensor. Its scale is dim ** -0.5."""

    inherited = (
        "convolution_projection_query",
        "convolution_projection_key",
        "convolution_projection_value",
        "projection_query",
        "projection_key",
        "projection_value",
        "dropout",
    )

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """Mixes the tokens of a grid (height, width), after a CLS token in the last stage."""
        return self._mixed(hidden_state, (int(height), int(width)))

    def parts(self, x: Tensor, size: tuple[int, int]) -> Parts:
        """What the queries are made from, their projection, the keys and the values."""
        prefix = x.shape[1] - size[0] * size[1]
        head, found = x[:, :prefix], self._map(x[:, prefix:], size)
        convolved = [getattr(self, f"convolution_projection_{n}")(found) for n in ("query", "key", "value")]
        q, k, v = (torch.cat([head, t], 1) if prefix else t for t in convolved)
        return q, self.projection_query, self.projection_key(k), self.projection_value(v)


KINDS: dict[str, tuple[type[SwappedPyramidAttention], str]] = {
    "segformer.SegformerAttention": (SwappedSegformer, "q_proj"),
    "pvt.PvtEfficientSelfAttention": (SwappedPvt, "query"),
    "pvt_v2.PvtV2SelfAttention": (SwappedPvt, "query"),
    "cvt.CvtSelfAttention": (SwappedCvt, "projection_query"),
}


class Pyramid(AdapterBase):
    """The adapter of attention with spatial reduction; the grid is an argument of the call."""

    name = "pyramid"

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""
        if isinstance(module, twins.LocallyGroupedAttn):
            return Site(name, module, reason="local by design: the global attention beside it is what regions replace")
        if self._kind(module) is None:
            return None
        extras = ["its own key reduction kept", "local source is the input"]
        site = Site(name, module, model, grid_from="the call's arguments", extras=extras)
        if not hasattr(module, self._kind(module)[1]):
            site.reason = OLD
        elif hf_kind(module).startswith("cvt."):
            site.num_prefix_tokens = int(module.with_cls_token)
            if module.convolution_projection_query.convolution_projection.convolution.stride != (1, 1):
                site.reason = "its queries are on a coarser grid than its output"
        site.reason = site.reason or device_hook(module)
        return site

    @staticmethod
    def _kind(module: nn.Module) -> tuple[type[SwappedPyramidAttention], str] | None:
        if type(module) in (pvt_v2.Attention, twins.GlobalSubSampleAttn):
            return SwappedTimmReduced, "q"
        return KINDS.get(hf_kind(module))

    def grid(self, site: Site) -> Grid:
        """A grid that is not asked: the call tells it."""
        return Grid(None, site.owner)

    def hook_point(self, site: Site) -> None:
        """None: the call tells the grid."""

    def width(self, site: Site) -> int:
        """Channels of the module's input."""
        return getattr(site.module, self._kind(site.module)[1]).in_features

    def call(self, site: Site, x: Tensor, grid: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How the network calls the module on tokens of this grid: with it."""
        timm = self._kind(site.module)[0] is SwappedTimmReduced
        return ((x, list(grid)) if timm else (x, *grid)), {}

    def call_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """The (H, W) of a call."""
        told = [*args[1:], *kwargs.values()]
        return tuple(told[0]) if isinstance(told[0], (tuple, list, torch.Size)) else (int(told[0]), int(told[1]))

    def probe_grid(self, site: Site, region: tuple[int, int]) -> tuple[int, int]:
        """A grid, not square, that its reductions divide."""
        for name in ("sr", "sequence_reduction", "spatial_reduction"):
            conv = getattr(site.module, name, None)
            conv = getattr(conv, "sequence_reduction", conv)
            if isinstance(conv, nn.Conv2d):
                return conv.stride[0] * (region[0] + 1), conv.stride[1] * (region[1] + 2)
        return super().probe_grid(site, region)

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's child modules."""
        module = site.module
        swapped, query = self._kind(module)
        heads = getattr(module, "num_attention_heads", None) or module.num_heads
        width = getattr(module, query).out_features
        scale = getattr(module, "scaling", None) or getattr(module, "scale", None) or (width // heads) ** -0.5
        return swapped(module, self.core(site, (width, heads, float(scale)), region, config, grid, queries_only=True))
