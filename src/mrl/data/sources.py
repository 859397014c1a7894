"""Where images and labels come from: a folder of class folders, a CSV, or the demo's data set."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mrl.errors import ConfigError, DataError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp"}
    | {".pgm", ".ppm", ".pnm", ".pbm", ".gif"}
)
"""What an image file's name may end in (in any case); of a GIF or a TIFF with pages the first frame is read."""

SIDES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""Folder names that mean a data set which is already split, not classes."""

LAYOUT = "expected one folder a class, such as FOLDER/good/1.png and FOLDER/crack/2.png, or a CSV with path,label"
FORMS = "a folder of class folders, a .csv with path,label, or elpv"


@dataclass(frozen=True)
class Sample:
    """One image with its label.

    Args:
        image: its name in every file of a run: a posix path relative to the source, "test/..." for images of --test.
        path: where it lies.
        label: its class.
        group: what must stay together (lot, patient, module), or None.
        weight: how sure the label is, up to 1; used only where sample weights are asked for.
        side: "test" for images of --test, else None.
        meta: other columns of the source, as text.
    """

    image: str
    path: Path
    label: str
    group: str | None = None
    weight: float = 1.0
    side: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageSource:
    """The images of a data set, before anything was opened.

    Args:
        spec: what was asked for.
        samples: the images, sorted by name, those of --test last.
        classes: their labels, sorted.
        warnings: what a reader of the results must know.
        terms: under which terms the images may be used, where that is known.
        unlisted: files in the folder that are not images.
    """

    spec: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    terms: str | None = None
    unlisted: tuple[str, ...] = ()


def load_source(spec: str | Path, *, test: str | Path | None = None) -> ImageSource:
    """Lists the images of a data set with their labels; opens none of them.

    Args:
        spec: a folder of class folders; a CSV with `path,label` and, if wanted, `group` and `weight` (paths relative to
            the CSV's folder, other columns become `meta`); or "elpv" (package elpv-dataset).
        test: a second folder or CSV with images of the same classes that are only ever tested on.

    Raises:
        ConfigError: `spec` or `test` is nothing of these.
        DataError: no images, one class, a class with too few images, rows or files that are wrong.
        MissingExtra: "elpv" without its package.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for label in ("crack", "good"):
        ...     (root / label).mkdir()
        ...     for n in range(3):
        ...         _ = (root / label / f"{n}.png").write_bytes(b"")
        >>> source = load_source(root)
        >>> source.classes, source.samples[0].image
        (('crack', 'good'), 'crack/0.png')
    """
    source = _load(spec, "--data")
    if test is None:
        check_classes(source.samples, source.spec)
        return source
    held = _load(test, "--test")
    classes = {s.label for s in source.samples}
    unknown = sorted({s.label for s in held.samples} - classes)
    if unknown:
        raise DataError(
            f"--test {test}: has images of {', '.join(unknown)}, which {source.spec} does not have; "
            f"use the same labels ({', '.join(sorted(classes))}), or take those images out."
        )
    samples = (*source.samples, *(_as_test(s) for s in held.samples))
    check_classes(samples, source.spec)
    return ImageSource(
        source.spec,
        samples,
        source.classes,
        (*source.warnings, *held.warnings),
        " / ".join(dict.fromkeys(t for t in (source.terms, held.terms) if t)) or None,
        (*source.unlisted, *(f"test/{name}" for name in held.unlisted)),
    )


def list_images(folder: Path | str) -> tuple[list[Path], list[Path]]:
    """The image files below a folder and the files that are none, both sorted; hidden files and folders are left out.

    Raises:
        DataError: a name that is not Unicode text.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("b.PNG", "notes.txt", ".hidden.png"):
        ...     _ = (root / name).write_bytes(b"")
        >>> [[p.name for p in part] for part in list_images(root)]
        [['b.PNG'], ['notes.txt']]
    """
    files = sorted(_walk(Path(folder), set()), key=lambda path: path.as_posix())
    for path in files:
        if any("\ud800" <= letter <= "\udfff" for letter in path.as_posix()):
            raise DataError(f"{path.as_posix()!a}: the file's name is not Unicode text; rename it.")
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    return images, [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]


def check_classes(samples: tuple[Sample, ...], spec: str) -> None:
    """Refuses samples that no comparison can be made of: fewer than two classes, or a class too small for its sides.

    A class needs 3 images: one each for training, inner validation and test; with --test 2, and 1 there.

    Raises:
        DataError: says what was found and needed.

    Example:
        >>> check_classes((Sample("a.png", Path("a.png"), "good"),), "photos")
        Traceback (most recent call last):
        mrl.errors.DataError: photos: has images of one class only (good); a comparison needs at least 2 classes...
    """
    here = Counter(s.label for s in samples if s.side is None)
    held = Counter(s.label for s in samples if s.side == "test")
    if not here:
        raise DataError(f"{spec}: no images to train on; {LAYOUT}.")
    if len(here) == 1:
        raise DataError(
            f"{spec}: has images of one class only ({next(iter(here))}); "
            f"a comparison needs at least 2 classes; {LAYOUT}."
        )
    needed = 2 if held else 3
    small = [f"{label} has {n}" for label, n in sorted(here.items()) if n < needed]
    if small:
        sides = "training and inner validation" if held else "training, inner validation and test"
        raise DataError(
            f"{spec}: too few images of a class: {', '.join(small)}, and each class needs at least {needed} "
            f"(for {sides}); add images of it, or take the class out."
        )
    absent = sorted(set(here) - set(held))
    if held and absent:
        raise DataError(f"--test: has no image of {', '.join(absent)}; add some, each class needs at least 1 there.")


def _load(spec: str | Path, flag: str) -> ImageSource:
    if str(spec) == "elpv":
        from mrl.data.elpv import load_elpv

        return load_elpv()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_folder(path, flag)
    if path.is_file():
        if path.suffix.lower() not in {".csv", ".txt"}:
            raise ConfigError(f"{flag} {spec}: is a file and not a CSV; give {FORMS}.")
        from mrl.data.tables import load_table

        return load_table(path, flag)
    raise ConfigError(f"{flag} {spec}: not found; give {FORMS}.")


def _load_folder(root: Path, flag: str) -> ImageSource:
    images, others = list_images(root)
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not images:
        what = "holds no image" if others or folders else "is empty"
        raise DataError(f"{flag} {root}: {what}; {LAYOUT} (image files: {' '.join(sorted(IMAGE_SUFFIXES))}).")
    if not folders:
        raise DataError(f"{flag} {root}: {len(images)} images lie directly in it and have no label; {LAYOUT}.")
    if len(folders) > 1 and {p.name.lower() for p in folders} <= SIDES:
        train = next((p for p in folders if p.name.lower().startswith("train")), folders[0])
        others = [p for p in folders if p is not train]
        test = next((p for p in others if p.name.lower().startswith("test")), others[0])
        raise DataError(
            f"{flag} {root}: its folders ({', '.join(p.name for p in folders)}) are sides of a split, not classes; "
            f"give --data {train} --test {test}."
        )
    samples, loose = [], list(others)
    for path in images:
        name = path.relative_to(root)
        if len(name.parts) == 1:
            loose.append(path)
        else:
            samples.append(Sample(name.as_posix(), path, name.parts[0]))
    labels = {s.label for s in samples}
    warnings = [f"folder {p.name} holds no image and is no class" for p in folders if p.name not in labels]
    unlisted = tuple(sorted(p.relative_to(root).as_posix() for p in loose))
    return ImageSource(str(root), tuple(samples), tuple(sorted(labels)), tuple(warnings), None, unlisted)


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:  # a link back to a folder above
        return
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == "Thumbs.db":
            continue
        if path.is_dir():
            yield from _walk(path, seen | {real})
        else:
            yield path


def _as_test(sample: Sample) -> Sample:
    return dataclasses.replace(sample, image=f"test/{sample.image}", side="test")
