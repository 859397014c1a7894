"""Plain `nn.MultiheadAttention`: torchvision's ViT, `nn.TransformerEncoderLayer`, and networks built on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from mrl.errors import SwapError
from mrl.swap.adapters import Site
from mrl.swap.adapters.base import AdapterBase, Swapped, device_hook, owner_of
from mrl.swap.config import SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid


class SwappedMultiheadAttention(Swapped):
    """`nn.MultiheadAttention` with MRL inside, for self-attention; returns (output, None), as with `need_weights=False`.

    Shape:
        (B, N, C), or (N, B, C) as the original has it -> (the same, None)
    """

    inherited = ("out_proj",)
    own = ("in_proj_weight", "in_proj_bias")
    _qkv_same_embed_dim = (
        False  # refuses the fast path of `nn.TransformerEncoderLayer`, which reads weights, not modules
    )

    def __init__(self, original: nn.MultiheadAttention, core: RegionCore) -> None:
        super().__init__(original, core)
        self.batch_first, self.embed_dim = original.batch_first, original.embed_dim
        self.num_heads, self.sequence_first = original.num_heads, not original.batch_first
        core.attn_drop = original.dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Mixes the tokens; masks are pooled to regions, and weights are never returned.

        Raises:
            SwapError: another key or value than the query: cross-attention has no grid of its own.
        """
        if key is not query and key.shape != query.shape:
            raise SwapError(
                "this attention was called with other keys than queries: cross-attention cannot be swapped; leave it out with "
                "exclude."
            )
        x = query.transpose(0, 1) if self.sequence_first else query
        bias = self._bias(x, key_padding_mask, attn_mask)
        if bias is not None and self.mrl.config.bias == "error":
            raise SwapError(
                "SwapConfig(bias='error'): the model passed an attention mask; use bias='pool', or run it without."
            )
        y = self.out_proj(self.mrl(x, self._project, None, bias))
        return (y.transpose(0, 1) if self.sequence_first else y), None

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)

    def _bias(self, x: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Torch's masks, where True means "do not look", as one additive mask that broadcasts to (B, h, N, N)."""
        total = None
        for given in (mask, padding):
            if given is None:
                continue
            added = given.to(x.dtype) if given.is_floating_point() else _forbidden(given, x.dtype)
            if given is padding:
                added = added[:, None, None].expand(-1, -1, x.shape[1], -1)
            elif added.ndim == 3:
                added = added.unflatten(0, (-1, self.num_heads))
            total = added if total is None else total + added
        return total


def _forbidden(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


class TorchAttention(AdapterBase):
    """The adapter of `nn.MultiheadAttention`: torchvision's ViT by its class, others as their network says.

    A network of one's own says how many leading tokens are not on the grid by an attribute `num_prefix_tokens` (0 without
    it), and the grid by `handle.fix_grid`, or by being square.
    """

    name = "torch_attention"

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""
        if not isinstance(module, nn.MultiheadAttention):
            return None
        owner, _ = owner_of(model, name, VisionTransformer)
        site = Site(name, module, owner or model)
        site.num_prefix_tokens = 1 if owner is not None else int(getattr(model, "num_prefix_tokens", 0))
        site.grid_from = "hook on conv_proj" if owner is not None else "fix_grid, or square"
        site.extras = ["masks pooled"]
        if type(module) is not nn.MultiheadAttention:
            site.reason = f"{type(module).__name__} is a subclass with a forward of its own"
        elif not module._qkv_same_embed_dim:
            site.reason = (
                "its keys or values have another width than its queries: cross-attention has no grid of its own"
            )
        elif module.bias_k is not None or module.add_zero_attn:
            site.reason = "it adds keys that are on no grid (add_bias_kv, add_zero_attn)"
        elif type(model.get_submodule(name.rpartition(".")[0])).__name__.endswith("PoolingHead"):
            site.reason = "a pooling head: its one query is on no grid"
        elif name.rpartition(".")[2] in ("multihead_attn", "cross_attn", "encoder_attn"):
            site.reason = "a decoder's cross-attention: its queries are not on the grid of its keys"
        else:
            site.reason = device_hook(module)
        return site

    def grid(self, site: Site) -> Grid:
        """A new grid for the site's network."""
        if not isinstance(site.owner, VisionTransformer):
            return Grid(None, site.owner)
        side = site.owner.image_size // site.owner.patch_size
        return Grid((side, side), site.owner)

    def hook_point(self, site: Site) -> nn.Module | None:
        """The patch-embedding convolution of torchvision's ViT; None elsewhere."""
        return site.owner.conv_proj if isinstance(site.owner, VisionTransformer) else None

    def width(self, site: Site) -> int:
        """Channels of the module's input."""
        return site.module.embed_dim

    def call(self, site: Site, x: Tensor, grid: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How a network calls it: the same tokens three times."""
        return (x, x, x), {"need_weights": False}

    def probe_input(self, site: Site, grid: tuple[int, int], batch: int) -> Tensor:
        """A random input of the module on this grid."""
        x = super().probe_input(site, grid, batch)
        return x if site.module.batch_first else x.transpose(0, 1)

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's packed projection and its output projection."""
        module = site.module
        shape = (module.embed_dim, module.num_heads, module.head_dim**-0.5)
        return SwappedMultiheadAttention(module, self.core(site, shape, region, config, grid))
