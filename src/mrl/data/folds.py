"""Repeated k-fold: which image is tested in which fold of which repeat, and which are never trained on: the manifest."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mrl.data.audit import Audit
from mrl.data.holdout import Unit, hold_out
from mrl.data.split import SplitRow, as_units, check_options, split_units, units_of
from mrl.errors import ConfigError, DataError
from mrl.run import read_csv, read_json, sha256_file, write_csv, write_json

PRESETS = {"standard": (5, 2), "full": (5, 5)}
"""Folds and repeats of the presets that cross-validate."""

FROZEN_FROM = 1_000
"""Images from which `full` keeps a test set of its own, that no fold sees."""

FROZEN_SHARE = 0.2
TRIALS = 20
STEPS = 200_000
"""Shuffles that are tried, and images that are dealt in all."""
FIELDS = ("image", "label", "group", "sha256", "split")
MANIFEST, TABLE = "folds.json", "split.csv"


@dataclass(frozen=True)
class FoldRow:
    """One image of the manifest.

    Args:
        image: its name.
        label: its class.
        group: the user's group, or "".
        sha256: of its file.
        folds: the fold in which it is tested, one a repeat; empty for an image of the frozen test set.
    """

    image: str
    label: str
    group: str
    sha256: str
    folds: tuple[int, ...]

    @property
    def frozen(self) -> bool:
        """Whether it belongs to the frozen test set."""
        return not self.folds


@dataclass(frozen=True)
class Folds:
    """All folds of all repeats.

    Args:
        rows: one an image, by name.
        k: folds.
        repeats: of them.
        seed: of the draw.
    """

    rows: tuple[FoldRow, ...]
    k: int
    repeats: int
    seed: int

    @property
    def n_frozen(self) -> int:
        """Images of the frozen test set."""
        return sum(row.frozen for row in self.rows)

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(repeat, fold) of every outer fit, in the order in which they run."""
        return [(repeat, fold) for repeat in range(self.repeats) for fold in range(self.k)]


def make_folds(audit: Audit, *, preset: str = "standard", seed: int = 0, group_near: bool = False) -> Folds:
    """Deals audited images into stratified folds, several times; what belongs together stays together.

    Each repeat is a shuffled StratifiedGroupKFold (scikit-learn) over the units of `split_units`: user groups, exact
    copies, with `group_near` near duplicates, and whatever these link. Of up to 20 shuffles a repeat, the one with the
    most even class shares is kept. `full` first takes a frozen test set of 20 % out, where there are 1,000 images.

    Args:
        audit: the checked images.
        preset: standard (k = 5, 2 repeats) or full (k = 5, 5 repeats).
        seed: of the draw; the order of files on disk does not matter.
        group_near: keep near duplicates together.

    Raises:
        ConfigError: another preset, or images of --test, which belong to `quick`.
        DataError: a class has fewer units than folds, or no deal gives every fold every class.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from mrl.data.audit import audit_source
        >>> from mrl.data.sources import load_source
        >>> root = Path(tempfile.mkdtemp())
        >>> for label in ("crack", "good"):
        ...     (root / label).mkdir()
        ...     for n in range(10):
        ...         Image.new("L", (8, 8), 20 * n + len(label)).save(root / label / f"{n}.png")
        >>> found = make_folds(audit_source(load_source(root)))
        >>> found.k, found.repeats, sum(row.folds[0] == 3 for row in found.rows)
        (5, 2, 4)
    """
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: has no folds; use {' or '.join(PRESETS)}.")
    check_options(preset, seed)
    if any(s.side == "test" for s in audit.kept):
        raise ConfigError(
            f"--test goes with --preset quick: in {preset} every image is tested in a fold of its own; leave --test out, or "
            "use --preset quick."
        )
    k, repeats = PRESETS[preset]
    rng = np.random.default_rng([seed, 0xF01D5])
    units = units_of(audit, group_near)
    frozen: set[str] = set()
    if preset == "full" and len(audit.kept) >= FROZEN_FROM:
        for unit in hold_out(units, FROZEN_SHARE, rng, leave=k, sides="the frozen test set and the folds"):
            frozen |= set(unit.images)
    unit_of = {image: root for image, root in split_units(audit, group_near=group_near).items() if image not in frozen}
    samples = sorted((s for s in audit.kept if s.image not in frozen), key=lambda s: s.image)
    labels = np.array([s.label for s in samples])
    groups = np.array([unit_of[s.image] for s in samples])
    _enough(labels, groups, k)
    dealt = [_deal(labels, groups, k, int(rng.integers(2**31)), repeat) for repeat in range(repeats)]
    fold_of = {s.image: tuple(int(d[i]) for d in dealt) for i, s in enumerate(samples)}
    rows = tuple(
        FoldRow(s.image, s.label, s.group or "", audit.sha256[s.image], fold_of.get(s.image, ()))
        for s in sorted(audit.kept, key=lambda s: s.image)
    )
    found = Folds(rows, k, repeats, seed)
    check_folds(found, audit, group_near=group_near)
    return found


