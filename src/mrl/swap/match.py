"""Which modules a pattern means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from mrl.errors import SwapError

Target = str | Sequence[str] | Callable[[str, nn.Module], bool]


def matches(pattern: str, name: str) -> bool:
    r"""Whether a pattern means a module: its whole name as a regular expression, or a dotted suffix of it.

    Example:
        >>> matches("blocks.1", "blocks.1"), matches("blocks.1", "blocks.10"), matches(r"blocks\.[01]\.attn", "blocks.0.attn")
        (True, False, True)
    """
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise SwapError(f"pattern {pattern!r}: not a regular expression ({error}).") from error


def selected(target: Target, name: str, module: nn.Module) -> bool:
    """Whether `target` (a regular expression, a list of dotted suffixes, or a function) means this module.

    Example:
        >>> selected(["layers.1"], "net.layers.1", nn.Identity()), selected(["layers.1"], "net.layers.10", nn.Identity())
        (True, False)
    """
    if callable(target):
        return bool(target(name, module))
    if isinstance(target, str):
        try:
            return re.fullmatch(target, name) is not None
        except re.error as error:
            raise SwapError(f"target {target!r}: not a regular expression ({error}).") from error
    return any(name == suffix or name.endswith("." + suffix) for suffix in target)


def closest(wanted: str, names: Iterable[str], n: int = 5) -> list[str]:
    """The names most like `wanted`, best first.

    Example:
        >>> closest("block.0.attn", ["blocks.0.attn", "head"])
        ['blocks.0.attn']
    """
    return difflib.get_close_matches(wanted, list(names), n=n, cutoff=0.4)
