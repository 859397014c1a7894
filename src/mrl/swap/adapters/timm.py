"""timm's ViT family with prefix tokens: ViT, DeiT, DINOv2 (with and without registers), CLIP, SigLIP."""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrl.errors import SwapError
from mrl.swap.adapters import Site
from mrl.swap.config import SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid


class SwappedTimmAttention(nn.Module):
    """timm's `Attention` with the softmax among positions exchanged for MRL; child names are the original's.

    Args:
        original: the module whose children (the same objects) and scale are inherited.
        core: the new parameters.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    inherited = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")

    def __init__(self, original: nn.Module, core: RegionCore) -> None:
        super().__init__()
        for name in self.inherited:
            self.add_module(name, getattr(original, name, None))
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self.attn_dim = self.num_heads * self.head_dim
        core.attn_drop = original.attn_drop.p
        self.original = {k: v for k, v in vars(original).items() if not k.startswith("_") and k != "training"}
        self.mrl = core
        self.train(original.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mixes the tokens; masks are pooled to regions."""
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if attn_mask is not None and self.mrl.config.bias == "error":
            raise SwapError(
                "SwapConfig(bias='error'): the model passed an attention mask; use bias='pool', or run it without."
            )
        normed = not (isinstance(self.q_norm, nn.Identity | None) and isinstance(self.k_norm, nn.Identity | None))
        norms = (self._headwise(self.q_norm), self._headwise(self.k_norm)) if normed else None
        y = self.mrl(x, self._project, norms, attn_mask)
        if self.norm is not None:
            y = self.norm(y)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).chunk(3, dim=-1)

    def _headwise(self, norm: nn.Module | None):
        if norm is None:
            return nn.Identity()
        return lambda t: norm(t.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)


class TimmViT:
    """The adapter of timm's `VisionTransformer` with its plain `Attention`."""

    name = "timm_vit"
    layout = "(B, N, C)"

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""
        if not isinstance(module, Attention):
            return None
        owner, path = _owner(model, name)
        site = Site(name, module, owner)
        if type(module) is not Attention:
            site.reason = f"{type(module).__name__} is a subclass with a forward of its own"
            return site
        if owner is None:
            site.reason = "no VisionTransformer around it says where the grid of tokens is"
            return site
        if not path.startswith("blocks."):
            site.reason = "not one of the network's blocks: its queries are not on the grid"
            return site
        site.num_prefix_tokens = int(owner.num_prefix_tokens)
        site.grid_from = "hook on patch_embed.proj"
        site.extras = [
            extra
            for extra, present in (
                ("q/k norm", not isinstance(module.q_norm, nn.Identity)),
                ("output norm", not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)),
                ("gate", getattr(module, "gate", None) is not None),
                ("masks pooled", True),
            )
            if present
        ]
        site.reason = _refusal(owner, module)
        return site

    def grid(self, site: Site) -> Grid:
        """A new grid for the site's network."""
        embed = site.owner.patch_embed
        size = getattr(embed, "grid_size", None)
        return Grid(tuple(size) if size and not getattr(site.owner, "dynamic_img_size", False) else None, site.owner)

    def hook_point(self, site: Site) -> nn.Module | None:
        """The patch-embedding convolution."""
        return site.owner.patch_embed.proj

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's child modules.

        Raises:
            SwapError: `local_source="input"` where q, k, v have another width than the input.
        """
        module = site.module
        attn_dim = module.num_heads * module.head_dim
        width = module.qkv.in_features
        if config.local_source == "input" and width != attn_dim:
            raise SwapError(
                f"{site.name}: local_source='input' adds the {width} input channels to {attn_dim} value channels; use local_source='value'."
            )
        scale = module.head_dim**-0.5 if module.fused_attn else float(module.scale)
        parameter = next(module.parameters())
        kind = {"device": parameter.device, "dtype": parameter.dtype if parameter.is_floating_point() else None}
        core = RegionCore(attn_dim, module.num_heads, scale, region, site.num_prefix_tokens, config, grid, **kind)
        return SwappedTimmAttention(module, core)

    def stand_in(self, mixer: nn.Module) -> nn.Module:
        """A module of the original's class and attributes with the mixer's inherited children, to describe the base."""
        module = Attention.__new__(Attention)
        nn.Module.__init__(module)
        vars(module).update(mixer.original)
        for name in mixer.inherited:
            if getattr(mixer, name) is not None:
                module.add_module(name, getattr(mixer, name))
        return module

    def probe_input(self, site: Site, grid: tuple[int, int], batch: int) -> Tensor:
        """A random input of the module on this grid."""
        parameter = next(site.module.parameters())
        tokens = site.num_prefix_tokens + grid[0] * grid[1]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, tokens, site.module.qkv.in_features, generator=generator)
        return x.to(parameter.device, parameter.dtype)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The innermost VisionTransformer around a module, and the module's name inside it."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        candidate = model.get_submodule(".".join(parts[:i]))
        if isinstance(candidate, VisionTransformer):
            return candidate, ".".join(parts[i:])
    return None, name


def _refusal(owner: nn.Module, module: nn.Module) -> str:
    if float(getattr(owner.patch_drop, "prob", 0.0)) > 0:
        return "patch dropout removes tokens, so there is no grid; build the model with patch_drop_rate=0"
    if not isinstance(getattr(owner.patch_embed, "proj", None), nn.Conv2d):
        return "its patch embedding has no convolution to read the grid from"
    if hasattr(module, "_hf_hook"):
        return "it carries a device hook of accelerate, which replacing would lose; swap before dispatching"
    return ""
