"""Which images train, which choose, which test: `split.csv`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from mrl.data.audit import NEAR_LIMIT, Audit
from mrl.data.holdout import Unit, hold_out
from mrl.errors import ConfigError, DataError
from mrl.run import read_csv, write_csv

SIDES = ("train", "val", "test")
PRESETS = ("quick", "standard", "full")
HEADER = ("image", "label", "group", "sha256", "split")


@dataclass(frozen=True)
class SplitRow:
    """One line of `split.csv`.

    Args:
        image: its name.
        label: its class.
        group: the user's group, or "".
        sha256: of its file.
        split: "train", "val" (inner validation, for every choice) or "test".
    """

    image: str
    label: str
    group: str
    sha256: str
    split: str


def make_split(
    audit: Audit,
    *,
    preset: str = "quick",
    seed: int = 0,
    group_near: bool = False,
    test_fraction: float = 0.25,
    val_fraction: float = 0.15,
) -> list[SplitRow]:
    """Splits audited images into training, inner validation and test.

    `quick`: one hold-out, and the inner validation side taken from the rest, each stratified by class. What belongs
    together (a user's group, exact copies, with `group_near` also near duplicates, and whatever these link) stays on
    one side. Without such units the class shares are exact to one image; with them `holdout.hold_out` searches for the
    closest. With images of --test these are the test side, and only the rest is divided.

    Args:
        audit: the checked images.
        preset: "quick".
        seed: of the draw; the order of files on disk does not matter.
        group_near: keep near duplicates together.
        test_fraction: share of all images to test on.
        val_fraction: share of the other images to choose with.

    Raises:
        ConfigError: a preset that is not there, or a fraction outside (0, 1).
        DataError: the groups cannot be divided so that every side has every class.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from mrl.data.audit import audit_source
        >>> from mrl.data.sources import load_source
        >>> root = Path(tempfile.mkdtemp())
        >>> for label in ("crack", "good"):
        ...     (root / label).mkdir()
        ...     for n in range(8):
        ...         Image.new("L", (8, 8), 20 * n + len(label)).save(root / label / f"{n}.png")
        >>> rows = make_split(audit_source(load_source(root)))
        >>> sorted(Counter((row.label, row.split) for row in rows).items())
        [(('crack', 'test'), 2), (('crack', 'train'), 5), (('crack', 'val'), 1),
         (('good', 'test'), 2), (('good', 'train'), 5), (('good', 'val'), 1)]
    """
    check_options(preset, seed, test_fraction=test_fraction, val_fraction=val_fraction)
    if preset != "quick":
        raise ConfigError(f"--preset {preset}: is no hold-out; `make_folds` deals its folds, or use quick.")
    sides = _draw_sides(audit, np.random.default_rng([seed, 0x5F117]), group_near, test_fraction, val_fraction)
    rows = [
        SplitRow(s.image, s.label, s.group or "", audit.sha256[s.image], sides.get(s.image, "train"))
        for s in sorted(audit.kept, key=lambda sample: sample.image)
    ]
    check_split(rows, audit, group_near=group_near)
    return rows


def split_units(audit: Audit, *, group_near: bool = False) -> dict[str, str]:
    """What each kept image must stay together with: the first image of its unit, by name.

    Units are linked by user groups and exact copies, and by near duplicates with `group_near`. They are also what a
    bootstrap draws.

    Raises:
        DataError: `group_near` with more near pairs than are kept.
    """
    parent = {s.image: s.image for s in audit.kept}

    def root(image: str) -> str:
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    def link(images: Sequence[str]) -> None:
        for image in images[1:]:
            a, b = sorted((root(images[0]), root(image)))
            parent[b] = a

    for keys in (audit.pixels, {s.image: s.group for s in audit.kept if s.group is not None}):
        for images in _together(keys):
            link(images)
    if group_near:
        if len(audit.near) >= NEAR_LIMIT:
            raise DataError(
                f"{audit.source.spec}: more than {NEAR_LIMIT:,} pairs look alike, too many for --group-near; "
                "name the groups in a CSV (path,label,group) instead."
            )
        for a, b, _ in audit.near:
            link((a, b))
    return {image: root(image) for image in parent}


def check_split(rows: Sequence[SplitRow], audit: Audit, *, group_near: bool = False) -> None:
    """Checks a split against the images: all of them, once, as audited; every side has every class; no unit is divided.

    Raises:
        DataError: says which image, class or unit is wrong.
    """
    who = f"split of {audit.source.spec}"
    samples = {s.image: s for s in audit.kept}
    names = Counter(row.image for row in rows)
    twice = [image for image, n in names.items() if n > 1]
    strange, lost = sorted(set(names) - set(samples)), sorted(set(samples) - set(names))
    if twice or strange or lost:
        parts = [
            f"{len(v)} {what} ({v[0]}, ...)"
            for v, what in ((twice, "twice"), (strange, "unknown"), (lost, "missing"))
            if v
        ]
        raise DataError(f"{who}: of its images {', '.join(parts)}; make the split again from this audit.")
    sides = {row.image: row.split for row in rows}
    for row in rows:
        sample = samples[row.image]
        now = (sample.label, sample.group or "", audit.sha256[row.image])
        if (row.label, row.group, row.sha256) != now or row.split not in SIDES:
            raise DataError(f"{who}: the line of {row.image} is not that of the audit; make the split again.")
        if (sample.side == "test") and row.split != "test":
            raise DataError(
                f"{who}: {row.image} is an image of --test and stands in {row.split}; make the split again."
            )
    for side in SIDES:
        absent = sorted(set(audit.class_counts) - {row.label for row in rows if row.split == side})
        if absent:
            raise DataError(
                f"{who}: the {side} side has no image of {', '.join(absent)}; add images of it or of more groups."
            )
    for images in _together(split_units(audit, group_near=group_near)):
        if len({sides[image] for image in images}) > 1:
            raise DataError(
                f"{who}: {images[0]} and {images[-1]} belong together and stand on different sides; split again."
            )


def write_split(path: Path | str, rows: Iterable[SplitRow]) -> Path:
    """Writes `split.csv` with the columns image,label,group,sha256,split; returns the path."""
    return write_csv(path, HEADER, [astuple(row) for row in rows])


def read_split(path: Path | str) -> list[SplitRow]:
    """Reads `split.csv` back.

    Raises:
        ConfigError: it is not there.
        DataError: its columns are others, or a side is unknown.

    Example:
        >>> import tempfile
        >>> rows = [SplitRow("a.png", "good", "", "00", "train")]
        >>> read_split(write_split(Path(tempfile.mkdtemp()) / "split.csv", rows)) == rows
        True
    """
    lines = read_csv(path)
    if not lines or tuple(lines[0]) != HEADER:
        raise DataError(f"{path}: is not a split; it must have the columns {','.join(HEADER)} and one line an image.")
    rows = [SplitRow(**line) for line in lines]
    for row in rows:
        if row.split not in SIDES:
            raise DataError(f"{path}: {row.image} is on side {row.split!r}; sides are {', '.join(SIDES)}.")
    return rows


def check_options(preset: str, seed: int, **fractions: float) -> None:
    """Raises ConfigError for an unknown preset, a fraction outside (0, 1) or a seed that is none."""
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: unknown; use quick, standard or full.")
    for name, value in fractions.items():
        if not 0 < value < 1:
            raise ConfigError(f"{name} {value}: must be above 0 and below 1, such as 0.25.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"--seed {seed}: must be a whole number, 0 or more.")


def _draw_sides(audit: Audit, rng: np.random.Generator, group_near: bool, test: float, val: float) -> dict[str, str]:
    """The side of each image that is not for training."""
    sides = {s.image: "test" for s in audit.kept if s.side == "test"}
    units = units_of(audit, group_near)
    for unit in units:
        held = [image for image in unit.images if image in sides]
        if 0 < len(held) < len(unit.images):
            other = next(image for image in unit.images if image not in sides)
            raise DataError(
                f"--group-near: {other} belongs together with {held[0]} of --test (it looks like it, or like one that "
                "does); take one of them out, or leave out --group-near."
            )
    units = [unit for unit in units if unit.images[0] not in sides]
    if not sides:
        for unit in hold_out(units, test, rng, leave=2, sides="training, inner validation and test"):
            sides |= dict.fromkeys(unit.images, "test")
        units = [unit for unit in units if unit.images[0] not in sides]
    for unit in hold_out(units, val, rng, leave=1, sides="training and inner validation"):
        sides |= dict.fromkeys(unit.images, "val")
    return sides


def units_of(audit: Audit, group_near: bool = False) -> list[Unit]:
    """The units of an audit (see `split_units`), with how many images of each class they have."""
    return as_units(split_units(audit, group_near=group_near), {s.image: s.label for s in audit.kept})


def as_units(unit: Mapping[str, str], label: Mapping[str, str]) -> list[Unit]:
    """Images with the same unit as one `Unit` each.

    Args:
        unit: image -> its unit.
        label: image -> its class.

    Example:
        >>> [u.counts for u in as_units({"a": "1", "b": "1", "c": "2"}, {"a": "x", "b": "y", "c": "y"})]
        [(1, 1), (0, 1)]
    """
    classes = {name: i for i, name in enumerate(sorted({label[image] for image in unit}))}
    units = []
    for images in _together(unit):
        counts = [0] * len(classes)
        for image in images:
            counts[classes[label[image]]] += 1
        units.append(Unit(tuple(images), tuple(counts), tuple(classes)))
    return units


def _together(keys: Mapping[str, str]) -> list[list[str]]:
    """Images with the same key, sorted."""
    found: dict[str, list[str]] = defaultdict(list)
    for image in sorted(keys):
        found[keys[image]].append(image)
    return sorted(found.values())
