"""What `mrl measure A B` reads and writes: models and images in; measure.json, a page with the plot, and the table out."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrl import run
from mrl.data import ImageSet, Preprocess, load_source
from mrl.deploy.runtimes import SUFFIXES
from mrl.errors import ConfigError
from mrl.models.build import build_model, preprocess_of
from mrl.report.figures import Guides, Span, intervals
from mrl.side_by_side import measure_side_by_side, merge, table
from mrl.swap import load
from mrl.workspace import Workspace

POOL = 32  # images that the calls go through in turn
JSON, PAGE = "measure.json", "measure.html"


def measure_models_step(
    models: Sequence[str],
    out: Path | str,
    *,
    data: str,
    sizes: Sequence[int],
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measures models side by side on images of `data`; writes `measure.json` and `measure.html`.

    Args:
        models: files of `mrl export`, folders of `mrl.save`, run folders (both fitted arms), timm names or factories.
        out: folder of the result.
        data: folder of class folders, CSV, or elpv: the images that are used.
        sizes: pixels.
        overwrite: replace a result that is there.
        options: of `mrl.side_by_side.measure_side_by_side`.

    Raises:
        ConfigError: no models, a model twice, or a result that is there.
    """
    folder = Path(out)
    for name in (JSON, PAGE):
        run.refuse_existing(folder / name, overwrite)
    subjects: dict[str, nn.Module | Path] = {}
    for given in models:
        for name, subject in _subjects(given, sizes[0]).items():
            if name in subjects:
                raise ConfigError(f"measure: {name} is given twice.")
            subjects[name] = subject
    found = measure_side_by_side(subjects, images=_images(data, sizes[0], subjects), sizes=sizes, **options)
    _write(folder, found)
    return found


def merge_step(files: Sequence[str], out: Path | str, *, overwrite: bool = False) -> dict[str, Any]:
    """Puts results of several machines into one `measure.json` and `measure.html`."""
    folder = Path(out)
    for name in (JSON, PAGE):
        run.refuse_existing(folder / name, overwrite)
    found = merge(files)
    _write(folder, found)
    return found


def _write(folder: Path, found: Mapping[str, Any]) -> None:
    run.write_json(folder / JSON, found)
    with run.writing(folder / PAGE) as part:
        part.write_text(page(found), encoding="utf-8")


def _subjects(given: str, size: int) -> dict[str, nn.Module | Path]:
    path = Path(given)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise ConfigError(f"{given}: not found.")
        return {given: path}
    if (path / "protocol.yaml").is_file():
        space = Workspace(path)
        arms = [arm for arm in space.protocol.arms if (space.arm(arm) / "model").is_dir()]
        if not arms:
            raise ConfigError(f"{given}: no arm is fitted yet; run `mrl fit --out {given}` first.")
        return {f"{given}/{arm}": space.fitted(arm) for arm in arms}
    if (path / "model.json").is_file():
        return {given: load(path)}
    return {given: build_model(given, image_size=size, num_classes=2).eval()}


def _images(data: str, size: int, subjects: Mapping[str, Any]) -> Tensor:
    """Up to 32 images, spread evenly, prepared as the first model wants them."""
    source = load_source(data)
    first = next((s for s in subjects.values() if isinstance(s, nn.Module)), nn.Identity())
    images = ImageSet(source.samples, source.classes, Preprocess((size, size), **preprocess_of(first)))
    n = min(POOL, len(images))
    return torch.stack([images[i * len(images) // n]["image"] for i in range(n)])


def page(found: Mapping[str, Any]) -> str:
    """One self-contained page: the ratios with their intervals (or the medians of a single model), and the table.

    Example:
        >>> "<pre>" in page({"rows": [], "models": [], "not_measured": []})
        True
    """
    spans = [
        Span(f"{_case(row)}: {name}", *(model["ratio"][k] for k in ("estimate", "low", "high")), arm="mrl")
        for row in found["rows"]
        for name, model in row["models"].items()
        if model.get("ratio")
    ]
    style = resources.files("mrl.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    parts = [f"<h1>{html.escape(' · '.join(found['models']))}</h1>"]
    if spans:
        sides = ("faster than the first", "slower than the first")
        figure = intervals(
            spans, Guides(reference=1.0, sides=sides, log=True), label="latency ratios", text="x{:.2f}".format, missing="", width=760
        )  # fmt: skip
        parts.append(f"<figure>{figure}</figure>")
        parts.append(
            "<p>Median latency divided by that of the first model, measured in turn; 95 % bootstrap intervals.</p>"
        )
    parts.append(f"<pre>{html.escape(table(found))}</pre>")
    if found["not_measured"]:
        lines = "\n".join(f"{m['case']}: {m['model']}: {m['reason']}" for m in found["not_measured"])
        parts.append(f"<h2>Not measured</h2><pre>{html.escape(lines)}</pre>")
    for machine in found.get("machines") or [found.get("environment") or {}]:
        known = ", ".join(f"{k} {v}" for k, v in machine.items() if not isinstance(v, dict) and v is not None)
        parts.append(f"<p>{html.escape(known)}</p>")
    extra = "pre{overflow-x:auto;font-size:13px}"
    head = f'<meta charset="utf-8"><title>mrl measure</title><style>{style}{extra}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def _case(row: Mapping[str, Any]) -> str:
    where = f"{row['machine']}, " if row.get("machine") else ""
    return f"{where}{row['backend']} {row['precision']} b{row['batch']} {'x'.join(map(str, row['image_size']))}"
