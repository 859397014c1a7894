"""Rows that survive a kill: written line by line, read back, and turned into CSV, JSON lines or Parquet at the end."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mrl import run
from mrl.errors import ConfigError, MissingExtra

SUFFIXES = (".csv", ".jsonl", ".parquet")
CHUNK = 8192


class Journal:
    """`<out>.part`, one JSON object a line, and `<out>.part.json`, what it belongs to.

    Args:
        out: the table that it becomes.
        job: what has to be the same for a journal to be gone on with.
        overwrite: begin again where another job's journal lies.

    Raises:
        ConfigError: an unknown suffix, a folder in its place, one that cannot be written, or the journal of another job.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "a.csv"
        >>> with Journal(out, {"model": "x"}) as journal:
        ...     journal.write([{"image": "a.png", "p": 0.25}])
        >>> with Journal(out, {"model": "x"}) as journal:
        ...     _ = journal.keep(1)
        ...     _ = journal.finish(["image", "p"])
        >>> out.read_text().splitlines()
        ['image,p', 'a.png,0.25']
    """

    def __init__(self, out: Path | str, job: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.out = Path(out)
        if self.out.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"--out {self.out}: its name has to end in {', '.join(SUFFIXES)}.")
        if self.out.is_dir():
            raise ConfigError(f"--out {self.out}: is a folder; give the name of a file in it.")
        if self.out.suffix.lower() == ".parquet":
            _parquet()
        self.path = self.out.with_name(self.out.name + ".part")
        self.note = self.out.with_name(self.out.name + ".part.json")
        job = run.plain(dict(job))
        if self.path.is_file() and not (self.note.is_file() and _read(self.note) == job):
            if not overwrite:
                raise ConfigError(
                    f"{self.path}: an unfinished run with another model or other images is there; delete it, choose "
                    "another --out, or say --overwrite."
                )
            self.path.unlink()
        with self._writable():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            run.write_json(self.note, job)
            self.file = self.path.open("a+b")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is there, row by row; a line that was cut off in the middle is left out."""
        self.file.seek(0)
        for line in self.file:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)

    def keep(self, multiple: int) -> int:
        """Cuts the journal back to a multiple of so many whole rows, and returns how many that is."""
        self.file.seek(0)
        count = end = 0
        for number, line in enumerate(iter(self.file.readline, b""), 1):
            if not line.endswith(b"\n"):
                break
            if number % multiple == 0:
                count, end = number, self.file.tell()
        self.file.truncate(end)
        self.file.seek(0, os.SEEK_END)
        return count

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; they are in the file when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._writable():
            self.file.write(text.encode("utf-8"))
            self.file.flush()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """A full disk or a folder without the right to write, in one sentence."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"--out {self.out}: cannot be written ({error.strerror}); mend that, or give another --out; what is done stays in "
                f"{self.path.name}."
            ) from error

    def finish(self, columns: Sequence[str]) -> Path:
        """Writes the table, whole or not at all, and deletes the journal."""
        kind = self.out.suffix.lower()
        with self._writable(), run.writing(self.out) as part:
            if kind == ".parquet":
                _write_parquet(part, columns, self.rows())
            else:
                with part.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file)
                    if kind == ".csv":
                        writer.writerow(columns)
                    for row in self.rows():
                        if kind == ".csv":
                            writer.writerow([_cell(row.get(name)) for name in columns])
                        else:
                            file.write(json.dumps({n: row.get(n) for n in columns}, ensure_ascii=False) + "\n")
        self.file.close()
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        return self.out


def _cell(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _parquet() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "Parquet needs pyarrow: `pip install mrl[parquet]`, or name the --out .csv or .jsonl."
        ) from error
    return pyarrow


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterator[dict[str, Any]]) -> None:
    """Row groups of a few thousand, so that memory does not grow with the table."""
    arrow = _parquet()
    schema = arrow.schema([(n, arrow.float64() if n.startswith("p_") else arrow.string()) for n in columns])
    with arrow.parquet.ParquetWriter(path, schema) as writer:
        while part := list(islice(rows, CHUNK)):
            writer.write_table(arrow.Table.from_pylist([{n: row.get(n) for n in columns} for row in part], schema))
