"""Small image files for the tests of `mrl.data`, some of kinds that Pillow cannot write."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def draw(seed: int, size: int = 16) -> np.ndarray:
    """(size, size) uint8 with some structure; another picture for another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def scene(seed: int, size: int = 128) -> np.ndarray:
    """(size, size) uint8 with detail at every scale, as photographs have."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1
    noise = np.random.default_rng(seed).standard_normal((size, size))
    values = np.fft.ifft2(np.fft.fft2(noise) / frequency).real
    return (255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)


def class_folders(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    """A folder of class folders with different pictures: `counts` of each class."""
    seed = first
    for label, n in counts.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(draw(seed)).save(root / label / f"{i:03d}.png")
            seed += 1
    return root


def wide_png(values: np.ndarray) -> bytes:
    """A 16-bit PNG of (H, W, C) uint16 with 1 to 4 channels, with every row filter in turn."""
    height, width, channels = values.shape
    step, previous, body = 2 * channels, bytes(2 * channels * width), b""
    for y, row in enumerate(values.astype(">u2").reshape(height, -1)):
        now = row.tobytes()
        body += bytes([y % 5]) + bytes(
            (
                v
                - _predicted(
                    y % 5, now[i - step] if i >= step else 0, previous[i], previous[i - step] if i >= step else 0
                )
            )
            % 256
            for i, v in enumerate(now)
        )
        previous = now
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(width, height, 16, color, body)


def png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    """A PNG of rows that begin with their filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(values: np.ndarray, *, order: str = "<", packed: bool = False, extra: dict[int, int] | None = None) -> bytes:
    """An unsigned TIFF of (H, W) or (H, W, C) uint16, in one strip; `packed`: deflate with the horizontal predictor."""
    height, width, channels = (*values.shape, 1)[:3]
    samples = values.reshape(height, width, channels).astype(np.uint16)
    if packed:
        samples = np.diff(samples, axis=1, prepend=np.uint16(0))
    strip = samples.astype(f"{order}u2").tobytes()
    strip = zlib.compress(strip) if packed else strip
    bits = 8 + len(strip) + len(strip) % 2
    tags = {256: width, 257: height, 259: 8 if packed else 1, 262: 2 if channels > 1 else 1, 273: 8, 277: channels}
    tags |= (
        {278: height, 279: len(strip), 317: 2 if packed else 1} | ({338: 2} if channels == 4 else {}) | (extra or {})
    )
    entries = {tag: struct.pack(f"{order}HHLL", tag, 4, 1, value) for tag, value in tags.items()}
    one = struct.pack(f"{order}HHLHH", 258, 3, 1, 16, 0)
    entries[258] = one if channels == 1 else struct.pack(f"{order}HHLL", 258, 3, channels, bits)
    table = struct.pack(f"{order}{channels}H", *[16] * channels)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", bits + len(table))
    return head + strip + bytes(len(strip) % 2) + table + directory


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind < 4:
        return (0, left, up, (left + up) // 2)[kind]
    guess = left + up - corner
    return min((left, up, corner), key=lambda v: abs(guess - v))
