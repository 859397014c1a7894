"""One adapter a family of attention modules: what it can take over, and how."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from mrl.errors import ConfigError
from mrl.swap.config import SwapConfig
from mrl.swap.grid import Grid


@dataclass
class Site:
    """One attention module inside a model, as an adapter sees it.

    Args:
        name: dotted name in the model.
        module: the attention module.
        owner: the network around it that knows the patch embedding.
        num_prefix_tokens: P, leading tokens off the grid.
        grid_from: where (H, W) will be read.
        extras: what is handled besides plain attention, for the plan's table.
        reason: why it cannot be swapped; empty where it can.
        adapter: name of the adapter that answered.
        hook: the module whose output (B, C, H, W) shows the grid, where the adapter does not find it by the owner.
    """

    name: str
    module: nn.Module
    owner: nn.Module | None = None
    num_prefix_tokens: int = 0
    grid_from: str = ""
    extras: list[str] = field(default_factory=list)
    reason: str = ""
    adapter: str = ""
    hook: nn.Module | None = None


class Adapter(Protocol):
    """What a family provides; `mrl.swap.adapters.base.AdapterBase` has the parts that are mostly the same."""

    name: str
    layout: str

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""

    def grid(self, site: Site) -> Grid:
        """A new grid for the site's network."""

    def hook_point(self, site: Site) -> nn.Module | None:
        """The module whose output shows the grid, if there is one."""

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's child modules."""

    def stand_in(self, mixer: nn.Module) -> nn.Module:
        """A module of the original's class and attributes with the mixer's inherited children, to describe the base."""

    def original(self, site: Site) -> nn.Module:
        """The module that is exchanged, in the form in which it is called once `enter` was."""

    def enter(self, parent: nn.Module) -> None:
        """Prepares what surrounds the module, where it must call a replacement otherwise than the original."""

    def leave(self, parent: nn.Module) -> None:
        """Undoes `enter`."""

    def call(self, site: Site, x: torch.Tensor, grid: tuple[int, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How the network calls the module on these tokens: arguments and keyword arguments."""

    def call_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """The (H, W) that a call itself tells; None where it does not."""

    def probe_grid(self, site: Site, region: tuple[int, int]) -> tuple[int, int]:
        """A small grid on which a replacement is tried."""

    def probe_input(self, site: Site, grid: tuple[int, int], batch: int) -> torch.Tensor:
        """A random input of the module on this grid."""


_ADDED: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> None:
    """Adds a family of attention modules that `mrl.plan` then knows; yours are asked before the built-in ones.

    Args:
        adapter: an object with the methods of `Adapter`, most simply a subclass of `mrl.swap.adapters.base.AdapterBase`;
            `mrl.testing.check_adapter` tells whether it keeps the contract.

    Raises:
        ConfigError: a name that is taken, or a method that is missing.

    Example:
        >>> from mrl.swap.adapters.timm import TimmViT
        >>> register_adapter(TimmViT())
        Traceback (most recent call last):
        mrl.errors.ConfigError: register_adapter: the name timm_vit is taken; give your adapter another.
    """
    methods = [n for n in vars(Adapter) if not n.startswith("_") and callable(getattr(Adapter, n))]
    missing = [n for n in ("name", *methods) if not getattr(adapter, n, None)]
    if missing:
        raise ConfigError(f"register_adapter: {type(adapter).__name__} has no {', '.join(missing)}; see AdapterBase.")
    if adapter.name in adapters():
        raise ConfigError(f"register_adapter: the name {adapter.name} is taken; give your adapter another.")
    _ADDED[adapter.name] = adapter


def adapters() -> dict[str, Any]:
    """The adapters by name, in the order in which they are asked.

    Example:
        >>> list(adapters())
        ['timm_vit', 'timm_rope', 'timm_beit', 'windows', 'pyramid', 'transformers_vit', 'torch_attention']
    """
    return {**_ADDED, **_built_in()}


@functools.cache
def _built_in() -> dict[str, Any]:
    from mrl.swap.adapters.pyramid import Pyramid
    from mrl.swap.adapters.timm import TimmViT
    from mrl.swap.adapters.timm_beit import TimmBeit
    from mrl.swap.adapters.timm_rope import TimmRope
    from mrl.swap.adapters.torch_nn import TorchAttention
    from mrl.swap.adapters.transformers_vit import TransformersViT
    from mrl.swap.adapters.windows import Windows

    known = (TimmViT(), TimmRope(), TimmBeit(), Windows(), Pyramid(), TransformersViT(), TorchAttention())
    return {adapter.name: adapter for adapter in known}
