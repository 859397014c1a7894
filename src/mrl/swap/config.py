"""How an attention module is exchanged: `SwapConfig` and its named settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mrl.errors import ConfigError, SwapError
from mrl.swap.match import matches

Region = int | tuple[int, int] | Mapping[str, int | tuple[int, int]]


@dataclass(frozen=True)
class SwapConfig:
    """How a softmax attention becomes a regional one.

    The defaults start closest to the trained model ("faithful"): with `region=1` the swapped model equals the original.

    Args:
        reduce: how a region becomes one token. "depthwise" projects every position and learns the average (the paper's
            freedom); "mean" averages, and computes q (k, v too where nothing else needs them) per region only.
        local_source: what the local convolution sees beside the regional tokens: the full-resolution "value" map (what
            the output projection was trained on) or the module's "input" (the paper's).
        local_gain: weight of the local source; 0 starts with regional mixing only, 1 is the paper's.
        learn_local_gain: "channel" or "scalar" makes the gain a parameter that starts at `local_gain`; None fixes it.
        group_size: channels per group of the local convolution; 1 is depthwise.
        kernel_size: side of the local convolution's kernel, odd; 1 mixes channels only (and nothing with `group_size=1`),
            3 is the paper's, 7 reaches three positions to each side.
        prefix: "exact" lets CLS and register tokens attend to every position as before; "region" sends them with the
            region tokens, which is cheaper.
        bias: what to do with attention masks and biases: "pool" pools them to regions, "error" refuses them.
        on_unsupported: "error" refuses a plan with targeted modules that cannot be swapped; "skip" leaves them alone.
        keep_original: keep what `handle.restore()` and `handle.disabled()` need (a copy of the attention weights).

    Raises:
        SwapError: a value that is not one of those above.

    Reference:
        The starting points are those of "Starting close to the teacher" in our swap notes; the block is arXiv:2208.13975.

    Example:
        >>> SwapConfig().reduce, SwapConfig.named("cheap").reduce
        ('depthwise', 'mean')
    """

    reduce: Literal["depthwise", "mean"] = "depthwise"
    local_source: Literal["value", "input"] = "value"
    local_gain: float = 0.0
    learn_local_gain: Literal["scalar", "channel"] | None = "channel"
    group_size: int = 1
    kernel_size: int = 3
    prefix: Literal["exact", "region"] = "exact"
    bias: Literal["pool", "error"] = "pool"
    on_unsupported: Literal["error", "skip"] = "error"
    keep_original: bool = True

    def __post_init__(self) -> None:
        allowed = {
            "reduce": ("depthwise", "mean"),
            "local_source": ("value", "input"),
            "learn_local_gain": ("scalar", "channel", None),
            "prefix": ("exact", "region"),
            "bias": ("pool", "error"),
            "on_unsupported": ("error", "skip"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise SwapError(
                    f"SwapConfig({name}={getattr(self, name)!r}): use one of {', '.join(map(repr, values))}."
                )
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise SwapError(f"SwapConfig(group_size={self.group_size!r}): use a whole number from 1.")
        if type(self.kernel_size) is not int or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise SwapError(f"SwapConfig(kernel_size={self.kernel_size!r}): the local kernel is odd; use 1, 3, 5 or 7.")
        if not isinstance(self.local_gain, (int, float)) or not math.isfinite(self.local_gain):
            raise SwapError(f"SwapConfig(local_gain={self.local_gain!r}): use a number, such as 0 or 1.")

    @classmethod
    def named(cls, name: str) -> SwapConfig:
        """A named setting: "faithful", "cheap" or "paper".

        Args:
            name: "faithful" starts closest to the trained model; "cheap" works at region resolution only and is the
                fastest at any size; "paper" is the published topology.

        Raises:
            ConfigError: another name.
        """
        if name not in SETTINGS:
            raise ConfigError(f"--swap {name}: unknown; use {', '.join(SETTINGS)} or auto.")
        return SETTINGS[name]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return dataclasses.asdict(self)


SETTINGS = {
    "faithful": SwapConfig(),
    "cheap": SwapConfig(reduce="mean", local_source="input", prefix="region"),
    "paper": SwapConfig(local_source="input", local_gain=1.0, learn_local_gain=None, prefix="region"),
}


def region_of(region: Region, name: str) -> tuple[int, int]:
    """The region (rows, columns) that a module of this name gets.

    Args:
        region: whole number, (rows, columns), or {pattern: either} where a pattern is a regular expression or a dotted suffix.
        name: dotted name of the module.

    Raises:
        SwapError: a size below 1, or no pattern that matches `name`.

    Example:
        >>> region_of({"blocks.1.attn": 4, ".*": 2}, "blocks.1.attn")
        (4, 4)
    """
    if isinstance(region, Mapping):
        for pattern, value in region.items():
            if matches(pattern, name):
                return region_of(value, name)
        raise SwapError(f"plan(region=...): no pattern of {list(region)} matches {name}; add one, such as '.*'.")
    pair = (region, region) if isinstance(region, int) else tuple(region) if isinstance(region, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise SwapError(f"region={region!r}: use a whole number of positions from 1, or (rows, columns).")
    return pair
