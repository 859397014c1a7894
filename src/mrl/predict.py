"""Answers for new images from an exported file, as a table: streamed, resumed after a kill, nothing left out."""

from __future__ import annotations

import csv
import glob
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mrl import run
from mrl.data import list_images
from mrl.deploy.runtimes import files_of
from mrl.errors import ConfigError, DataError
from mrl.explain import MAP_SUFFIX, write_map
from mrl.journal import Journal
from mrl.predictor import AHEAD, Answer, Predictor, check_batch

STDIN = "-"


def predict(
    model_file: Path | str,
    images: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    batch_size: int = 32,
    threads: int | None = None,
    explain: bool = False,
    unproved: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Predicts images with an exported file and writes one row an image: image, prediction, p_<class>..., error.

    Rows are sorted by name within each source that is given; standard input keeps its order. An image that cannot be read
    has its reason under `error` and no answer; none is left out. What is done lies in `<out>.part` until the table is whole: the same call goes on from there
    after a kill, and gives the same table. Memory does not grow with the number of images, but for their names.

    Args:
        model_file: a file of `mrl export` (`.onnx`, `.xml` or `.pt2`), with its `.parity.json` beside it.
        images: a folder (searched below, too), an image file, a pattern such as "line3/*.png", a CSV with a column
            `path` (relative to the CSV's folder), "-" for paths on standard input, a line each, as they come; or several of these.
        out: the table to write: `.csv`, `.jsonl` or `.parquet`; it appears whole or not at all.
        batch_size: images in a pass; the answers do not depend on it, memory does.
        threads: for the work of one pass; None takes torch's number.
        explain: also write a region map of each picture to `<out without suffix>_maps`, named in the column `map`.
        unproved: use a file that has no proof of its equality beside it.
        overwrite: replace a table that is there.

    Returns:
        model, out, n_images, n_errors, errors (the first ten), classes (name -> how often), not_images (files in the
        folder that are none, not predicted), resumed_at, seconds.

    Raises:
        ConfigError: no such file, not a file of `mrl export`, no images, or `out` exists.
        ParityError: the file has no proof, or is not the one that was proved equal.
        MissingExtra: Parquet without pyarrow, or an OpenVINO file without OpenVINO.
    """
    out, batch_size = run.refuse_existing(out, overwrite), check_batch(batch_size)
    start = time.monotonic()
    model = Predictor(model_file, unproved=unproved, threads=threads)
    given = [str(images)] if isinstance(images, (str, Path)) else [str(each) for each in images]
    live = STDIN in given
    maps = _maps_folder(out, given) if explain else None
    found, total, others = _found(given, maps)
    job = {
        "schema": 1,
        "model": {part.name: run.sha256_file(part) for part in files_of(model_file)},
        "images": given,
        "batch_size": batch_size,
        "explain": explain,
    }
    columns = ["image", "prediction", *(f"p_{name}" for name in model.classes), *(["map"] if explain else []), "error"]
    tally = _Tally(model.classes)
    with Journal(out, job, overwrite=overwrite) as journal, run.progress("predict", total) as advance:
        done = journal.keep(batch_size)
        for row, item in itertools.zip_longest(journal.rows(), itertools.islice(found, done)):
            if row is None or item is None or (item[0], _stamp(item[1])) != (row["image"], row["stamp"]):
                raise ConfigError(
                    f"{(item or [row['image']])[0]}: the images are not those of the unfinished run in {journal.path} (another name, size or time); "
                    "put them back, delete that file, or say --overwrite with another --out."
                )
            tally.count(row)
            advance()
        if done:
            run.say(f"going on after {done} images that {journal.path.name} has already.")
        rows = _rows(model, found, batch_size, 0 if live else AHEAD, maps)
        while part := list(itertools.islice(rows, batch_size)):
            journal.write(part)
            for row in part:
                tally.count(row)
            advance(len(part))
        journal.finish(columns)
    return {
        "model": Path(model_file).name,
        "out": str(out),
        **tally.told(out),
        "not_images": others,
        "resumed_at": done,
        "seconds": time.monotonic() - start,
    }


class _Tally:
    """What the summary says; it does not grow with the number of rows."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.n = self.n_errors = 0
        self.errors: list[str] = []
        self.classes: Counter[str] = Counter(dict.fromkeys(classes, 0))

    def count(self, row: dict[str, Any]) -> None:
        self.n += 1
        if row["error"]:
            self.n_errors += 1
            if len(self.errors) < 10:
                self.errors.append(f"{row['image']}: {row['error']}")
        else:
            self.classes[row["prediction"]] += 1

    def told(self, out: Path) -> dict[str, Any]:
        """The counts; what has no answer is said aloud, too."""
        if self.n_errors:
            where = f"their rows in {out} say why. The first: {self.errors[0]}"
            run.say(f"{self.n_errors} of {self.n} images have no answer; {where}")
        counts = {"n_images": self.n, "n_errors": self.n_errors, "errors": self.errors}
        return {**counts, "classes": dict(self.classes)}


def _rows(
    model: Predictor, found: Iterable[tuple[str, Path]], batch_size: int, ahead: int, maps: Path | None
) -> Iterator[dict[str, Any]]:
    """One row an image, in order."""
    names, paths = itertools.tee(found)
    answers = model.stream((path for _, path in paths), batch_size=batch_size, ahead=ahead)
    for answer, (name, path) in zip(answers, names, strict=False):
        row = {"image": name, "stamp": _stamp(path), "prediction": answer.prediction, **_columns(model, answer)}
        if maps is not None and not answer.error:
            try:
                row["map"] = write_map(model, path, maps, name).relative_to(maps.parent).as_posix()
            except (DataError, OSError) as error:  # it is gone since the answer, or there is no room for its map
                run.say(f"{name}: has an answer, but no map: {error}")
        yield {**row, "error": _text(answer.error)}


def _maps_folder(out: Path, given: Sequence[str]) -> Path:
    """Where the region maps go: not among the images, or the next run would take them for images."""
    maps = out.with_name(out.stem + MAP_SUFFIX)
    inside = next(
        (each for each in given if Path(each).is_dir() and maps.resolve().is_relative_to(Path(each).resolve())), None
    )
    if inside is not None:
        raise ConfigError(
            f"--out {out}: lies in {inside}, where the maps of --explain would be taken for images; give another."
        )
    return maps


def _text(name: str | Path) -> str:
    """A name that a UTF-8 table can hold: bytes that are no text, and NUL, are written as escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _columns(model: Predictor, answer: Answer) -> dict[str, float | None]:
    values = [None] * len(model.classes) if answer.probabilities is None else map(float, answer.probabilities)
    return {f"p_{name}": value for name, value in zip(model.classes, values, strict=True)}


def _stamp(path: Path) -> list[int] | None:
    """Size and time of a file, to notice that it was replaced between two runs."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _found(given: Sequence[str], maps: Path | None) -> tuple[Iterator[tuple[str, Path]], int | None, int]:
    """The images of all that was given but maps, how many they are (None: not known yet), and the files that are none."""
    if given == [STDIN]:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a file's name may be any bytes
        lines = (line.strip() for line in sys.stdin)
        return ((_text(line.replace("\\", "/")), Path(line)) for line in lines if line), None, 0
    if STDIN in given:
        raise ConfigError("predict: - (standard input) stands alone; give folders and files in another call.")
    found, others = [], 0
    for each in given:
        part, rest = find_images(each)
        if maps is not None:  # a pattern may match those of an earlier call
            part = [(name, path) for name, path in part if not path.absolute().is_relative_to(maps.absolute())]
        found, others = found + part, others + rest
    if len(given) > 1:  # the same name in two folders
        times = Counter(name for name, _ in found)
        found = [(name if times[name] == 1 else _text(path.as_posix()), path) for name, path in found]
    if others:
        run.say(f"{others} files in {', '.join(given)} are not images and are left out (by their names).")
    return iter(found), len(found), others


def find_images(images: Path | str) -> tuple[list[tuple[str, Path]], int]:
    """The images to predict as sorted (name, path), and how many files of the folder are none.

    Raises:
        ConfigError: nothing there, or a CSV without the column `path`.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("b.png", "a.png", "notes.txt"):
        ...     _ = (root / name).write_bytes(b"")
        >>> found, others = find_images(root)
        >>> [name for name, _ in found], others
        (['a.png', 'b.png'], 1)
    """
    path, others = Path(images).expanduser(), 0
    if path.is_dir():
        files, rest = list_images(path)
        found, others = [(file.relative_to(path).as_posix(), file) for file in files], len(rest)
    elif path.is_file() and path.suffix.lower() == ".csv":
        found = _listed(path)
    elif path.is_file():
        found = [(_text(path.name), path)]
    else:
        matches = (Path(name) for name in glob.glob(str(path), recursive=True))
        found = [(_text(file.as_posix()), file) for file in matches if file.is_file()]
    if not found:
        raise ConfigError(
            f"{images}: no images there; give a folder, an image, a pattern, or a CSV with a column path."
        )
    return sorted(found), others


def _listed(table: Path) -> list[tuple[str, Path]]:
    try:
        rows = run.read_csv(table)
    except UnicodeDecodeError as error:
        raise ConfigError(f'{table}: is not UTF-8 text; save it as "CSV UTF-8".') from error
    except csv.Error as error:
        raise ConfigError(f"{table}: is not a CSV ({error}); give one line an image, with the column path.") from error
    if not rows or "path" not in rows[0]:
        raise ConfigError(f"{table}: needs a header with the column path, and one line an image.")
    names = [(row["path"] or "").strip().replace("\\", "/") for row in rows]
    return [(_text(name), table.parent / name) for name in names]
