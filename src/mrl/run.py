"""A run is a folder: files that appear whole or not at all, the machine they came from, and progress with time left."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError

LIBRARIES = (
    "torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "scikit-learn", "onnx", "onnxruntime", "openvino", "nncf",
)  # fmt: skip


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` when the block ends well.

    A killed process leaves no half-written `path`; an exception leaves `path` as it was.

    Args:
        path: the file or folder to make. The block must create the temporary path it is given.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with writing(folder / "a.txt") as part:
        ...     _ = part.write_text("whole")
        >>> (folder / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    part = scratch / path.name
    try:
        yield part
        if path.is_dir() and part.is_dir():
            os.replace(path, scratch / "old")
        os.replace(part, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def plain(value: Any) -> Any:
    """`value` with numpy and tuple types turned into what JSON has; NaN and infinities become None.

    Example:
        >>> plain({"a": (1, float("nan"))})
        {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return value.as_posix()
    return value


def write_json(path: Path | str, data: Any) -> Path:
    """Writes `data` as indented UTF-8 JSON, whole or not at all; returns the path."""
    with writing(path) as part:
        part.write_text(json.dumps(plain(data), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Path(path)


def read_json(path: Path | str) -> Any:
    """Reads a JSON file of a run.

    Raises:
        ConfigError: the file is not there, with the verb that writes it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: not found; run the step that writes it first (`mrl poc` runs all of them).")
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Writes a UTF-8 CSV with a header, whole or not at all; returns the path."""
    with writing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return Path(path)


def read_csv(path: Path | str) -> list[dict[str, str]]:
    """Reads a CSV with a header into one dictionary a row."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: not found; run the step that writes it first (`mrl poc` runs all of them).")
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def refuse_existing(path: Path | str, overwrite: bool = False) -> Path:
    """Returns `path` when it may be written.

    Raises:
        ConfigError: it exists and `overwrite` is off.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another --out, or say --overwrite to replace it.")
    return path


def sha256_text(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment() -> dict[str, Any]:
    """The machine and the library versions that a result belongs to (no user names, hosts or paths).

    Example:
        >>> sorted(environment())
        ['cpu', 'gpu', 'libraries', 'mrl', 'os', 'python', 'threads']
    """
    import torch

    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    try:
        own = metadata.version("mrl")
    except metadata.PackageNotFoundError:
        own = "not installed"
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "mrl": own,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "libraries": versions,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def world() -> int:
    """The processes of the launch (`torchrun`, `accelerate launch`) that this one belongs to; 1 without any.

    Example:
        >>> world()
        1
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def leads() -> bool:
    """Whether this process writes files and prints: the first of its launch, or one on its own.

    Example:
        >>> leads()
        True
    """
    return world() == 1 or os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Prints one line for the person at the terminal, on standard error (standard output is for results).

    Of the processes of a launch only the first one prints.
    """
    if not leads():
        return
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


@contextlib.contextmanager
def progress(title: str, total: int | None) -> Iterator[Any]:
    """A progress bar on standard error with time left; yields `advance(n=1, note="")`.

    Where standard error is not a terminal it prints a line at most every 20 seconds instead.

    Example:
        >>> with progress("reading", 2) as advance:
        ...     advance()
        ...     advance()
    """
    if sys.stderr.isatty() and leads():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")

            def advance(n: int = 1, note: str | None = None) -> None:
                bar.update(task, advance=n, **({} if note is None else {"note": note}))

            yield advance
        return
    yield _lines(title, total)


def _lines(title: str, total: int | None) -> Any:
    import time

    start = last = time.monotonic()
    done = 0

    def advance(n: int = 1, note: str | None = None) -> None:
        nonlocal last, done
        done += n
        now = time.monotonic()
        if now - last < 20:
            return
        last = now
        left = f", {(now - start) / done * (total - done):.0f} s left" if total and done else ""
        of = f"/{total}" if total else ""
        say(f"{title}: {done}{of}{left}{'; ' + note if note else ''}")

    return advance
