"""Nested parts of a training side, for learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mrl.data.split import SplitRow
from mrl.errors import ConfigError, DataError

SHARES = (0.1, 0.2, 0.4, 0.7, 1.0)
"""Of the training side, the points of a learning curve."""


def nested_subsets(
    rows: Sequence[SplitRow], units: Mapping[str, str], *, shares: Sequence[float] = SHARES, seed: int = 0
) -> dict[float, list[SplitRow]]:
    """Parts of a split's training and inner validation side, each inside the next; the test side stays as it is.

    Both sides shrink alike. What belongs together stays together, classes keep their shares as far as the units allow,
    and each class has at least one unit on either side at every size.

    Args:
        rows: a split: "train", "val" and "test".
        units: image -> what it stays together with, of `split_units`.
        shares: of the training side, above 0, at most 1, rising.
        seed: of the order in which units come in.

    Returns:
        {share: rows}, each with the order of `rows`.

    Raises:
        ConfigError: shares that do not rise from above 0 to at most 1.
        DataError: no training image, or an image without a unit.

    Example:
        >>> rows = [SplitRow(f"{i}.png", "ab"[i % 2], "", "", ("train", "test")[i % 5 == 4]) for i in range(50)]
        >>> parts = nested_subsets(rows, {row.image: row.image for row in rows}, shares=(0.2, 0.5))
        >>> [sum(row.split == "train" for row in part) for part in parts.values()]
        [8, 20]
    """
    if not shares or list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] > 1:
        raise ConfigError(f"shares {list(shares)}: give rising numbers above 0 and at most 1.")
    lost = [row.image for row in rows if row.split != "test" and row.image not in units]
    if lost or not any(row.split == "train" for row in rows):
        raise DataError(f"the split has {lost[0] + ', of no unit' if lost else 'no training image'}; split again.")
    rng = np.random.default_rng([seed, 0x5B5E7])
    place: dict[str, float] = {}
    for side in ("train", "val"):
        place |= _places([row for row in rows if row.split == side], units, rng)
    return {
        share: [row for row in rows if row.split == "test" or place[units[row.image]] <= share + 1e-9]
        for share in shares
    }


def _places(rows: Sequence[SplitRow], units: Mapping[str, str], rng: np.random.Generator) -> dict[str, float]:
    """Unit -> the share of its class that is in once it is in; the first unit of every class is in from the start."""
    members: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.image):
        members.setdefault(units[row.image], []).append(row.label)
    by_class: dict[str, list[str]] = {}
    for unit, labels in members.items():
        by_class.setdefault(max(sorted(set(labels)), key=labels.count), []).append(unit)
    place: dict[str, float] = {}
    for _, names in sorted(by_class.items()):
        order = [names[i] for i in rng.permutation(len(names))]
        sizes = np.cumsum([len(members[unit]) for unit in order])
        place |= dict(zip(order, (sizes / sizes[-1]).tolist(), strict=True)) | {order[0]: 0.0}
    seen = {label for unit, at in place.items() if at == 0 for label in members[unit]}
    for label in sorted({row.label for row in rows} - seen):  # a class that is never the most frequent of its units
        first = min((unit for unit, labels in members.items() if label in labels), key=lambda unit: (place[unit], unit))
        place[first] = 0.0
    return place
