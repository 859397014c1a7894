"""Predictions of two arms on the same images, checked and laid side by side."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mrl.errors import DataError

ARMS = ("baseline", "mrl")
SUM_TOLERANCE = 1e-3
FILE = "predictions.csv"


@dataclass(frozen=True)
class Pairs:
    """Both arms' probabilities on the same n images.

    Args:
        images: ids, sorted.
        classes: names, in the order of the columns.
        target: (n,) class indices.
        probabilities: (n, K) of each arm.
        unit: (n,) index of the independent unit of each image: its group, or itself.
    """

    images: tuple[str, ...]
    classes: tuple[str, ...]
    target: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    unit: np.ndarray

    @property
    def arms(self) -> tuple[str, ...]:
        """The two names, the one that the other is compared with first."""
        return tuple(self.probabilities)

    @property
    def change(self) -> np.ndarray:
        """(n,) 1 where only the second arm is right, -1 where only the first is, else 0."""
        first, second = map(self.right, self.arms)
        return second - first

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def n_units(self) -> int:
        """Number of independent units."""
        return int(self.unit.max()) + 1

    @property
    def grouped(self) -> bool:
        """Whether any unit has more than one image."""
        return self.n_units < self.n

    def right(self, arm: str) -> np.ndarray:
        """(n,) 1 where the arm's most probable class is the true one, else 0 (of equal ones the first counts)."""
        return (self.probabilities[arm].argmax(1) == self.target).astype(float)


def pair_predictions(
    rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Hashable] | None = None, pair: tuple[str, str] = ARMS
) -> Pairs:
    """Checks the rows of `predictions.csv` and pairs the two arms image by image.

    Args:
        rows: one an image and arm: image, target, arm, repeat, fold, seed, p_<class>...
        groups: image -> group; images without one (absent or None) stand alone.
        pair: the names of the two arms.

    Raises:
        DataError: naming what is wrong: columns, arms, several hold-outs, a row twice, images or targets that differ
            between the arms, an unknown target, probabilities that are none.

    Example:
        >>> row = {"image": "a.png", "target": "ok", "repeat": 0, "fold": 0, "seed": 0, "p_bad": 0.2, "p_ok": 0.8}
        >>> pairs = pair_predictions([{**row, "arm": "baseline"}, {**row, "arm": "mrl"}])
        >>> pairs.classes, pairs.target.tolist(), pairs.n_units
        (('bad', 'ok'), [1], 1)
    """
    if not rows:
        raise DataError(f"{FILE} has no rows; run `mrl evaluate` for both arms.")
    classes = _classes(rows)
    arms = sorted({str(row["arm"]) for row in rows})
    if arms != sorted(pair):
        raise DataError(f"{FILE} has the arms {arms}, not {sorted(pair)}; run `mrl evaluate` for both arms.")
    splits = {tuple(str(row.get(key)) for key in ("repeat", "fold")) for row in rows}
    if len(splits) > 1:
        raise DataError(
            f"{FILE} has {len(splits)} different hold-outs (repeat, fold); one is compared at a time: the images of "
            "several training runs are not independent. Use --preset quick."
        )
    tables: dict[str, dict[str, Mapping[str, Any]]] = {arm: {} for arm in pair}
    twice = []
    for row in rows:
        table = tables[str(row["arm"])]
        if row["image"] in table:
            twice.append(f"{row['image']} ({row['arm']})")
        table[row["image"]] = row
    if twice:
        raise DataError(f"{FILE} has {_some(twice)} more than once; every image belongs there once for each arm.")
    return _paired(tables, classes, groups or {})


def _paired(
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]], classes: tuple[str, ...], groups: Mapping[str, Hashable]
) -> Pairs:
    first, second = tables.values()
    if apart := sorted(first.keys() ^ second.keys()):
        raise DataError(f"{FILE}: {_some(apart)} scored by one arm only; evaluate both arms on the same test side.")
    images = tuple(sorted(first))
    if unlike := [image for image in images if first[image]["target"] != second[image]["target"]]:
        raise DataError(f"{FILE}: the arms have different targets for {_some(unlike)}; evaluate both again.")
    index = {name: i for i, name in enumerate(classes)}
    if unknown := [image for image in images if first[image]["target"] not in index]:
        raise DataError(f"{FILE}: the target of {_some(unknown)} has no column p_<class>; the classes are {classes}.")
    units: dict[Hashable, int] = {}
    for image in images:
        units.setdefault(_unit(image, groups), len(units))
    return Pairs(
        images=images,
        classes=classes,
        target=np.array([index[first[image]["target"]] for image in images]),
        probabilities={arm: _probabilities([tables[arm][i] for i in images], arm, classes) for arm in tables},
        unit=np.array([units[_unit(image, groups)] for image in images]),
    )


def _unit(image: str, groups: Mapping[str, Hashable]) -> Hashable:
    group = groups.get(image)
    return ("image", image) if group is None else ("group", group)


def _classes(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    columns = set(rows[0])
    missing = [name for name in ("image", "target", "arm") if name not in columns]
    names = tuple(name[2:] for name in rows[0] if isinstance(name, str) and name.startswith("p_"))
    if missing or len(names) < 2:
        raise DataError(f"{FILE}: columns {list(rows[0])}; image, target, arm and two or more p_<class> are needed.")
    for line, row in enumerate(rows, start=2):
        if set(row) != columns or any(value is None for value in row.values()):
            raise DataError(f"{FILE}, row {line}: its columns differ from the first row's; evaluate both arms again.")
    return names


def _probabilities(rows: Sequence[Mapping[str, Any]], arm: str, classes: tuple[str, ...]) -> np.ndarray:
    try:
        p = np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows])
    except ValueError as error:
        raise DataError(f"{FILE}: a probability of arm {arm} is not a number ({error}); evaluate it again.") from None
    within = np.isfinite(p).all(1) & (p >= -SUM_TOLERANCE).all(1) & (np.abs(p.sum(1) - 1) <= SUM_TOLERANCE)
    if not within.all():
        bad = [row["image"] for row, fine in zip(rows, within, strict=True) if not fine]
        raise DataError(
            f"{FILE}: the probabilities of arm {arm} for {_some(bad)} do not "
            f"lie in 0..1 with sum 1 (within {SUM_TOLERANCE}); evaluate it again."
        )
    return p


def join_groups(links: Iterable[Iterable[str]]) -> dict[str, int]:
    """Joins images that share a group, a file or pixels, directly or through others: image -> number of its unit.

    Args:
        links: sets of images that belong together; they may overlap.

    Example:
        >>> join_groups([["a", "b"], ["c"], ["b", "d"]])
        {'a': 0, 'b': 0, 'c': 1, 'd': 0}
    """
    parent: dict[str, str] = {}

    def root(image: str) -> str:
        parent.setdefault(image, image)
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    for images in links:
        roots = [root(image) for image in images]
        for other in roots[1:]:
            parent[root(other)] = root(roots[0])
    numbers: dict[str, int] = {}
    return {image: numbers.setdefault(root(image), len(numbers)) for image in sorted(parent)}


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more
