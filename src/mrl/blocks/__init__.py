"""Operators: tensors in, tensors out; torch only."""

from mrl.blocks.regions import (
    LocalConv,
    RegionConv,
    RegionNorm,
    attend,
    broadcast_regions,
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
    "attend",
    "broadcast_regions",
    "pad_to_regions",
    "region_grid",
    "region_mean",
    "region_pair",
    "valid_counts",
]
