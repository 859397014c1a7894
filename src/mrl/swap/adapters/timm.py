"""timm's ViT family with prefix tokens: ViT, DeiT, DINOv2 (with and without registers), CLIP, SigLIP."""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrl.errors import SwapError
from mrl.swap.adapters import Site
from mrl.swap.adapters.base import AdapterBase, Swapped, headwise, owner_of, refusal
from mrl.swap.config import SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid


class SwappedTimmAttention(Swapped):
    """timm's `Attention` with the softmax among positions exchanged for MRL; child names are the original's.

    Args:
        original: the module whose children (the same objects) and scale are inherited.
        core: the new parameters.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    inherited = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")

    def __init__(self, original: nn.Module, core: RegionCore) -> None:
        super().__init__(original, core)
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self.attn_dim = self.num_heads * self.head_dim
        core.attn_drop = original.attn_drop.p

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mixes the tokens; masks are pooled to regions."""
        return self._mixed(x, checked_mask(self.mrl.config, x, attn_mask, is_causal))

    def _mixed(self, x: Tensor, mask: Tensor | None = None, rotate: object = None) -> Tensor:
        normed = not (isinstance(self.q_norm, nn.Identity | None) and isinstance(self.k_norm, nn.Identity | None))
        norms = (headwise(self.q_norm, self.num_heads), headwise(self.k_norm, self.num_heads)) if normed else None
        y = self.mrl(x, self._project, norms, mask, rotate)
        if self.norm is not None:
            y = self.norm(y)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, dim=-1)


def checked_mask(config: SwapConfig, x: Tensor, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor | None:
    """The mask of a call, or a refusal where the configuration wants none."""
    if is_causal:
        attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    if attn_mask is not None and config.bias == "error":
        raise SwapError(
            "SwapConfig(bias='error'): the model passed an attention mask; use bias='pool', or run it without."
        )
    return attn_mask


class TimmViT(AdapterBase):
    """The adapter of timm's `VisionTransformer` with its plain `Attention`."""

    name = "timm_vit"

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""
        if not isinstance(module, Attention):
            return None
        owner, path = owner_of(model, name, VisionTransformer)
        site = Site(name, module, owner)
        if type(module) is not Attention:
            site.reason = f"{type(module).__name__} is a subclass with a forward of its own"
        elif owner is None:
            site.reason = "no VisionTransformer around it says where the grid of tokens is"
        elif not path.startswith("blocks."):
            site.reason = "not one of the network's blocks: its queries are not on the grid"
        else:
            site.num_prefix_tokens = int(owner.num_prefix_tokens)
            site.grid_from = "hook on patch_embed.proj"
            site.extras = [*timm_extras(module), "masks pooled"]
            site.reason = refusal(owner, module)
        return site

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's child modules.

        Raises:
            SwapError: `local_source="input"` where q, k, v have another width than the input.
        """
        module = site.module
        scale = module.head_dim**-0.5 if module.fused_attn else float(module.scale)
        shape = (module.num_heads * module.head_dim, module.num_heads, scale)
        return SwappedTimmAttention(module, self.core(site, shape, region, config, grid))


def timm_extras(module: nn.Module) -> list[str]:
    """What a timm attention has besides plain attention, for the plan's table."""
    norms = [m for m in (getattr(module, n, None) for n in ("q_norm", "k_norm")) if m is not None]
    found = {
        "q/k norm": any(not isinstance(norm, nn.Identity) for norm in norms),
        "output norm": not isinstance(getattr(module, "norm", None) or nn.Identity(), nn.Identity),
        "gate": getattr(module, "gate", None) is not None,
    }
    return [name for name, there in found.items() if there]
