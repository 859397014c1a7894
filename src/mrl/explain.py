"""Which regions of a picture an answer hangs on: each is covered in turn, and the fall of the probability is drawn."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrl import run
from mrl.errors import DataError
from mrl.predictor import Predictor

MAP_SUFFIX = "_maps"
COARSEST, FINEST = 4, 16  # regions along a side
LONGEST = 200  # bytes of a map's name without its suffix; systems allow 255, and a file in the making needs some
PASS = 32  # covered pictures computed at once
WARM, COLD = np.array([214.0, 69.0, 37.0]), np.array([37.0, 99.0, 214.0])  # holds the answer up, holds it down


def region_grid(metadata: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of regions: those of the model where its file says them, else squares of an eighth of the image.

    Example:
        >>> region_grid({}, (112, 224)), region_grid({"regions": [4, 4]}, (112, 112))
        ((8, 16), (4, 4))
    """
    told = metadata.get("regions") if hasattr(metadata, "get") else None
    if told:
        rows, columns = (int(n) for n in told)
    else:
        side = max(1, min(image_size) // 8)
        rows, columns = (max(1, round(n / side)) for n in image_size)
    return tuple(min(max(n, COARSEST), FINEST, size) for n, size in zip((rows, columns), image_size, strict=True))


def region_map(model: Predictor, image: Tensor, grid: tuple[int, int] | None = None) -> np.ndarray:
    """How much the probability of the answer falls when a region is covered with the picture's own mean colour.

    map[r, c] = p(answer | image) - p(answer | image without region r, c), in [-1, 1]: positive where the region speaks for
    the answer. It looks at the file alone, whatever is inside it.

    Args:
        model: an opened file.
        image: prepared, (3, H, W).
        grid: rows and columns of regions; None is `region_grid`.

    Shape:
        (3, H, W) -> (rows, columns).

    Reference:
        Zeiler and Fergus (arXiv:1311.2901), occlusion sensitivity.
    """
    rows, columns = grid or region_grid(model.metadata, tuple(image.shape[-2:]))
    height, width = image.shape[-2:]
    ys, xs = (np.linspace(0, n, k + 1).round().astype(int) for n, k in ((height, rows), (width, columns)))
    whole = model.probabilities(image[None])[0]
    best = int(whole.argmax())
    colour = image.mean((1, 2), keepdim=True)
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    found = np.empty((rows, columns))
    for start in range(0, len(cells), PASS):
        part = cells[start : start + PASS]
        covered = image.expand(len(part), -1, -1, -1).clone()
        for picture, (r, c) in zip(covered, part, strict=True):
            picture[:, ys[r] : ys[r + 1], xs[c] : xs[c + 1]] = colour
        for (r, c), values in zip(part, model.probabilities(covered), strict=True):
            found[r, c] = whole[best] - values[best]
    return found


def write_map(model: Predictor, path: Path, folder: Path, name: str) -> Path:
    """Draws the region map of one image over a grey copy of it: `<folder>/<name>.png`, at least 448 pixels wide.

    Red regions speak for the answer, blue ones against it; full colour is the largest fall, written in the file's text
    field "mrl", with the grid and its values.

    Args:
        model: an opened file.
        path: the image.
        folder: of the maps.
        name: of the image, as in the table; its folders are kept.

    Raises:
        DataError: the image cannot be read.
    """
    prepared = model.prepare(path)
    if not isinstance(prepared, Tensor):
        raise DataError(prepared)
    values = region_map(model, prepared)
    height, width = prepared.shape[-2:]
    scale = max(1, -(-448 // width))
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocess.mean, model.preprocess.std))
    grey = (prepared * std + mean).clamp(0, 1).mean(0).numpy()
    picture = Image.fromarray((grey * 255).round().astype(np.uint8)).resize((width * scale, height * scale))
    largest = float(np.abs(values).max())
    share = values / largest if largest > 0 else values
    sizes = (width * scale, height * scale)
    strength = np.asarray(Image.fromarray(share.astype(np.float32)).resize(sizes, Image.Resampling.NEAREST))[..., None]
    base = np.repeat(np.asarray(picture, dtype=np.float64)[..., None], 3, 2)
    cover = 0.6 * np.abs(strength)
    drawn = (1 - cover) * base + cover * np.where(strength > 0, WARM, COLD)
    out = folder / f"{_safe(name)}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_text(
        "mrl", f"grid {values.shape[0]} x {values.shape[1]}; largest fall {largest:.4f}; {np.round(values, 4).tolist()}"
    )
    with run.writing(out) as part:
        Image.fromarray(drawn.round().astype(np.uint8)).save(part, "png", pnginfo=notes)
    return out


def _safe(name: str) -> str:
    """A relative path inside the folder, whatever the image's own path is; another one for another path.

    Example:
        >>> _safe("../a/b.png"), len(_safe("字" * 80).encode())
        ('__/a/b.png', 200)
    """
    parts = ["__" if part == ".." else part for part in Path(name).parts if part not in ("/", "\\", ".")]
    if parts and len(parts[-1].encode(errors="replace")) > LONGEST:  # the map's name is longer than the image's own
        digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:19]
        parts[-1] = parts[-1].encode(errors="replace")[: LONGEST - 20].decode(errors="ignore") + "-" + digest
    return "/".join(parts).replace(":", "_") or "image"
