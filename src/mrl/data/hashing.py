"""Equal and similar pictures, found by hashes of their pixels."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mrl.data.images import Decoded

SIDE = 32
FREQUENCIES = 8
FLAT = 1e-3
"""Below this spread (as a share of white) a picture shows nothing, and resembles every other that shows nothing."""


def pixel_hash(decoded: Decoded) -> str:
    """SHA-256 of what a model would see: the same for one picture as PNG, BMP or TIFF, in 8 or 16 bits, grey or RGB.

    Example:
        >>> grey = Decoded(np.full((2, 2), 7, np.uint8), 255.0, "L", 8)
        >>> wide = Decoded(np.full((2, 2, 3), 7 * 257, np.uint16), 65535.0, "RGB;16", 16)
        >>> pixel_hash(grey) == pixel_hash(wide)
        True
    """
    values, maximum = decoded.values, decoded.maximum
    if values.ndim == 3 and (values[..., :1] == values).all():
        values = values[..., 0]
    if maximum == 65535 and values.dtype == np.uint16 and not (values % 257).any():
        values, maximum = (values // 257).astype(np.uint8), 255.0
    if values.dtype != np.uint8 or maximum != 255:
        values = values.astype(np.float32) / np.float32(maximum)
    digest = hashlib.sha256(f"{values.dtype} {values.shape}".encode())
    digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()


def perceptual_hash(decoded: Decoded) -> int | None:
    """A 64-bit hash that hardly changes with size, compression, brightness or contrast; None for a flat picture.

    The grey picture at 32 x 32, its cosine transform at the 8 x 8 lowest frequencies without the constant ones, one bit
    each: above their median.

    Reference:
        C. Zauner, Implementation and benchmarking of perceptual image hash functions, 2010 (pHash, DCT variant).

    Example:
        >>> ramp = np.linspace(0, 255, 64, dtype=np.uint8) * np.ones((64, 1), np.uint8)
        >>> ramp[:20] //= 2
        >>> darker = ramp // 4 * 3
        >>> first, second = (perceptual_hash(Decoded(v, 255.0, "L", 8)) for v in (ramp, darker))
        >>> (first ^ second).bit_count() <= 4
        True
    """
    values = decoded.values
    if values.ndim == 3:
        values = values @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = Image.fromarray(values.astype(np.float32) / np.float32(decoded.maximum))
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    if np.ptp(small) < FLAT:
        return None
    basis = _cosines()
    coefficients = (basis @ small @ basis.T).ravel()
    bits = coefficients > np.median(coefficients)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(
    hashes: Sequence[int | None], *, distance: int = 4, limit: int = 1_000_000
) -> list[tuple[int, int, int]]:
    """Pairs `(i, j, d)`, i < j, of hashes that differ in d <= `distance` bits; the first `limit` of them by i.

    Args:
        hashes: 64-bit hashes; None is near to nothing.
        distance: bits; 0 finds equal hashes only, 64 every pair.
        limit: stop beyond so many pairs.

    Example:
        >>> near_pairs([0b0000, 0b0111, None, 0xFFFF])
        [(0, 1, 3)]
    """
    index = np.array([i for i, h in enumerate(hashes) if h is not None], dtype=np.int64)
    codes = np.array([h for h in hashes if h is not None], dtype=np.uint64)
    pairs: list[tuple[int, int, int]] = []
    block = max(1, 4_000_000 // max(1, len(codes)))  # 32 MB of distances at a time
    for start in range(0, len(codes), block):
        rest = codes[start:]
        bits = np.bitwise_count(codes[start : start + block, None] ^ rest[None, :])
        rows, columns = np.nonzero(bits <= distance)
        keep = columns > rows
        rows, columns = rows[keep], columns[keep]
        found = zip(
            index[start + rows].tolist(), index[start + columns].tolist(), bits[rows, columns].tolist(), strict=True
        )
        pairs.extend(found)
        if len(pairs) >= limit:
            return pairs[:limit]
    return pairs


@functools.cache
def _cosines() -> np.ndarray:
    """(8, 32) rows 1 to 8 of the orthonormal cosine transform."""
    k, n = np.arange(1, FREQUENCIES + 1)[:, None], np.arange(SIDE)[None, :]
    return np.sqrt(2 / SIDE) * np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))
