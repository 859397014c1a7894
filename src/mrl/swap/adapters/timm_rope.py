"""timm's Eva family with rotary positions: EVA-02, DINOv3, Perception Encoder, ViTs with rope."""

from __future__ import annotations

import torch
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn

from mrl.swap.adapters import Site
from mrl.swap.adapters.base import AdapterBase, fused_qkv, owner_of, refusal
from mrl.swap.adapters.timm import SwappedTimmAttention, checked_mask, timm_extras
from mrl.swap.config import SwapConfig
from mrl.swap.grid import Grid


class SwappedRopeAttention(SwappedTimmAttention):
    """timm's `EvaAttention` or `AttentionRope` with MRL inside; positions rotate q and k before the regions are pooled.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    inherited = (*SwappedTimmAttention.inherited, "q_proj", "k_proj", "v_proj")
    own = ("q_bias", "k_bias", "v_bias")

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mixes the tokens; `rope` covers the patch tokens."""
        rotate = None if rope is None else lambda t: self._rotated(t, rope)
        return self._mixed(x, checked_mask(self.mrl.config, x, attn_mask, is_causal), rotate)

    def _rotated(self, t: Tensor, rope: Tensor) -> Tensor:
        prefix = self.mrl.num_prefix_tokens
        heads = t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)
        half = bool(self.original.get("rotate_half", False))
        patches = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=half).type_as(t)
        return torch.cat([heads[:, :, :prefix], patches], 2).transpose(1, 2).flatten(2)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return fused_qkv(self, x)


class TimmRope(AdapterBase):
    """The adapter of timm's `Eva` networks."""

    name = "timm_rope"

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""
        if not isinstance(module, (EvaAttention, AttentionRope)):
            return None
        owner, path = owner_of(model, name, Eva)
        site = Site(name, module, owner)
        if type(module) not in (EvaAttention, AttentionRope):
            site.reason = f"{type(module).__name__} is a subclass with a forward of its own"
        elif owner is None or not path.startswith("blocks."):
            site.reason = "no Eva network around it says where the grid of tokens is"
        elif getattr(module, "num_kv_groups", 1) > 1:
            site.reason = "its keys and values have fewer heads than its queries, which regions do not handle yet"
        else:
            site.num_prefix_tokens = int(owner.num_prefix_tokens)
            site.grid_from = "hook on patch_embed.proj"
            rope = ["rope at full resolution"] if owner.rope is not None else []
            site.extras = [*timm_extras(module), *rope, "masks pooled"]
            site.reason = refusal(owner, module)
        return site

    def width(self, site: Site) -> int:
        """Channels of the module's input."""
        return (site.module.qkv or site.module.q_proj).in_features

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's child modules and biases."""
        module = site.module
        shape = (module.num_heads * module.head_dim, module.num_heads, float(module.scale))
        return SwappedRopeAttention(module, self.core(site, shape, region, config, grid))
