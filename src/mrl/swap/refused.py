"""Attention that regions cannot stand in for, by the name of its class, with the reason."""

from __future__ import annotations

CHANNELS = "it attends among channels, not positions: there is nothing to pool"
SAMPLED = "deformable attention samples positions; it has no keys to pool"
REASONS = {
    "XCA": CHANNELS,
    "XcitAttention": CHANNELS,
    "ChannelAttention": CHANNELS,
    "ChannelAttentionV2": CHANNELS,
    "MultiScaleAttention": "it pools its queries, so its output is on another grid than its input (MViT)",
    "YolosAttention": "its detection tokens stand at the end of the sequence, which regions do not follow yet",
    "Mask2FormerAttention": "a decoder's attention: its queries are on no grid",
    "Mask2FormerMaskedAttentionDecoderLayer": "a decoder's attention: its queries are on no grid",
}


def refused(kind: str) -> str:
    """Why a module of this class cannot be swapped; empty where nothing is known against it.

    Example:
        >>> refused("XCA")
        'it attends among channels, not positions: there is nothing to pool'
        >>> refused("Linear")
        ''
    """
    return REASONS.get(kind) or (SAMPLED if "Deformable" in kind and "Attention" in kind else "")
