"""transformers' global attention: ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP and SigLIP vision, DETR encoders.

Modules are known by the path and name of their class, so transformers is never imported here: whoever has such a model
has imported it. In the versions that we support (5.20 and later) these classes share one anatomy (`q_proj`, `k_proj`, `v_proj` and an output).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mrl.errors import SwapError
from mrl.swap.adapters import Site
from mrl.swap.adapters.base import AdapterBase, Swapped, device_hook
from mrl.swap.adapters.timm import checked_mask
from mrl.swap.config import SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid

PREFIX = {
    "vit.ViTAttention": lambda config: 1,
    "deit.DeiTAttention": lambda config: 2,  # CLS and the distillation token
    "dinov2.Dinov2Attention": lambda config: 1,
    "dinov2_with_registers.Dinov2WithRegistersAttention": lambda config: 1 + config.num_register_tokens,
    "dinov3_vit.DINOv3ViTAttention": lambda config: 1 + config.num_register_tokens,
    "clip.CLIPAttention": lambda config: 1,
    "siglip.SiglipAttention": lambda config: 0,
}
ENCODERS = ("detr.DetrSelfAttention", "rt_detr.RTDetrSelfAttention", "rt_detr_v2.RTDetrV2SelfAttention")
OLD = "its anatomy is of transformers before 5.20; update transformers"


class SwappedTransformersAttention(Swapped):
    """A global attention of transformers with MRL inside; returns (output, None), as its fast attention does.

    Shape:
        (B, N, C) -> ((B, N, C), None)
    """

    inherited = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")

    def __init__(self, original: nn.Module, core: RegionCore) -> None:
        super().__init__(original, core)
        self.config = original.config
        core.attn_drop = _dropout(original)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mixes the tokens; a pair of positions (cos, sin) turns q and k, a single tensor is added to what they are made from."""
        x, mask = hidden_states, checked_mask(self.mrl.config, hidden_states, attention_mask)
        if isinstance(position_embeddings, Tensor):
            both = torch.cat([x, position_embeddings.to(x.dtype).expand_as(x)], -1)
            y = self.mrl(both, self._from_both, None, mask, source=x)
        else:
            rotate = None if position_embeddings is None else lambda t: self._rotated(t, *position_embeddings)
            y = self.mrl(x, self._project, None, mask, rotate)
        return (self.out_proj if self.o_proj is None else self.o_proj)(y), None

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _from_both(self, both: Tensor) -> tuple[Tensor, ...]:
        x, position = both.chunk(2, dim=-1)
        placed = x + position
        return self.q_proj(placed), self.k_proj(placed), self.v_proj(x)

    def _rotated(self, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns the pairs (i, i + d/2) of every head; the last len(sin) tokens are patches, those before stay."""
        heads = t.unflatten(-1, (self.mrl.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)
        prefix = heads.shape[2] - sin.shape[-2]
        patches = heads[:, :, prefix:]
        first, second = patches.chunk(2, dim=-1)
        turned = patches * cos + torch.cat((-second, first), -1) * sin
        return torch.cat([heads[:, :, :prefix], turned.to(t.dtype)], 2).transpose(1, 2).flatten(2)


class TransformersViT(AdapterBase):
    """The adapter of transformers' vision encoders with global attention."""

    name = "transformers_vit"

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""
        kind = hf_kind(module)
        if kind not in PREFIX and kind not in ENCODERS:
            return None
        site = Site(name, module, extras=["masks pooled"])
        if not all(isinstance(getattr(module, n, None), nn.Module) for n in ("q_proj", "k_proj", "v_proj")):
            site.reason = OLD
        elif kind in ENCODERS:
            self._encoder(model, site)
        else:
            self._tower(model, site, kind)
        site.reason = site.reason or device_hook(module)
        return site

    def _tower(self, model: nn.Module, site: Site, kind: str) -> None:
        site.num_prefix_tokens = PREFIX[kind](site.module.config)
        for owner in ancestors(model, site.name):
            site.hook = _patches(owner)
            if site.hook is not None:
                site.owner, site.grid_from = owner, "hook on the patch embedding"
                break
        else:
            site.reason = "no patch embedding around it: a text tower or a decoder, whose tokens are on no grid"
        if "dinov3" in kind:
            site.extras = ["rope at full resolution", *site.extras]

    def _encoder(self, model: nn.Module, site: Site) -> None:
        site.extras = ["positions on q and k only", "padding mask pooled"]
        if "decoder" in site.name.split("."):
            site.reason = "a decoder's self-attention: its queries are on no grid"
            return
        inner = None
        for owner in ancestors(model, site.name):
            if isinstance(getattr(owner, "input_projection", None), nn.Conv2d):
                site.owner, site.hook, site.grid_from = owner, owner.input_projection, "hook on input_projection"
                return
            if "AIFI" in type(owner).__name__:
                inner = owner
            if isinstance(getattr(owner, "encoder_input_proj", None), nn.ModuleList) and inner is not None:
                place = next(i for i, layer in enumerate(owner.encoder.aifi) if layer is inner)
                site.hook = owner.encoder_input_proj[owner.config.encode_proj_layers[place]]
                site.owner, site.grid_from = inner, "hook on encoder_input_proj"
                return
        site.reason = "no input projection around it says where the grid of tokens is"

    def grid(self, site: Site) -> Grid:
        """A new grid for the site's network."""
        return Grid(None, site.owner)

    def hook_point(self, site: Site) -> nn.Module | None:
        """The convolution whose output shows the grid."""
        return site.hook

    def width(self, site: Site) -> int:
        """Channels of the module's input."""
        return site.module.q_proj.in_features

    def call(self, site: Site, x: Tensor, grid: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How the network calls it: DINOv3 with rotary positions (here: none turned), which it cannot do without."""
        if hf_kind(site.module) != "dinov3_vit.DINOv3ViTAttention":
            return (x,), {}
        flat = x.new_ones(grid[0] * grid[1], site.module.head_dim)
        return (x,), {"position_embeddings": (flat, torch.zeros_like(flat))}

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's projections."""
        module = site.module
        heads = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
        heads = heads or module.q_proj.out_features // module.head_dim
        scale = getattr(module, "scaling", None) or module.scale
        core = self.core(site, (module.q_proj.out_features, heads, float(scale)), region, config, grid)
        return SwappedTransformersAttention(module, core)


def hf_kind(module: nn.Module) -> str:
    """A module of transformers as "family.Class", any other as "".

    Example:
        >>> hf_kind(nn.Identity())
        ''
    """
    parts = type(module).__module__.split(".")
    return f"{parts[2]}.{type(module).__name__}" if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""


def ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around a module, innermost first.

    Example:
        >>> [type(m).__name__ for m in ancestors(nn.ModuleList([nn.Sequential(nn.Identity())]), "0.0")]
        ['Sequential', 'ModuleList']
    """
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, -1, -1)]


def _patches(owner: nn.Module) -> nn.Module | None:
    """The patch-embedding convolution of a vision tower, or None."""
    embeddings = getattr(owner, "embeddings", None)
    for path in ("patch_embeddings.projection", "patch_embeddings", "patch_embedding"):
        found: Any = embeddings
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Conv2d):
            return found
    return None


def _dropout(module: nn.Module) -> float:
    for name in ("attention_dropout", "dropout"):
        value = getattr(module, name, None)
        if isinstance(value, float | int):
            return float(value)
    raise SwapError(f"{type(module).__name__}: its attention dropout is not known; {OLD}.")
