"""What is found in one image file, and many files at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mrl.data.hashing import perceptual_hash, pixel_hash
from mrl.data.images import decode
from mrl.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageRecord:
    """What was found in one readable image.

    Args:
        sha256: of the file.
        pixels: of the picture; equal for copies in any format.
        phash: perceptual hash, 16 hexadecimal digits; empty for a flat picture.
        size: "width x height" as "300x300".
        mode: of the file, such as "L" or "RGB;16".
        bits: of one channel.
        frames: pictures in the file; the first is used.
    """

    sha256: str
    pixels: str
    phash: str
    size: str
    mode: str
    bits: int
    frames: int = 1


def inspect_image(path: Path, bit_depth: int | None) -> ImageRecord | str:
    """What is in the file, or why it is bad.

    Example:
        >>> inspect_image(Path("gone.png"), None)
        'cannot be read (No such file or directory)'
    """
    try:
        data = path.read_bytes()
        decoded = decode(data, bit_depth=bit_depth)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except DataError as error:
        return str(error)
    code = perceptual_hash(decoded)
    height, width = decoded.values.shape[:2]
    sha256 = hashlib.sha256(data).hexdigest()
    phash = "" if code is None else f"{code:016x}"
    return ImageRecord(
        sha256, pixel_hash(decoded), phash, f"{width}x{height}", decoded.mode, decoded.bits, decoded.frames
    )


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` on as many threads as there are cores (8 at most); decoding leaves Python's lock.

    Example:
        >>> list(in_threads(len, ["a", "bb"]))
        [1, 2]
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(8, cores)) as pool:
        yield from pool.map(work, items)
