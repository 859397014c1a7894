"""What passes through attention modules: recorded calls, and how far two answers lie apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class Call:
    """One call of an attention module: its arguments, detached, and its answer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def run(self, module: nn.Module) -> Any:
        """The same call of another module."""
        return module(*self.args, **self.kwargs)


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in arguments or an answer.

    Example:
        >>> import torch
        >>> first_tensor(((), {"x": [torch.ones(1)]}))
        tensor([1.])
    """
    return next((t for t in tree_leaves(values) if isinstance(t, Tensor)), None)


def rows_of(mixer: nn.Module, output: Any) -> Tensor:
    """The tokens (B, N, C) of what an attention module returned."""
    tokens = output[0] if isinstance(output, (tuple, list)) else output
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens  # (B, H, W, C)
    return tokens.transpose(0, 1) if getattr(mixer, "sequence_first", False) else tokens


def normalised(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared distance over the squared size of the second, (): 0 is equal, 1 is as far away as saying nothing.

    Example:
        >>> import torch
        >>> float(normalised(torch.zeros(2), torch.ones(2)))
        1.0
    """
    return (ours - theirs).square().sum() / theirs.square().sum().clamp(min=1e-12)
