"""Answers for new images from an exported file: ONNX Runtime and exactly the preprocessing of training."""

from __future__ import annotations

import glob
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl import run
from mrl.data import Preprocess, list_images, read_image
from mrl.deploy.parity import check_proof
from mrl.deploy.runtimes import Runtime, open_runtime
from mrl.errors import ConfigError, DataError


@dataclass(frozen=True)
class Exported:
    """A file of `mrl export`, opened and checked.

    Args:
        runtime: what computes it.
        classes: names in the order of the outputs.
        preprocess: what images go through first.
        metadata: everything else that travels in the file.
    """

    runtime: Runtime
    classes: tuple[str, ...]
    preprocess: Preprocess
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def probabilities(self, images: Tensor) -> np.ndarray:
        """Preprocessed images (B, 3, H, W) -> (B, K)."""
        return self.runtime(images)


def predict(
    model_file: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    batch_size: int = 32,
    unproved: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Predicts images with an exported file and writes one row an image: image, prediction, p_<class>..., error.

    Rows are sorted by image. An image that cannot be read has its reason under `error` and no answer; none is left out.

    Args:
        model_file: a `model.onnx` of `mrl export`, with its `.parity.json` beside it.
        images: a folder (searched below, too), an image file, a pattern such as "line3/*.png", or a CSV with a column
            `path` (relative to the CSV's folder).
        out: the CSV to write; it appears whole or not at all.
        batch_size: images in a pass; the answers do not depend on it, memory does.
        unproved: use a file that has no proof of its equality beside it.
        overwrite: replace a CSV that is there.

    Returns:
        model, out, n_images, n_errors, errors (the first ten), classes (name -> how often), not_images (files in the
        folder that are none, not predicted), seconds.

    Raises:
        ConfigError: no such file, not a file of `mrl export`, no images, or `out` exists.
        ParityError: the file has no proof, or is not the one that was proved equal.
    """
    out = run.refuse_existing(out, overwrite)
    if isinstance(batch_size, bool) or batch_size != int(batch_size) or batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: must be a whole number of at least 1.")
    start = time.monotonic()
    exported = open_exported(model_file, unproved=unproved)
    found, others = find_images(images)
    if others:
        run.say(f"{others} files in {images} are not images and are left out (by their names).")
    counts: Counter[str] = Counter(dict.fromkeys(exported.classes, 0))
    errors: list[str] = []
    header = ["image", "prediction", *(f"p_{name}" for name in exported.classes), "error"]
    with run.progress("predict", len(found)) as advance:
        rows = _rows(exported, found, batch_size, counts, errors, advance)
        run.write_csv(out, header, rows)
    if errors:
        run.say(
            f"{len(errors)} of {len(found)} images have no answer; their rows in {out} say why. The first: {errors[0]}"
        )
    return {
        "model": Path(model_file).name,
        "out": str(out),
        "n_images": len(found),
        "n_errors": len(errors),
        "errors": errors[:10],
        "classes": dict(counts),
        "not_images": others,
        "seconds": time.monotonic() - start,
    }


def open_exported(path: Path | str, *, unproved: bool = False, threads: int | None = None) -> Exported:
    """Opens a file of `mrl export` after comparing it with its proof.

    Args:
        path: `.onnx`, `.xml` (OpenVINO) or `.pt2` (torch.export), with its `.parity.json` beside it.
        unproved: open it without a proof that fits, with a warning.
        threads: for the work of one call; None takes torch's number.

    Raises:
        ConfigError: not there, not a model file, or not one of `mrl export`.
        ParityError: no proof beside it, or changed since it was proved equal.
        MissingExtra: an OpenVINO file, and OpenVINO is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: not found; give the model.onnx that `mrl export` (or `mrl poc`) wrote.")
    check_proof(path, unproved=unproved)
    runtime = open_runtime(path, threads=threads)
    metadata = runtime.metadata
    try:
        classes = tuple(str(name) for name in metadata["classes"])
        preprocess = Preprocess.from_dict(metadata["preprocess"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: was not written by `mrl export` (it does not say its classes and preprocessing), "
            "so images cannot be prepared as in training; export the model with `mrl export`."
        ) from error
    return Exported(runtime, classes, preprocess, metadata)


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
        found = [(path.name, path)]
    else:
        matches = (Path(name) for name in glob.glob(str(path), recursive=True))
        found = [(file.as_posix(), file) for file in matches if file.is_file()]
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
    if not rows or "path" not in rows[0]:
        raise ConfigError(f"{table}: needs a header with the column path, and one line an image.")
    names = [(row["path"] or "").strip().replace("\\", "/") for row in rows]
    return [(name, table.parent / name) for name in names]


def _rows(
    exported: Exported,
    found: Sequence[tuple[str, Path]],
    batch_size: int,
    counts: Counter[str],
    errors: list[str],
    advance: Any,
) -> Iterator[list[str]]:
    """One row an image, in order; fills `counts` and `errors` on the way."""

    def prepare(item: tuple[str, Path]) -> Tensor | str:
        try:
            return exported.preprocess(read_image(item[1], bit_depth=exported.preprocess.bit_depth))
        except (DataError, OSError) as error:
            return str(error)

    blank = [""] * len(exported.classes)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, len(found), batch_size):
            part = found[start : start + batch_size]
            prepared = list(pool.map(prepare, part))
            good = [image for image in prepared if isinstance(image, Tensor)]
            answers = iter(exported.probabilities(torch.stack(good)) if good else ())
            for (name, _), image in zip(part, prepared, strict=True):
                values = None if isinstance(image, str) else next(answers)
                wrong = image if values is None else "" if np.isfinite(values).all() else "the answer is not finite"
                if wrong:
                    errors.append(f"{name}: {wrong}")
                    yield [name, "", *blank, wrong]
                    continue
                best = exported.classes[int(values.argmax())]
                counts[best] += 1
                yield [name, best, *(repr(float(p)) for p in values), ""]
            advance(len(part))
