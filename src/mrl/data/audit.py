"""What the images are, before anything is trained: bad files, duplicates, contradictions, counts -> `audit.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mrl.data.hashing import near_pairs
from mrl.data.records import ImageRecord, in_threads, inspect_image
from mrl.data.sources import ImageSource, Sample, check_classes, load_source
from mrl.errors import ConfigError, DataError
from mrl.run import environment, progress, read_json, refuse_existing, say, sha256_file, write_json

FILE = "audit.json"
NEAR_LISTED = 10_000
NEAR_LIMIT = 1_000_000
MOST_META_VALUES = 20


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used as it is, and why."""

    image: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """The checked images of a source.

    Args:
        source: where they come from.
        files: what was found in each readable image, skipped ones included.
        bad: the images that are left out, with reasons; always empty when `on_bad` is "error".
        on_bad: what was to be done with bad images.
        bit_depth: as for `read_image`.
    """

    source: ImageSource
    files: Mapping[str, ImageRecord]
    bad: tuple[BadImage, ...] = ()
    on_bad: Literal["error", "skip"] = "error"
    bit_depth: int | None = None

    @cached_property
    def kept(self) -> tuple[Sample, ...]:
        """The images that go on, in the source's order."""
        out = set(self.skipped)
        return tuple(s for s in self.source.samples if s.image not in out)

    @cached_property
    def skipped(self) -> tuple[str, ...]:
        """The names of the images that are left out."""
        return tuple(bad.image for bad in self.bad)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """The file hash of every kept image."""
        return {s.image: self.files[s.image].sha256 for s in self.kept}

    @cached_property
    def pixels(self) -> dict[str, str]:
        """The picture hash of every kept image."""
        return {s.image: self.files[s.image].pixels for s in self.kept}

    @cached_property
    def exact_duplicates(self) -> tuple[tuple[str, ...], ...]:
        """Images with the same picture, skipped ones included."""
        return tuple(group for group in _copies(self.files) if len(group) > 1)

    @cached_property
    def conflicts(self) -> tuple[tuple[str, ...], ...]:
        """Those of the exact duplicates that have contradictory labels."""
        label = {s.image: s.label for s in self.source.samples}
        return tuple(group for group in self.exact_duplicates if len({label[i] for i in group}) > 1)

    @cached_property
    def near(self) -> tuple[tuple[str, str, int], ...]:
        """Pairs of kept images that look alike and the bits their perceptual hashes differ in; no exact duplicates."""
        kept = {s.image: self.files[s.image] for s in self.kept}
        names = [group[0] for group in _copies(kept)]
        codes = [int(kept[name].phash, 16) if kept[name].phash else None for name in names]
        return tuple((names[i], names[j], d) for i, j, d in near_pairs(codes, limit=NEAR_LIMIT))

    @cached_property
    def class_counts(self) -> dict[str, int]:
        """How many kept images each class has, the test side of --test included."""
        return dict(sorted(Counter(s.label for s in self.kept).items()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the kept images, their labels, groups, files and sides."""
        rows = sorted([s.image, s.label, s.group or "", self.sha256[s.image], s.side or ""] for s in self.kept)
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @cached_property
    def n_groups(self) -> int | None:
        """How many groups the user named; None where there are none."""
        return len({s.group for s in self.kept if s.group is not None}) or None

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the results must know about the data."""
        return tuple(_warnings(self))

    def to_dict(self) -> dict[str, Any]:
        """The content of `audit.json`."""
        label = {s.image: s.label for s in self.source.samples}
        records = [self.files[s.image] for s in self.kept]
        closest = sorted(self.near, key=lambda pair: pair[2])[:NEAR_LISTED]
        return {
            "schema": 1,
            "source": self.source.spec,
            "n_files": len(self.source.samples),
            "n_kept": len(self.kept),
            "n_test": sum(s.side == "test" for s in self.kept),
            "classes": list(self.source.classes),
            "class_counts": self.class_counts,
            "bad": [{"image": b.image, "reason": b.reason, "action": "skipped"} for b in self.bad],
            "exact_duplicates": [list(group) for group in self.exact_duplicates],
            "near_duplicates": [{"a": a, "b": b, "distance": d} for a, b, d in closest],
            "n_near_duplicates": len(self.near),
            "conflicts": [{"images": list(group), "labels": [label[i] for i in group]} for group in self.conflicts],
            "sizes": _counts(r.size for r in records),
            "modes": _counts(r.mode for r in records),
            "bit_depths": _counts(str(r.bits) for r in records),
            "n_groups": self.n_groups,
            "warnings": list(self.warnings),
            "terms": self.source.terms,
            "skipped": list(self.skipped),
            "on_bad": self.on_bad,
            "bit_depth": self.bit_depth,
            "fingerprint": self.fingerprint,
            "environment": environment(),
            "meta_counts": _meta_counts(self.kept),
            "files": {image: dataclasses.asdict(record) for image, record in self.files.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: ImageSource) -> Audit:
        """The audit that `to_dict` wrote, for the same source; reads no image.

        Raises:
            DataError: images came or went, or labels or groups changed, since the audit.
        """
        bad = tuple(BadImage(b["image"], b["reason"]) for b in data["bad"])
        files = {image: ImageRecord(**record) for image, record in data["files"].items()}
        known = {*files, *(b.image for b in bad)}
        listed = {s.image for s in source.samples}
        moved = sorted(known ^ listed)
        what = (
            f"{len(listed - known)} images came and {len(known - listed)} went ({', '.join(moved[:5])})"
            if moved
            else ""
        )
        if not what:
            audit = cls(source, files, bad, data["on_bad"], data["bit_depth"])
            if audit.fingerprint == data["fingerprint"]:
                return audit
            what = "labels or groups changed"
        raise DataError(f"{source.spec}: {what} since the audit; use a new --out, or say --overwrite to audit again.")


def audit_source(
    source: ImageSource, *, on_bad: Literal["error", "skip"] = "error", bit_depth: int | None = None
) -> Audit:
    """Opens every image of a source and checks it against the others.

    Bad are: files that cannot be read in full; exact copies with contradictory labels (all of them); and, where there
    are --test images, training images that are an exact copy of one, or share its group.

    Args:
        source: the listed images.
        on_bad: "error" raises one error that lists every bad image; "skip" leaves them out and keeps the list.
        bit_depth: as for `read_image`.

    Raises:
        DataError: bad images with `on_bad="error"`, or too few images left in a class.
        ConfigError: an unknown `on_bad`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for label in ("crack", "good"):
        ...     (root / label).mkdir()
        ...     for n in range(3):
        ...         Image.new("L", (8, 8), 20 * n + len(label)).save(root / label / f"{n}.png")
        >>> audit_source(load_source(root)).class_counts
        {'crack': 3, 'good': 3}
    """
    if on_bad not in ("error", "skip"):
        raise ConfigError(f"--on-bad {on_bad}: unknown; use error or skip.")
    files: dict[str, ImageRecord] = {}
    reasons: dict[str, str] = {}
    with progress("audit", len(source.samples)) as advance:
        results = in_threads(lambda s: inspect_image(s.path, bit_depth), source.samples)
        for sample, result in zip(source.samples, results, strict=True):
            if isinstance(result, str):
                reasons[sample.image] = result
            else:
                files[sample.image] = result
            advance()
    _add_conflicts(source, files, reasons)
    _add_leaks(source, files, reasons)
    bad = tuple(BadImage(s.image, reasons[s.image]) for s in source.samples if s.image in reasons)
    if bad and on_bad == "error":
        lines = "\n".join(f"  {b.image}: {b.reason}" for b in bad)
        raise DataError(
            f"{source.spec}: {len(bad)} of {len(source.samples)} images cannot be used:\n{lines}\n"
            "mend or remove them, or say --on-bad skip to go on without them (the report lists them)."
        )
    audit = Audit(source, files, bad, on_bad, bit_depth)
    try:
        check_classes(audit.kept, source.spec)
    except DataError as error:
        note = f" ({len(bad)} bad images were skipped: {', '.join(audit.skipped)})" if bad else ""
        raise DataError(f"{error}{note}") from error
    missing = sorted(set(source.classes) - set(audit.class_counts))
    if missing:
        raise DataError(
            f"{source.spec}: every image of {', '.join(missing)} is bad ({', '.join(audit.skipped)}); mend some."
        )
    return audit


def audit(
    data: str | Path,
    out: str | Path,
    *,
    test: str | Path | None = None,
    on_bad: Literal["error", "skip"] = "error",
    bit_depth: int | None = None,
    overwrite: bool = False,
) -> Audit:
    """Checks the images of a data set and writes `audit.json` to the run folder.

    Args:
        data: a folder of class folders, a CSV with path,label[,group], or "elpv".
        out: the run folder.
        test: a folder or CSV of images that are only tested on.
        on_bad: "error" or "skip" bad images.
        bit_depth: bits in use in files of more than 8, such as 12.
        overwrite: replace an audit that is there.

    Raises:
        ConfigError: the audit is there already.
        DataError: see `load_source` and `audit_source`.
    """
    path = refuse_existing(Path(out) / FILE, overwrite)
    found = audit_source(load_source(data, test=test), on_bad=on_bad, bit_depth=bit_depth)
    write_json(path, found.to_dict())
    classes = ", ".join(f"{name} {n:,}" for name, n in found.class_counts.items())
    say(
        f"audit: {len(found.kept):,} of {len(found.source.samples):,} images ({classes}); {len(found.bad)} bad, "
        f"{len(found.exact_duplicates)} pictures with exact copies, {len(found.near):,} pairs of near duplicates"
    )
    for warning in found.warnings:
        say(f"  note: {warning}")
    return found


def load_audit(out: str | Path, data: str | Path | ImageSource, test: str | Path | None = None) -> Audit:
    """Reads the audit of a run folder back; opens no image (`changed_files` does).

    Raises:
        ConfigError: there is no `audit.json`.
        DataError: the source is not the one that was audited.
    """
    stored = read_json(Path(out) / FILE)
    return Audit.from_dict(stored, data if isinstance(data, ImageSource) else load_source(data, test=test))


def changed_files(audit: Audit) -> tuple[str, ...]:
    """The kept images whose file is gone or no longer has the bytes that were audited."""

    def same(sample: Sample) -> bool:
        try:
            return sha256_file(sample.path) == audit.sha256[sample.image]
        except OSError:
            return False

    return tuple(s.image for s, ok in zip(audit.kept, in_threads(same, audit.kept), strict=True) if not ok)


def _copies(files: Mapping[str, ImageRecord]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for image, record in files.items():
        groups[record.pixels].append(image)
    return sorted(tuple(sorted(group)) for group in groups.values())


def _add_conflicts(source: ImageSource, files: Mapping[str, ImageRecord], reasons: dict[str, str]) -> None:
    label = {s.image: s.label for s in source.samples}
    for group in Audit(source, files).conflicts:
        for image in group:
            others = ", ".join(f"{other} ({label[other]})" for other in group if other != image)
            reasons[image] = f"contradictory labels: labelled {label[image]}, and the same picture as {others}"


def _add_leaks(source: ImageSource, files: Mapping[str, ImageRecord], reasons: dict[str, str]) -> None:
    """Training images that the test side of --test holds too."""
    held = [s for s in source.samples if s.side == "test" and s.image in files and s.image not in reasons]
    pictures = {files[s.image].pixels: s.image for s in held}
    groups = {s.group: s.image for s in held if s.group is not None}
    for sample in source.samples:
        if sample.side == "test" or sample.image in reasons or sample.image not in files:
            continue
        if (twin := pictures.get(files[sample.image].pixels)) is not None:
            reasons[sample.image] = f"the same picture as {twin} of --test, so it cannot be trained on"
        elif sample.group in groups:
            reasons[sample.image] = (
                f"of group {sample.group}, as {groups[sample.group]} of --test, so it cannot be trained on"
            )


def _warnings(audit: Audit) -> Iterable[str]:
    yield from audit.source.warnings
    if audit.source.unlisted:
        names = ", ".join(audit.source.unlisted[:20]) + (", ..." if len(audit.source.unlisted) > 20 else "")
        yield f"{len(audit.source.unlisted)} files are not images of a class and were left out: {names}"
    paged = [s.image for s in audit.kept if audit.files[s.image].frames > 1]
    if paged:
        yield f"{len(paged)} files hold several pictures, of which the first is used: {', '.join(paged[:5])}"
    if audit.bad:
        yield f"{len(audit.bad)} bad images were skipped (--on-bad skip)"
    out = set(audit.skipped)
    extra = sum(len(group) - 1 for group in audit.exact_duplicates if not out & set(group))
    if extra:
        yield f"{extra} images are exact copies of others; copies stay on one side of the split"
    if audit.near:
        of = {s.image: s for s in audit.kept}
        apart = sum(of[a].label != of[b].label for a, b, _ in audit.near)
        more = "at least " if len(audit.near) >= NEAR_LIMIT else ""
        yield (
            f"{more}{len(audit.near):,} pairs of images look alike (perceptual hash within 4 bits), {apart:,} of them "
            "with different labels; they may be on both sides of the split unless --group-near is given"
        )
        across = sum(of[a].side != of[b].side for a, b, _ in audit.near)
        if across:
            yield f"{across:,} pairs of images that look alike have one in --test and one outside"


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _meta_counts(samples: Iterable[Sample]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        for name, value in sample.meta.items():
            counts[name][value] += 1
    return {name: dict(c.most_common()) for name, c in counts.items() if len(c) <= MOST_META_VALUES}
