"""One adapter a family of attention modules: what it can take over, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

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
    """

    name: str
    module: nn.Module
    owner: nn.Module | None = None
    num_prefix_tokens: int = 0
    grid_from: str = ""
    extras: list[str] = field(default_factory=list)
    reason: str = ""
    adapter: str = ""


class Adapter(Protocol):
    """What a family provides."""

    name: str
    layout: str

    def site(self, model: nn.Module, name: str, module: nn.Module) -> Site | None:
        """The module's site, with a reason where it cannot be swapped; None if it is not of this family."""

    def grid(self, site: Site) -> Grid:
        """A new grid for the site's network."""

    def hook_point(self, site: Site) -> nn.Module | None:
        """The module whose output shows the grid."""

    def build(self, site: Site, region: tuple[int, int], config: SwapConfig, grid: Grid) -> nn.Module:
        """The replacement, sharing the original's child modules."""

    def stand_in(self, mixer: nn.Module) -> nn.Module:
        """A module of the original's class and attributes with the mixer's inherited children, to describe the base."""

    def probe_input(self, site: Site, grid: tuple[int, int], batch: int) -> torch.Tensor:
        """A random input of the module on this grid."""


def adapters() -> dict[str, Any]:
    """The adapters by name, in the order in which they are asked.

    Example:
        >>> list(adapters())
        ['timm_vit']
    """
    from mrl.swap.adapters.timm import TimmViT

    return {adapter.name: adapter for adapter in (TimmViT(),)}
