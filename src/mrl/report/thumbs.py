"""The images on which the two arms disagree, as small pictures inside the page; the files are only read."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrl.errors import MrlError
from mrl.report.collect import ARMS, RunFiles
from mrl.run import read_csv, sha256_file

if TYPE_CHECKING:
    import torch

SIDE = 176


@dataclass(frozen=True)
class Disagreement:
    """One test image to which the arms give different classes; `gap` is how far apart their belief in the truth is."""

    image: str
    target: str
    answers: Mapping[str, tuple[str, float]]
    gap: float

    @property
    def kind(self) -> str:
        """Who is right: "mrl", "baseline" or "neither"."""
        return next((arm for arm in ARMS if self.answers[arm][0] == self.target), "neither")


def disagreements(rows: Sequence[Mapping[str, str]]) -> list[Disagreement]:
    """The images of `predictions.csv` that the arms answer differently, the largest difference in confidence first.

    Args:
        rows: the rows of `predictions.csv`; of several repeats an image's first one counts.

    Example:
        >>> rows = [{"image": "a", "target": "x", "arm": "baseline", "p_x": "0.9", "p_y": "0.1"},
        ...         {"image": "a", "target": "x", "arm": "mrl", "p_x": "0.2", "p_y": "0.8"}]
        >>> disagreements(rows)[0].kind
        'baseline'
    """
    by_image: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in rows:
        by_image.setdefault(row["image"], {}).setdefault(row["arm"], row)
    found = []
    for image, arms in by_image.items():
        if not all(arm in arms for arm in ARMS):
            continue
        beliefs = {arm: {k[2:]: float(v) for k, v in arms[arm].items() if k.startswith("p_")} for arm in ARMS}
        answers = {arm: max(belief.items(), key=lambda pair: pair[1]) for arm, belief in beliefs.items()}
        if answers["baseline"][0] != answers["mrl"][0]:
            target = arms["mrl"]["target"]
            gap = abs(beliefs["mrl"].get(target, 0.0) - beliefs["baseline"].get(target, 0.0))
            found.append(Disagreement(image, target, answers, gap))
    return sorted(found, key=lambda item: (-item.gap, item.image))


def disagreements_of(run: RunFiles) -> list[Disagreement]:
    """The disagreements of a run; none where it has no `predictions.csv`."""
    path = run.out / "predictions.csv"
    if not path.is_file():
        return []
    names = {"baseline": "baseline", run.featured: "mrl"}
    return disagreements([{**row, "arm": names[row["arm"]]} for row in read_csv(path) if row["arm"] in names])


def thumbnails(run: RunFiles, images: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Small pictures of test images: `{image: {"uri": data URI | None, "reason": why there is none}}`.

    A file that is gone, unreadable or no longer the one that was audited gets a reason, never an error: the numbers of
    the report do not depend on it.
    """
    if not images:
        return {}
    from mrl.data.images import read_image
    from mrl.data.sources import load_source

    data = run.protocol.get("data") or {}
    try:
        source = load_source(data["source"], test=data.get("test"))
    except (MrlError, KeyError, OSError) as error:
        return {image: {"uri": None, "reason": str(error)} for image in images}
    paths = {sample.image: sample.path for sample in source.samples}
    hashes = {row["image"]: row.get("sha256") for row in run.split}
    found = {}
    for image in images:
        reason = _reason(paths.get(image), hashes.get(image))
        try:
            uri = None if reason else data_uri(read_image(paths[image], bit_depth=data.get("bit_depth")))
        except MrlError as error:
            uri, reason = None, str(error)
        found[image] = {"uri": uri, "reason": reason}
    return found


def _reason(path: Path | None, sha256: str | None) -> str:
    if path is None or not Path(path).is_file():
        return "gone"
    return "changed" if sha256 and sha256_file(path) != sha256 else ""


def data_uri(image: torch.Tensor, side: int = SIDE) -> str:
    """An image (3, H, W) in [0, 1] as a JPEG of at most `side` pixels a side, inside a data URI.

    Example:
        >>> import torch
        >>> data_uri(torch.zeros(3, 8, 8))[:23]
        'data:image/jpeg;base64,'
    """
    import torch
    from PIL import Image

    height, width = image.shape[-2:]
    factor = min(1.0, side / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = torch.nn.functional.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
    pixels = (small.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
