"""Files of more than 8 bits a channel that Pillow would reduce to 8: colour PNG and TIFF, and netpbm."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
from PIL import Image

from mrl.errors import DataError

OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
"""The byte order that makes Pillow take the low byte of a sample where it would take the high one."""


def read_wide(data: bytes) -> np.ndarray:
    """Decodes a 16-bit PNG or TIFF in colour, or a PNG of grey and alpha, as (H, W, 3) or (H, W) uint16.

    Pillow unpacks such files by the high byte of each sample. Asked to unpack them in the other byte order, it gives
    the low bytes; the two make the value. Transparency is dropped; the orientation of a TIFF is applied, that of a PNG
    is not.

    Raises:
        DataError: Pillow stores this kind in another way (planes apart, colours multiplied by alpha, CMYK).

    Example:
        >>> import struct, zlib
        >>> def chunk(name, body):
        ...     return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        >>> head, body = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), struct.pack(">xHHH", 1, 256, 65535)
        >>> png = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
        >>> read_wide(bytes([137, 80, 78, 71, 13, 10, 26, 10]) + png).tolist()
        [[[1, 256, 65535]]]
    """
    with Image.open(io.BytesIO(data)) as image:
        kind = _kind(image)
    if kind == "LA;16B":  # four bytes a pixel: the two of grey, the two of alpha
        grey = _unpacked(data, "RGBA").astype(np.uint16)
        return grey[..., 0] << 8 | grey[..., 1]
    if kind[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16"):
        raise DataError(f"is a 16-bit file of a kind ({kind}) that would lose range; save it as 16-bit RGB PNG")
    high = _unpacked(data, kind).astype(np.uint16)
    low = _unpacked(data, kind[:-1] + OTHER_BYTE[kind[-1]])
    return (high << 8 | low)[..., :3]


def _kind(image: Image.Image) -> str:
    """How Pillow will unpack the image: "RGB;16B" and so on."""
    arguments = image.tile[0].args
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _unpacked(data: bytes, kind: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        tiles = []
        for tile in image.tile:
            rest = () if isinstance(tile.args, str) else tile.args[1:]
            tiles.append(tile._replace(args=(kind, *rest) if rest else kind))
        image.tile = tiles
        image.load()
        return np.asarray(image)


def has_whole_directory(data: bytes) -> bool:
    r"""Whether the first directory of a classic TIFF lies within the file; Pillow reads what there is of it in silence.

    Example:
        >>> has_whole_directory(b"II*\0\x08\0\0\0\x05\0")
        False
    """
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(f"{order}H", data, 2)[0] != 42:  # a BigTIFF
        return True
    start = struct.unpack_from(f"{order}L", data, 4)[0]
    return start + 2 <= len(data) and start + 2 + 12 * struct.unpack_from(f"{order}H", data, start)[0] <= len(data)


def read_netpbm(data: bytes) -> tuple[np.ndarray, int] | None:
    r"""Decodes a PGM or PPM of more than 8 bits as (H, W) or (H, W, 3) uint16 with its maximum; None for others.

    Raises:
        DataError: it ends early, or holds a value above its own maximum.

    Example:
        >>> values, maximum = read_netpbm(b"P5 2 1 4095\n" + bytes([15, 255, 0, 1]))
        >>> values.tolist(), maximum
        ([[4095, 1]], 4095)
    """
    channels = {b"P2": 1, b"P3": 3, b"P5": 1, b"P6": 3}.get(data[:2])
    if channels is None:
        return None
    numbers, end = [], 2
    while len(numbers) < 3:
        word, end = _word(data, end)
        numbers.append(int(word))
    width, height, maximum = numbers
    if maximum < 256:
        return None
    count = width * height * channels
    if data[:2] in (b"P5", b"P6"):
        body = data[end + 1 : end + 1 + 2 * count]
        values = np.frombuffer(body[: len(body) // 2 * 2], dtype=">u2").astype(np.uint16)
    else:
        lines = (line.split(b"#", 1)[0] for line in data[end:].splitlines())
        values = np.array(b" ".join(lines).split()[:count], dtype=np.int64)
    if values.size < count:
        raise DataError(f"is truncated ({values.size} of {count} values)")
    if values.max() > maximum:
        raise DataError(f"has a value of {values.max()}, above its own maximum of {maximum}")
    values = values.astype(np.uint16).reshape(height, width, channels)
    return (values[..., 0] if channels == 1 else values), maximum


def _word(data: bytes, start: int) -> tuple[bytes, int]:
    """The next word of a netpbm header and where it ends; comments run from # to the end of a line."""
    while start < len(data) and (data[start : start + 1].isspace() or data[start : start + 1] == b"#"):
        if data[start : start + 1] == b"#":
            start = data.find(b"\n", start) % (len(data) + 1)
        else:
            start += 1
    end = start
    while end < len(data) and not data[end : end + 1].isspace():
        end += 1
    return data[start:end], end
