"""The demo's data: electroluminescence images of solar cells (package elpv-dataset)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from mrl.data.sources import ImageSource, Sample
from mrl.errors import DataError, MissingExtra

TERMS = "ELPV data set (Deitsch et al.), CC BY-NC-SA 4.0: not for commercial use"
WARNING = (
    "ELPV has no module ids: cells of one solar module can be on both sides of the split, "
    "so these scores may be better than on modules that were never seen"
)


def load_elpv() -> ImageSource:
    """Lists ELPV: 2,624 cells, "defective" where the probability of a defect is above 0.5, else "functional".

    The weight is the confidence of the label, |2 p - 1|: 1 where the experts were sure (p = 0 or 1), 1/3 where they
    were not (p = 1/3 or 2/3). `meta` keeps `cell_type` (mono, poly) and `probability`. There are no groups.

    Raises:
        MissingExtra: the package is not installed.
        DataError: it is, and its files are not there.

    Reference:
        S. Deitsch et al., Automatic classification of defective photovoltaic module cells in electroluminescence
        images, Solar Energy 185 (2019).

    Example:
        >>> source = load_elpv()
        >>> len(source.samples), source.classes
        (2624, ('defective', 'functional'))
    """
    samples = []
    for name, path, probability, cell_type in _rows():
        label = "defective" if probability > 0.5 else "functional"
        meta = {"cell_type": cell_type, "probability": f"{probability:.3f}"}
        samples.append(Sample(name, path, label, weight=abs(2 * probability - 1), meta=meta))
    samples.sort(key=lambda sample: sample.image)
    return ImageSource("elpv", tuple(samples), ("defective", "functional"), (WARNING,), TERMS)


def _rows() -> Iterator[tuple[str, Path, float, str]]:
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(
            "--data elpv: the package elpv-dataset is not installed; run `pip install mrl[demo]` "
            "(or `pip install elpv-dataset`)."
        )
    root = Path(next(iter(found.submodule_search_locations))) / "data"
    table = root / "labels.csv"
    if not table.is_file():
        raise DataError("--data elpv: the package elpv-dataset has no labels.csv; install it again.")
    for line in table.read_text(encoding="utf-8").splitlines():
        if line.strip():
            name, probability, cell_type = line.split()
            yield name, root / name, float(probability), cell_type
