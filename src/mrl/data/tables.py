"""Images and labels listed in a CSV."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

from mrl.data.sources import ImageSource, Sample
from mrl.errors import DataError

COLUMNS = ("path", "label", "group", "weight")
"""The columns with a meaning of their own; the first two must be there, others become `Sample.meta`."""


def load_table(path: Path, flag: str = "--data") -> ImageSource:
    r"""Reads a UTF-8 CSV with `path,label` and, if wanted, `group` and `weight`.

    Args:
        path: the CSV; the paths in it are relative to its folder, or absolute.
        flag: how the user gave it, for messages.

    Raises:
        DataError: columns are missing, or one line each for the rows that are wrong: an empty field, a file that is not
            there, an image listed twice, a weight outside (0, 1].

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> _ = (root / "1.png").write_bytes(b"")
        >>> _ = (root / "all.csv").write_text("path,label,group,line\n1.png,good,lot7,B\n")
        >>> sample = load_table(root / "all.csv").samples[0]
        >>> sample.image, sample.label, sample.group, dict(sample.meta)
        ('1.png', 'good', 'lot7', {'line': 'B'})
    """
    header, rows = _rows(path, flag)
    samples: dict[str, tuple[int, Sample]] = {}
    wrong: list[str] = []
    for line, row in rows:
        if len(row) > len(header):
            wrong.append(f"line {line}: {len(row)} fields under {len(header)} columns (quote fields that hold a comma)")
            continue
        # A short row lacks its last columns, which `_sample` looks for.
        values = dict(zip(header, (cell.strip() for cell in row), strict=False))
        sample = _sample(path, values, line, wrong)
        if sample is None:
            continue
        if sample.image in samples:
            wrong.append(f"line {line}: {sample.image} is listed already in line {samples[sample.image][0]}")
            continue
        samples[sample.image] = (line, sample)
    if wrong:
        raise DataError(f"{flag} {path}: {len(wrong)} rows to mend:\n  " + "\n  ".join(wrong))
    if not samples:
        raise DataError(f"{flag} {path}: has a header and no rows; add one line an image: path,label.")
    ordered = tuple(sample for _, (_, sample) in sorted(samples.items()))
    ungrouped = sum(s.group is None for s in ordered)
    warnings = ()
    if 0 < ungrouped < len(ordered):
        warnings = (f"{ungrouped} of {len(ordered)} rows of {path.name} have an empty group; each counts as its own",)
    return ImageSource(str(path), ordered, tuple(sorted({s.label for s in ordered})), warnings)


def _rows(path: Path, flag: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise DataError(f'{flag} {path}: is not UTF-8 text; save it as "CSV UTF-8".') from error
    except csv.Error as error:
        raise DataError(
            f"{flag} {path}: is not a CSV ({error}); save it again with commas and closed quotes."
        ) from error
    if not lines:
        raise DataError(f"{flag} {path}: is empty; it needs a header path,label and one line an image.")
    header = [name.strip().lower() for name in lines[0][1]]
    missing = [name for name in COLUMNS[:2] if name not in header]
    if missing:
        hint = " (the separator must be a comma)" if len(header) == 1 and any(c in header[0] for c in ";\t|") else ""
        raise DataError(
            f"{flag} {path}: line 1: no column {' and no column '.join(missing)} among {', '.join(header)}{hint}; "
            "the header must be path,label or path,label,group."
        )
    if len(set(header)) < len(header):
        raise DataError(f"{flag} {path}: line 1: a column is there twice in {', '.join(header)}; keep one of them.")
    return header, lines[1:]


def _sample(table: Path, values: dict[str, str], line: int, wrong: list[str]) -> Sample | None:
    empty = [name for name in COLUMNS[:2] if not values.get(name)]
    if empty:
        wrong.append(f"line {line}: no {' and no '.join(empty)}")
        return None
    try:
        weight = float(values.get("weight") or 1.0)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= 1:
        wrong.append(f"line {line}: weight {values['weight']} is not a number above 0 and at most 1")
        return None
    text = values["path"].replace("\\", "/")
    path = table.parent / text
    if not path.is_file():
        wrong.append(f"line {line}: {values['path']} {'is a folder' if path.is_dir() else 'is not there'}")
        return None
    meta = {name: value for name, value in values.items() if name and name not in COLUMNS}
    return Sample(_name(table.parent, text), path, values["label"], values.get("group") or None, weight, None, meta)


def _name(root: Path, text: str) -> str:
    """The image's name: relative to the CSV's folder where it lies below it."""
    if os.path.isabs(text):
        inside = [os.path.relpath(text, start) for start in (root.absolute(), root.resolve())]
        text = next((name for name in inside if not name.startswith("..")), text)
    return Path(os.path.normpath(text)).as_posix()
