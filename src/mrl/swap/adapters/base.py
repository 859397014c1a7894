"""What the adapters have in common: taking over a module's parts, and describing the original again."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mrl.errors import SwapError
from mrl.swap.adapters import Site
from mrl.swap.config import SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid


class Swapped(nn.Module):
    """A replacement that holds the very children, parameters and buffers of its original, under the same names.

    Args:
        original: the module that is replaced.
        core: the new parameters, as `mrl`.
    """

    inherited: ClassVar[tuple[str, ...]] = ()  # children
    own: ClassVar[tuple[str, ...]] = ()  # parameters and buffers that lie on the original itself

    def __init__(self, original: nn.Module, core: RegionCore) -> None:
        super().__init__()
        for name in self.inherited:
            self.add_module(name, getattr(original, name, None))
        for name in self.own:
            if name in original._buffers:
                kept = name not in original._non_persistent_buffers_set
                self.register_buffer(name, original._buffers[name], persistent=kept)
            else:
                self.register_parameter(name, original._parameters.get(name))
        self.original = {k: v for k, v in vars(original).items() if not k.startswith("_") and k != "training"}
        self.original_class = type(original)
        self.mrl = core
        self.train(original.training)

    def stand_in(self) -> nn.Module:
        """A module of the original's class and attributes with what was inherited, to describe the base."""
        module = self.original_class.__new__(self.original_class)
        nn.Module.__init__(module)
        vars(module).update(self.original)
        for name in self.inherited:
            if getattr(self, name) is not None:
                module.add_module(name, getattr(self, name))
        for name in self.own:
            if name in self._buffers:
                kept = name not in self._non_persistent_buffers_set
                module.register_buffer(name, self._buffers[name], persistent=kept)
            else:
                module.register_parameter(name, self._parameters[name])
        return module


class AdapterBase:
    """The parts of an adapter that are the same for most families; see `mrl.swap.adapters.Adapter`."""

    name = ""
    layout = "(B, N, C)"

    def grid(self, site: Site) -> Grid:
        """A new grid for the site's network."""
        size = getattr(site.owner.patch_embed, "grid_size", None)
        return Grid(tuple(size) if size and not getattr(site.owner, "dynamic_img_size", False) else None, site.owner)

    def hook_point(self, site: Site) -> nn.Module | None:
        """The patch-embedding convolution."""
        return site.owner.patch_embed.proj

    def stand_in(self, mixer: Swapped) -> nn.Module:
        """A module of the original's class and attributes with the mixer's inherited parts, to describe the base."""
        return mixer.stand_in()

    def width(self, site: Site) -> int:
        """Channels of the module's input."""
        return site.module.qkv.in_features

    def original(self, site: Site) -> nn.Module:
        """The module that is exchanged, in the form in which it is called once `enter` was."""
        return site.module

    def enter(self, parent: nn.Module) -> None:
        """Prepares what surrounds the module, where it must call a replacement otherwise than the original."""

    def leave(self, parent: nn.Module) -> None:
        """Undoes `enter`."""

    def call(self, site: Site, x: Tensor, grid: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How the network calls the module on these tokens: arguments and keyword arguments."""
        return (x,), {}

    def call_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """The (H, W) that a call itself tells; None where it does not."""
        return None

    def probe_grid(self, site: Site, region: tuple[int, int]) -> tuple[int, int]:
        """A small grid, not square and ragged, on which a replacement is tried."""
        return region[0] + 1, region[1] + 2

    def probe_input(self, site: Site, grid: tuple[int, int], batch: int) -> Tensor:
        """A random input of the module on this grid."""
        parameter = next(site.module.parameters())
        tokens = site.num_prefix_tokens + grid[0] * grid[1]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, tokens, self.width(site), generator=generator)
        return x.to(parameter.device, parameter.dtype)

    def core(
        self,
        site: Site,
        shape: tuple[int, int, float],
        region: tuple[int, int],
        config: SwapConfig,
        grid: Grid,
        **options: Any,
    ) -> RegionCore:
        """The new part of a replacement; `shape` is the width of q, k and v, the heads, and the scale; `options` go to `RegionCore`.

        Raises:
            SwapError: `local_source="input"` where q, k, v have another width than the input.
        """
        attn_dim, num_heads, scale = shape
        width = self.width(site)
        if config.local_source == "input" and width != attn_dim:
            raise SwapError(
                f"{site.name}: local_source='input' adds the {width} input channels to {attn_dim} value channels; use "
                "local_source='value'."
            )
        parameter = next(site.module.parameters())
        kind = {"device": parameter.device, "dtype": parameter.dtype if parameter.is_floating_point() else None}
        return RegionCore(attn_dim, num_heads, scale, region, site.num_prefix_tokens, config, grid, **kind, **options)


def owner_of(model: nn.Module, name: str, kinds: type | tuple[type, ...]) -> tuple[nn.Module | None, str]:
    """The innermost network of one of these classes around a module, and the module's name inside it.

    Example:
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
        >>> owner_of(net, "0.0", nn.Sequential)[1]
        '0'
    """
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        candidate = model.get_submodule(".".join(parts[:i]))
        if isinstance(candidate, kinds):
            return candidate, ".".join(parts[i:])
    return None, name


def refusal(owner: nn.Module, module: nn.Module) -> str:
    """Why a network with timm's patch embedding has no grid that regions could follow; empty where it has."""
    if float(getattr(getattr(owner, "patch_drop", None), "prob", 0.0) or 0.0) > 0:
        return "patch dropout removes tokens, so there is no grid; build the model with patch_drop_rate=0"
    if not isinstance(getattr(owner.patch_embed, "proj", None), nn.Conv2d):
        return "its patch embedding has no convolution to read the grid from"
    return device_hook(module)


def device_hook(module: nn.Module) -> str:
    """Why a module that accelerate has placed cannot be replaced; empty where it has not."""
    if hasattr(module, "_hf_hook"):
        return "it carries a device hook of accelerate, which replacing would lose; swap before dispatching"
    return ""


def fused_qkv(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of a fused projection `qkv` whose biases, if any, lie on the module as `q_bias`, `k_bias`, `v_bias`."""
    qkv = module.qkv(x)
    if module.q_bias is not None:
        qkv = qkv + torch.cat((module.q_bias, module.k_bias, module.v_bias)).to(qkv.dtype)
    return qkv.chunk(3, dim=-1)


def headwise(norm: nn.Module | None, num_heads: int) -> Any:
    """A norm of single heads, as a function of (B, n, heads * d)."""
    if norm is None or isinstance(norm, nn.Identity):
        return nn.Identity()
    return lambda t: norm(t.unflatten(-1, (num_heads, -1))).flatten(-2)
