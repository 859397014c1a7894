"""One image file -> numbers, whatever its mode and bit depth, without losing range."""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import struct
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from mrl.data.wide import has_whole_directory, read_netpbm, read_wide
from mrl.errors import ConfigError, DataError

ORIENTATION = 0x0112
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
# By content; Pillow knows more, and some of those start programs (EPS).
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF")
PAGED = ("GIF", "TIFF", "WEBP", "PNG")
GREY = ("L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
ADVICE = "replace the file, or take it out"


@dataclass(frozen=True)
class Decoded:
    """The numbers of an image file as they are stored, and what they are a fraction of.

    Args:
        values: (H, W) grey or (H, W, 3) RGB; uint8, uint16, int32 or float32.
        maximum: the value that means 1.0; None where the file's type does not say.
        mode: of the file, such as "L", "RGB", "I;16", "RGB;16".
        bits: of one channel in the file.
        frames: how many pictures the file holds, where they were counted; the first one is here.
        inverted: whether `maximum` means black.
    """

    values: np.ndarray
    maximum: float | None
    mode: str
    bits: int
    frames: int = 1
    inverted: bool = False

    def tensor(self) -> Tensor:
        """(3, H, W) float32 in [0, 1]; a grey image is one channel seen three times, without a copy."""
        array = np.ascontiguousarray(self.values if self.values.ndim == 2 else self.values.transpose(2, 0, 1))
        pixels = torch.from_numpy(array.astype(np.float32)) / self.maximum
        return pixels.expand(3, *pixels.shape) if pixels.ndim == 2 else pixels


def read_image(path: Path | str, *, bit_depth: int | None = None) -> Tensor:
    """Reads an image as (3, H, W) float32 in [0, 1] = value / maximum of the file's type.

    Grey becomes three equal channels (one channel seen three times, without a copy). Transparency is dropped, not
    blended: the colours under it stay as they are. Palettes, CMYK and YCbCr become RGB. The EXIF orientation is
    applied. 16 bits stay 16 bits, in colour too. Of an animation or of pages the first is read. Nothing is written.

    Args:
        path: the file.
        bit_depth: how many bits of the file's type are in use, where a camera fills fewer than the type has: with 12,
            4095 in a 16-bit file means 1.0. Files of fewer bits (an 8-bit JPEG beside them) keep their own maximum.
            32-bit integers, and floats outside [0, 1], have no maximum of their own and need it.

    Shape:
        (3, H, W).

    Raises:
        DataError: the file is missing, a pipe or device, truncated, not an image, too large, or has values above `bit_depth`.
        ConfigError: `bit_depth` is not a whole number from 1 to 32.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "half.png"
        >>> Image.fromarray(np.full((2, 3), 32768, np.uint16)).save(path)
        >>> image = read_image(path)
        >>> tuple(image.shape), round(float(image[0, 0, 0]), 4)
        ((3, 2, 3), 0.5)
    """
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind) or stat.S_ISSOCK(kind):  # reading it might never end
            raise DataError(f"{path}: is a pipe or a device, not a file; give an image file.")
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); check the path and its rights.") from error
    try:
        return decode(data, bit_depth=bit_depth, count=False).tensor()
    except DataError as error:
        raise DataError(f"{path}: {error}{'' if ';' in str(error) else f'; {ADVICE}'}.") from error


