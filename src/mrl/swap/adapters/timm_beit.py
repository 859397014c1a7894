"""timm's BEiT and BEiTv2: relative position biases, which include the CLS token, are pooled to regions."""

from __future__ import annotations

from timm.models.beit import Attention, Beit
from torch import Tensor, nn

from mrl.errors import SwapError
from mrl.swap.adapters import Site
from mrl.swap.adapters.base import AdapterBase, Swapped, fused_qkv, owner_of, refusal
from mrl.swap.config import SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid


class SwappedBeitAttention(Swapped):
    """BEiT's `Attention` with MRL inside.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    inherited = ("qkv", "attn_drop", "proj", "proj_drop")
    own = ("q_bias", "k_bias", "v_bias", "relative_position_bias_table", "relative_position_index")

    def __init__(self, original: nn.Module, core: RegionCore) -> None:
        super().__init__(original, core)
        core.attn_drop = original.attn_drop.p

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Mixes the tokens; the module's own and the shared position bias are added, then pooled."""
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            tokens = self.relative_position_index.shape[0]
            own = self.relative_position_bias_table[self.relative_position_index.flatten()]
            own = own.view(tokens, tokens, -1).permute(2, 0, 1)[None]  # (1, h, N, N)
            bias = own if bias is None else own + bias
        if bias is not None and self.mrl.config.bias == "error":
            raise SwapError(
                "SwapConfig(bias='error'): this model has relative position biases; use bias='pool', which pools them to "
                "regions."
            )
        return self.proj_drop(self.proj(self.mrl(x, self._project, None, bias)))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return fused_qkv(self, x)


class TimmBeit(AdapterBase):
    """The adapter of timm's `Beit` networks."""

    name = "timm_beit"

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""
        if not isinstance(module, Attention):
            return None
        owner, path = owner_of(model, name, Beit)
        site = Site(name, module, owner)
        if type(module) is not Attention:
            site.reason = f"{type(module).__name__} is a subclass with a forward of its own"
        elif owner is None or not path.startswith("blocks."):
            site.reason = "no Beit network around it says where the grid of tokens is"
        else:
            site.num_prefix_tokens = int(owner.num_prefix_tokens)
            site.grid_from = "hook on patch_embed.proj"
            biased = module.relative_position_bias_table is not None or owner.rel_pos_bias is not None
            site.extras = ["position bias pooled"] if biased else []
            site.reason = refusal(owner, module)
        return site

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's child modules, biases and tables."""
        module = site.module
        attn_dim = module.proj.in_features
        core = self.core(
            site, (attn_dim, module.num_heads, (attn_dim // module.num_heads) ** -0.5), region, config, grid
        )
        return SwappedBeitAttention(module, core)

    def probe_grid(self, site: Site, region: tuple[int, int]) -> tuple[int, int]:
        """The grid that the position table is made for; a small one where there is none."""
        window = site.module.window_size
        return super().probe_grid(site, region) if window is None else tuple(window)
