"""Operators: tensors in, tensors out; torch only."""

from mrl.blocks.common_qkv import CommonBasis, CommonQKVAttention
from mrl.blocks.fold import fold_
from mrl.blocks.group_conv import LocalGroupConv, P4MConv2d, p4m_inverse, p4m_product, p4m_transform
from mrl.blocks.mixer import RegionalLocalMixer
from mrl.blocks.regions import (
    LocalConv,
    RegionConv,
    RegionNorm,
    add_regions,
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
    "CommonBasis",
    "CommonQKVAttention",
    "LocalConv",
    "LocalGroupConv",
    "P4MConv2d",
    "RegionConv",
    "RegionNorm",
    "RegionalLocalMixer",
    "add_regions",
    "attend",
    "broadcast_regions",
    "divisors",
    "fold_",
    "p4m_inverse",
    "p4m_product",
    "p4m_transform",
    "pad_to_regions",
    "region_grid",
    "region_mean",
    "region_pair",
    "valid_counts",
]
