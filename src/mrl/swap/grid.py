"""Where the height and width of a token sequence come from."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from mrl.errors import SwapError


class Grid:
    """The (H, W) of the tokens that a model works on now, shared by its swapped modules.

    In order: `fixed` (`handle.fix_grid`), what the patch embedding made last (a forward hook: this object is the hook),
    the size the model was built for, and the square root with a warning. H * W must equal the number of patch tokens:
    16 x 36 and 24 x 24 both have 576 tokens, and guessing is the classic bug.

    Args:
        built_for: the (H, W) of a model with one input size, or None.
        owner: the network whose `grad_checkpointing` flag is watched, or None.

    Example:
        >>> Grid((2, 3)).size(6)
        (2, 3)
    """

    def __init__(self, built_for: tuple[int, int] | None = None, owner: nn.Module | None = None) -> None:
        self.built_for = built_for
        self.fixed: tuple[int, int] | None = None
        self.seen: tuple[int, int] | None = None
        self.owner = [owner]  # in a list, so that the network does not become a child of its parts

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """The forward hook on the patch-embedding convolution, whose output is (B, C, H, W)."""
        seen = (int(output.shape[-2]), int(output.shape[-1]))
        if self.seen not in (None, seen) and torch.is_grad_enabled() and _recomputes(self.owner[0]):
            raise SwapError(
                f"gradient checkpointing with images of two sizes (tokens {self.seen} and {seen}): the second pass could "
                "recompute the first on the wrong grid; train on one size, or call set_grad_checkpointing(False)."
            )
        self.seen = seen

    def size(self, tokens: int) -> tuple[int, int]:
        """The (H, W) of this many patch tokens.

        Raises:
            SwapError: no source knows a grid with that many tokens.
        """
        if self.fixed is not None:
            return self._checked(self.fixed, tokens, "fix_grid")
        if self.seen is not None:
            return self._checked(self.seen, tokens, "the patch embedding")
        if self.built_for is not None and math.prod(self.built_for) == tokens:
            return self.built_for
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise SwapError(f"{tokens} patch tokens and no grid: run the whole model, or call handle.fix_grid((H, W)).")
        warnings.warn(
            f"{tokens} patch tokens and no grid: taken for {side} x {side}; call handle.fix_grid((H, W)).", stacklevel=2
        )
        return side, side

    @staticmethod
    def _checked(grid: tuple[int, int], tokens: int, source: str) -> tuple[int, int]:
        if math.prod(grid) != tokens:
            raise SwapError(
                f"{source} says a grid of {grid[0]} x {grid[1]} = {math.prod(grid)} positions, but {tokens} patch tokens came: "
                "tokens were dropped, packed or added on the way, which regions cannot follow."
            )
        return grid


def _recomputes(owner: nn.Module | None) -> bool:
    """Whether a network is set to gradient checkpointing, in the words of timm or transformers (the last is its older one)."""
    names = ("grad_checkpointing", "is_activation_checkpointing", "is_gradient_checkpointing")
    return next((bool(getattr(owner, name)) for name in names if name in dir(owner)), False)