def header_of(file: bytes | Path | str) -> tuple[int, int, str] | None:
    """Width, height and mode as the file's header says, before a pixel is decoded; None where it is no image.

    Raises:
        DataError: a header that says more pixels than Pillow opens.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("L", (40, 30)).save(buffer, "png")
        >>> header_of(buffer.getvalue())
        (40, 30, 'L')
    """
    with _QUIET:
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
                return (*image.size, image.mode)
        except Image.DecompressionBombError:
            raise DataError(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller") from None
        except Exception:  # whatever a broken header raises; reading it says why
            return None


def decode(data: bytes, *, bit_depth: int | None = None, count: bool = True) -> Decoded:
    """Decodes the bytes of an image file as `read_image` describes.

    Args:
        data: the file's bytes.
        bit_depth: as for `read_image`.
        count: count the pictures of an animation or the pages of a TIFF, which takes long where there are thousands.

    Raises:
        DataError: the reason, without the file's name.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("1", (4, 2), 1).save(buffer, "png")
        >>> decoded = decode(buffer.getvalue())
        >>> decoded.mode, decoded.values.shape, int(decoded.values.max()), decoded.maximum
        ('1', (2, 4), 255, 255.0)
    """
    if bit_depth is not None and (not isinstance(bit_depth, int) or not 1 <= bit_depth <= 32):
        raise ConfigError(f"--bit-depth {bit_depth}: must be a whole number from 1 to 32, such as 12.")
    if not data:
        raise DataError("the file is empty")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ConfigError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides broken images; set it to False.")
    with _QUIET:
        found = _decode(data, count)
    return _scaled(found, bit_depth)


def _decode(data: bytes, count: bool) -> Decoded:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise DataError(f"has {image.width} x {image.height} pixels, more than {limit:,}; make it smaller")
            return _pixels(image, data, count)
    except UnidentifiedImageError:
        raise DataError("is not an image of a kind that is read here, whatever its name says") from None
    except Image.DecompressionBombError:
        raise DataError(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller") from None
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly anything on a broken file
        what = "is truncated" if "truncated" in str(error).lower() else "cannot be decoded"
        raise DataError(f"{what} ({error})") from error


def _pixels(image: Image.Image, data: bytes, count: bool) -> Decoded:
    frames = getattr(image, "n_frames", 1) if count and image.format in PAGED else 1
    if image.format == "PPM" and (exact := read_netpbm(data)) is not None:
        values, maximum = exact
        return Decoded(values, float(maximum), "I;16" if values.ndim == 2 else "RGB;16", maximum.bit_length())
    if image.format == "TIFF" and not has_whole_directory(data):
        raise DataError("is truncated (its TIFF directory is not complete)")
    bits, mode = _bits(image, data), image.mode
    inverted = image.format == "TIFF" and mode.startswith("I") and image.tag_v2.get(PHOTOMETRIC) == 0
    image.load()  # the whole file: truncation shows here
    turn = _orientation(image)  # of a TIFF Pillow has undone it by now
    if bits == 16 and mode not in GREY:
        values = read_wide(data)
        return Decoded(_turned(values, turn), 65535.0, f"{'LA' if values.ndim == 2 else mode};16", 16, frames)
    values = _turned(_array(image), turn)
    return Decoded(values, _maximum(image, values, bits), mode, bits, frames, inverted)


def _array(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in GREY:
        return np.asarray(image)
    if image.mode in ("1", "LA"):
        return np.asarray(image.convert("L"))
    if image.mode in ("La", "RGBa"):  # multiplied by their alpha: undo that first
        return _array(image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode]))
    return np.asarray(image.convert("RGB"))


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of a channel: as the file says for PNG and TIFF (fewer than 8 are stretched to 8), else 8."""
    if image.format == "PNG":
        return max(8, data[24])
    if image.format == "TIFF":
        return max(8, *(int(n) for n in image.tag_v2.get(BITS_PER_SAMPLE, (8,))))
    return {"I": 32, "F": 32, "I;16": 16}.get(image.mode, 8)


def _maximum(image: Image.Image, values: np.ndarray, bits: int) -> float | None:
    if image.mode == "F":
        return 1.0 if values.size and values.min() >= 0 and values.max() <= 1 else None
    if image.mode == "I" and bits > 16:
        return None
    signed = image.mode == "I" and image.format == "TIFF"
    return float(2 ** (bits - signed) - 1)


def _scaled(found: Decoded, bit_depth: int | None) -> Decoded:
    """Settles the maximum and checks that the values are within it."""
    values, maximum = found.values, found.maximum
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise DataError("has values that are not finite numbers")
    if bit_depth is not None and bit_depth <= found.bits:
        maximum = float(2**bit_depth - 1)
    if maximum is None:
        kind = "floats outside 0 to 1" if values.dtype == np.float32 else "32-bit integers"
        raise DataError(
            f"holds {kind} ({values.min():g} to {values.max():g}), so white is not known; say --bit-depth, such as 16"
        )
    if values.min() < 0:
        raise DataError(f"has negative values (down to {values.min():g}); shift and scale it to 0 and above")
    if values.max() > maximum:
        raise DataError(
            f"has a value of {values.max():g}, above the {maximum:g} of {bit_depth} bits; say a larger --bit-depth"
        )
    if found.inverted:
        values = (maximum - values).astype(values.dtype)
    return dataclasses.replace(found, values=values, maximum=maximum, inverted=False)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error, OSError):
        return 1  # EXIF that cannot be read says nothing


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation, 1 to 8; anything else means none."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values)


class _Quiet:
    """Silences Pillow's warnings while any thread is inside; `warnings.catch_warnings` alone is not safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._catcher = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._catcher = warnings.catch_warnings()
                self._catcher.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._catcher.__exit__(None, None, None)


_QUIET = _Quiet()
