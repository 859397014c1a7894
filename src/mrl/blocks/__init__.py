"""Operators: tensors in, tensors out; torch only."""

from mrl.blocks.mixer import RegionalLocalMixer
from mrl.blocks.regions import (
    LocalConv,
    RegionConv,
    RegionNorm,
    attend,
    broadcast_regions,
    divisors,
    pad_to_regions,
    region_grid,
    region_mean,
    region_pair,
    valid_counts,
)

__all__ = [
    "LocalConv",
    "RegionConv",
    "RegionNorm",
    "RegionalLocalMixer",
    "attend",
    "broadcast_regions",
    "divisors",
    "pad_to_regions",
    "region_grid",
    "region_mean",
    "region_pair",
    "valid_counts",
]