def _enough(labels: np.ndarray, groups: np.ndarray, k: int) -> None:
    short = {label: len(set(groups[labels == label])) for label in sorted(set(labels))}
    few = [f"{label} has {n}" for label, n in short.items() if n < k]
    if few:
        raise DataError(
            f"too few independent units of a class (groups, or images that are no copies of each other) for {k} folds: "
            f"{', '.join(few)}, and each class needs at least {k}; add images of other groups, take the class out, or use "
            "--preset quick."
        )


def _deal(labels: np.ndarray, groups: np.ndarray, k: int, seed: int, repeat: int) -> np.ndarray:
    """(n,) the fold of each image: the most even of up to 20 shuffles in which every fold has every class."""
    from sklearn.model_selection import StratifiedGroupKFold

    names, label = np.unique(labels, return_inverse=True)
    aim = np.bincount(label) / k
    best, lowest = None, np.inf
    for trial in range(max(3, min(TRIALS, STEPS // len(labels)))):
        fold = np.empty(len(labels), dtype=np.int64)
        cutter = StratifiedGroupKFold(k, shuffle=True, random_state=(seed + trial) % 2**32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # units are counted, not images
            for i, (_, test) in enumerate(cutter.split(np.zeros(len(labels)), label, groups)):
                fold[test] = i
        counts = np.stack([np.bincount(label[fold == i], minlength=len(names)) for i in range(k)])
        uneven = float((np.abs(counts - aim) / aim).max())
        trains = all((counts.sum(0) - row > 0).all() for row in counts)
        if (counts > 0).all() and trains and uneven < lowest:
            best, lowest = fold, uneven
        if lowest <= 1 / aim.min():  # within one image of the rarest class
            break
    if best is None:
        raise DataError(
            f"no deal into {k} folds found that has every class in every fold (repeat {repeat}); the groups are too large or "
            "too few: name smaller groups, add images of other groups, or use --preset quick."
        )
    return best


def check_folds(folds: Folds, audit: Audit, *, group_near: bool = False) -> None:
    """Checks a manifest against the images: all of them, once, as audited; every fold has every class; no unit is divided.

    Raises:
        DataError: says which image, class, fold or unit is wrong.
    """
    who, samples = f"folds of {audit.source.spec}", {s.image: s for s in audit.kept}
    names = [row.image for row in folds.rows]
    if len(set(names)) < len(names) or set(names) != set(samples):
        apart = sorted(set(names) ^ set(samples)) or sorted({n for n in names if names.count(n) > 1})
        raise DataError(f"{who}: {len(apart)} images are missing, unknown or twice ({apart[0]}, ...); split again.")
    for row in folds.rows:
        sample = samples[row.image]
        same = (row.label, row.group, row.sha256) == (sample.label, sample.group or "", audit.sha256[row.image])
        if not same or len(row.folds) not in (0, folds.repeats) or not all(0 <= f < folds.k for f in row.folds):
            raise DataError(f"{who}: the line of {row.image} is not that of the audit; make the split again.")
    classes = {row.label for row in folds.rows}
    for repeat, fold in folds.cells:
        absent = classes - {row.label for row in folds.rows if not row.frozen and row.folds[repeat] == fold}
        if absent:
            raise DataError(f"{who}: fold {fold} of repeat {repeat} has no image of {', '.join(sorted(absent))}.")
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    units = split_units(audit, group_near=group_near)
    pixels = audit.pixels
    for row in folds.rows:
        for key in (f"unit {units[row.image]}", f"pixels {pixels[row.image]}", f"file {row.sha256}"):
            other, place = places.setdefault(key, (row.image, row.folds))
            if place != row.folds:
                raise DataError(
                    f"{who}: {other} and {row.image} belong together and are in different folds; split again."
                )


def split_of(
    folds: Folds, repeat: int, fold: int, *, val_fraction: float = 0.15, units: Mapping[str, str]
) -> list[SplitRow]:
    """One fold as a split: its test side, and its training side with an inner validation side taken from it.

    The frozen test set is not in it. The draw of the inner side depends on (seed, repeat, fold) only.

    Args:
        folds: the manifest.
        repeat: which repeat.
        fold: which fold of it; -1 is the fit on all images but the frozen ones, which are its test side.
        val_fraction: share of the training side that chooses; up to a half where large groups leave no such share.
        units: of `split_units`: what stays together.

    Raises:
        DataError: the training side cannot be divided so that both parts have every class.
    """
    whole = fold < 0
    test = {r.image for r in folds.rows if (r.frozen if whole else not r.frozen and r.folds[repeat] == fold)}
    kept = [r for r in folds.rows if whole or not r.frozen]
    train = [r for r in kept if r.image not in test]
    rng = np.random.default_rng([folds.seed, 0x1DE, repeat, fold + 1])
    made = as_units({r.image: units[r.image] for r in train}, {r.image: r.label for r in train})
    held = _inner(made, val_fraction, rng, f"training and inner validation of fold {fold}")
    val = {image for unit in held for image in unit.images}
    side = {r.image: "test" if r.image in test else "val" if r.image in val else "train" for r in kept}
    return [SplitRow(r.image, r.label, r.group, r.sha256, side[r.image]) for r in kept]


def _inner(units: Sequence[Unit], fraction: float, rng: np.random.Generator, sides: str) -> list[Unit]:
    """The units of the inner validation side; a larger share where groups are too large for the one that was asked for."""
    for share in (share for share in (fraction, 0.25, 0.35) if share >= fraction):
        try:
            return hold_out(units, share, rng, leave=1, sides=sides)
        except DataError:
            continue
    return hold_out(units, max(fraction, 0.5), rng, leave=1, sides=sides)


def write_folds(out: Path | str, folds: Folds) -> Path:
    """Writes the manifest: `split.csv` (image,label,group,sha256,split,fold_r0,...) and `folds.json` with its hash.

    `split` is "folds", or "test" for the frozen test set. Returns the path of `folds.json`.
    """
    out = Path(out)
    columns = [f"fold_r{i}" for i in range(folds.repeats)]
    lines = [
        (r.image, r.label, r.group, r.sha256, *(("test", *[""] * folds.repeats) if r.frozen else ("folds", *r.folds)))
        for r in folds.rows
    ]
    table = write_csv(out / TABLE, [*FIELDS, *columns], lines)
    return write_json(out / MANIFEST, {**_about(folds), "split_sha256": sha256_file(table)})


def _about(folds: Folds) -> dict[str, Any]:
    sizes = [
        {
            "repeat": repeat,
            "fold": fold,
            "n": sum(not r.frozen and r.folds[repeat] == fold for r in folds.rows),
            "class_counts": _counts([r for r in folds.rows if not r.frozen and r.folds[repeat] == fold]),
        }
        for repeat, fold in folds.cells
    ]
    frozen = [r for r in folds.rows if r.frozen]
    about = {"schema": 1, "k": folds.k, "repeats": folds.repeats, "seed": folds.seed, "n": len(folds.rows)}
    return {**about, "n_frozen": len(frozen), "frozen_class_counts": _counts(frozen), "folds": sizes}


def _counts(rows: Sequence[FoldRow]) -> dict[str, int]:
    return {label: sum(r.label == label for r in rows) for label in sorted({r.label for r in rows})}


def read_folds(out: Path | str) -> Folds:
    """Reads the manifest back.

    Raises:
        ConfigError: a file is not there.
        DataError: `split.csv` is not the one whose hash `folds.json` has.
    """
    out = Path(out)
    about = read_json(out / MANIFEST)
    lines = read_csv(out / TABLE)
    if sha256_file(out / TABLE) != about["split_sha256"]:
        raise DataError(f"{out / TABLE} was changed after it was written; put it back, or use a new --out.")
    columns = [f"fold_r{i}" for i in range(about["repeats"])]
    rows = tuple(
        FoldRow(
            *(line[key] for key in FIELDS[:4]), () if line["split"] == "test" else tuple(int(line[c]) for c in columns)
        )
        for line in lines
    )
    return Folds(rows, about["k"], about["repeats"], about["seed"])
