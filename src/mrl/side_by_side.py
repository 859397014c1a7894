"""`mrl measure A B ...`: any models and files side by side on this machine, in the backends and precisions that matter to the user."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mrl import run
from mrl.cold import cold_start
from mrl.deploy.formats import PRECISIONS, lowered, write_format
from mrl.deploy.onnx import one_line
from mrl.deploy.parity import is_flat
from mrl.deploy.runtimes import PRECISION_HINTS, open_runtime
from mrl.errors import ConfigError, MrlError
from mrl.macs import image_pair
from mrl.measure import DECIDING_BLOCKS, at_image_size
from mrl.stats import latency_verdict, ratio_of_medians
from mrl.swap import save
from mrl.timing import interleave, joules, schedule, summary, warm_up

BACKENDS = ("eager", "compile", "onnxruntime", "openvino")
FILES = {"onnxruntime": ".onnx", "openvino": ".xml", "eager": ".pt2"}


@dataclass(frozen=True)
class Case:
    """One line of the table: all models under these conditions.

    Args:
        backend: "eager", "compile", "onnxruntime" or "openvino".
        precision: "fp32", "fp16", "bf16" or "int8".
        batch: images in a call.
        size: (height, width) in pixels.
        threads: of one call.
    """

    backend: str
    precision: str
    batch: int
    size: tuple[int, int]
    threads: int

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}, batch {self.batch}, {self.size[0]} x {self.size[1]}, {self.threads} threads"


def measure_side_by_side(
    subjects: Mapping[str, nn.Module | Path],
    *,
    images: Tensor,
    backends: Sequence[str] = ("onnxruntime",),
    precisions: Sequence[str] = ("fp32",),
    batches: Sequence[int] = (1,),
    sizes: Sequence[int | tuple[int, int]] = (224,),
    threads: Sequence[int] = (),
    seed: int = 0,
    seconds: float = 15.0,
) -> dict[str, Any]:
    """Times several models interleaved, A B C, C B A, ..., on real images; at least 30 blocks a case.

    The ratio of every model to the first one has a 95 % bootstrap interval of the ratio of medians; where it covers 1 the
    verdict is "not resolvable". Memory and cold start are those of a fresh process that loads the file and answers once.

    Args:
        subjects: name -> a model that gives logits, or a file of `mrl export`; the first one is what others are compared with.
        images: real images, resized and normalised, (N, 3, H, W); resized again for other sizes.
        backends: of "eager", "compile", "onnxruntime", "openvino". A file runs in its own backend only.
        precisions: of "fp32", "fp16", "bf16", "int8"; a file has its own.
        batches: images in a call.
        sizes: pixels along a side, or (height, width).
        threads: of a call; empty takes torch's number.
        seed: of the bootstrap.
        seconds: about how long a case is timed.

    Returns:
        rows (case, models with latency in ms, tail, throughput in images a second, energy in J an image, memory in MB, cold
        start in s, and for all but the first the ratio and its verdict), not_measured with reasons, environment.

    Raises:
        ConfigError: nothing to measure, an unknown backend or precision, or images that are one flat colour.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten())
        >>> photos = torch.randn(4, 3, 4, 4)
        >>> found = measure_side_by_side({"a": net, "b": net}, images=photos, backends=["eager"], sizes=[4], seconds=0.1)
        >>> sorted(found["rows"][0]["models"])
        ['a', 'b']
    """
    cases = _cases(subjects, images, backends, precisions, batches, sizes, threads)
    rows, missing = [], []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, run.progress("measure", len(cases)) as advance:
        bench = _Bench(subjects, images, Path(folder))
        for case in cases:
            found, reasons = bench.measure(case, seed, seconds)
            missing += [{"case": str(case), "model": name, "reason": why} for name, why in reasons.items()]
            if found:
                rows.append(found)
            advance(1, str(case))
    if not rows:
        why = missing[0]["reason"] if missing else "no case"
        raise ConfigError(f"measure: nothing could be measured: {why}")
    return {
        "schema": 1,
        "kind": "side_by_side",
        "models": list(subjects),
        "rows": rows,
        "not_measured": missing,
        "seconds": time.monotonic() - start,
        "environment": run.environment(),
    }


def _cases(
    subjects: Mapping[str, Any],
    images: Tensor,
    backends: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    sizes: Sequence[int | tuple[int, int]],
    threads: Sequence[int],
) -> list[Case]:
    if not subjects:
        raise ConfigError("measure: give one model or more.")
    for flag, given, known in (
        ("--backend", backends, BACKENDS),
        ("--precision", precisions, PRECISIONS),
    ):
        unknown = [value for value in given if value not in known]
        if unknown or not given:
            raise ConfigError(f"{flag} {' '.join(unknown) or 'is empty'}: use {', '.join(known)}.")
    for flag, numbers in (("--batch", batches), ("--threads", threads)):
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise ConfigError(f"{flag} {list(numbers)}: give whole numbers of at least 1.")
    if images.ndim != 4 or is_flat(images):
        raise ConfigError("measure: every image is one flat colour; latency is measured on real images.")
    pairs = [image_pair(size) for size in sizes]
    every = itertools.product(backends, precisions, batches, pairs, threads or (torch.get_num_threads(),))
    return [Case(*values) for values in every]


class _Bench:
    """Files and models of the subjects, made when first needed."""

    def __init__(self, subjects: Mapping[str, nn.Module | Path], images: Tensor, folder: Path) -> None:
        self.subjects, self.images, self.folder = dict(subjects), images, folder
        self.files: dict[tuple, Path] = {}
        self.cold: dict[tuple, dict[str, float | None]] = {}

    def measure(self, case: Case, seed: int, seconds: float) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """One row, and why some of the subjects are not in it."""
        before = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        if case.backend == "compile":
            torch.compiler.reset()  # else what earlier cases compiled counts against the limit, and later ones run eagerly
        calls, reasons, files = {}, {}, {}
        try:
            for name in self.subjects:
                try:
                    calls[name], files[name] = self._call(name, case)
                    warm = warm_up(calls[name], seconds=2)
                    calls[name].warm = warm
                except Exception as error:  # runtimes raise nearly anything for a file that does not fit
                    calls.pop(name, None)
                    reasons[name] = one_line(error)
            if not calls:
                return None, reasons
            times = {name: call.warm for name, call in calls.items()}
            blocks, each = schedule(times, seconds=seconds, min_blocks=DECIDING_BLOCKS)
            with joules() as energy:
                measured = interleave(calls, blocks=blocks, calls_per_block=each)
            models = {name: summary(measured[name], case.batch) for name in calls}
            for name in calls:
                try:
                    models[name] |= self._cold(name, case, files[name])
                except MrlError as error:
                    models[name] |= {"peak_memory_mb": None, "cold_start_s": None}
                    reasons[name] = f"no memory and cold start of a fresh process: {one_line(error)}"
            first = next(iter(calls))
            for name in list(calls)[1:]:
                ratio = ratio_of_medians(np.asarray(measured[first]), np.asarray(measured[name]), seed=seed)
                shown = {"estimate": ratio.estimate, "low": ratio.low, "high": ratio.high, "against": first}
                models[name] |= {"ratio": shown, "verdict": latency_verdict(ratio)}
            spent = energy()
            shared = None if spent is None else spent / (blocks * each * case.batch * len(calls))
            facts = {"backend": case.backend, "precision": case.precision, "batch": case.batch, "threads": case.threads}
            size = {"image_size": list(case.size), "n_blocks": blocks, "calls_per_block": each}
            return {**facts, **size, "joules_per_image_all_models": shared, "models": models}, reasons
        finally:
            torch.set_num_threads(before)

    def _call(self, name: str, case: Case) -> tuple[_Timed, Path | None]:
        subject = self.subjects[name]
        batches = self._batches(case)
        if isinstance(subject, Path) or case.backend in ("onnxruntime", "openvino"):
            path = self._file(name, case)
            runtime = open_runtime(path, threads=case.threads)
            arrays = [batch.numpy() for batch in batches]
            return _Timed(lambda i: runtime(arrays[i % len(arrays)])), path
        if case.precision == "int8":
            raise ConfigError("int8 is made for ONNX Runtime and OpenVINO.")
        model = lowered(at_image_size(subject, case.size), case.precision)
        compiled = torch.compile(model, dynamic=False) if case.backend == "compile" else model

        @torch.inference_mode()
        def call(i: int) -> Tensor:
            return compiled(batches[i % len(batches)])

        return _Timed(call), None

    def _batches(self, case: Case) -> list[Tensor]:
        pool = self.images
        if tuple(pool.shape[-2:]) != case.size:
            pool = functional.interpolate(pool, case.size, mode="bicubic", antialias=True)
        n = len(pool)
        return [
            pool[[(first + i) % n for i in range(case.batch)]].contiguous()
            for first in range(0, max(n, case.batch), case.batch)
        ]

    def _file(self, name: str, case: Case) -> Path:
        subject = self.subjects[name]
        if isinstance(subject, Path):
            wanted = FILES.get(case.backend)
            if subject.suffix != wanted:
                raise ConfigError(f"a {subject.suffix} file does not run in {case.backend}")
            notes = open_runtime(subject).metadata
            own = notes.get("precision", "fp32")
            if own != case.precision:
                raise ConfigError(f"this file is {own}, not {case.precision}")
            size = (notes.get("preprocess") or {}).get("image_size") or case.size
            if tuple(size) != case.size:
                raise ConfigError(
                    f"this file takes {' x '.join(map(str, size))} pixels, not {' x '.join(map(str, case.size))}"
                )
            return subject
        key = (name, case.backend, case.precision, case.size)
        if key not in self.files:
            path = self.folder / f"{len(self.files)}{FILES[case.backend]}"
            sized = at_image_size(subject, case.size)
            resized = self._batches(Case(case.backend, case.precision, 1, case.size, case.threads))
            write_format(sized, path, case.size, precision=case.precision, calibration=[b[0] for b in resized])
            self.files[key] = path
        return self.files[key]

    def _cold(self, name: str, case: Case, path: Path | None) -> dict[str, float | None]:
        """Of a fresh process that opens the file, or the folder of `mrl.save` of a model that PyTorch runs itself."""
        told = {"threads": case.threads, "precision": PRECISION_HINTS.get(case.precision, "f32")}
        if path is None:
            path = self._folder(name, case.size)
            told |= {"precision": case.precision, "backend": case.backend}
        key = (path, case.size, *told.values())
        if key not in self.cold:
            image = self.folder / "image.npy"
            np.save(image, self._batches(Case(case.backend, case.precision, 1, case.size, 1))[0].numpy())
            self.cold[key] = cold_start(path, image, **told)
        if self.cold[key]["cold_start_s"] is None:
            raise ConfigError("it does not run there")
        return self.cold[key]

    def _folder(self, name: str, size: tuple[int, int]) -> Path:
        """A model as `mrl.save` writes it.

        Raises:
            SwapError: a model that says too little of itself to be built in another process.
        """
        path = self.folder / f"saved{list(self.subjects).index(name)}x{size[0]}x{size[1]}"
        return path if path.is_dir() else save(at_image_size(self.subjects[name], size), path)


class _Timed:
    """A call and how long it takes when warm, in ms."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self.call, self.warm = call, 0.0

    def __call__(self, index: int) -> object:
        return self.call(index)


def table(found: Mapping[str, Any]) -> str:
    """The rows as text, a line a model and case.

    Example:
        >>> print(table({"rows": []}))
        model  case  median ms  p95  p99  images/s  memory MB  cold s  against the first
    """
    lines = [("model", "case", "median ms", "p95", "p99", "images/s", "memory MB", "cold s", "against the first")]
    for row in found["rows"]:
        size = "x".join(map(str, row["image_size"]))
        where = f"{row['machine']}: " if row.get("machine") else ""
        case = f"{where}{row['backend']} {row['precision']} b{row['batch']} {size} t{row['threads']}"
        for name, model in row["models"].items():
            ratio, numbers = model.get("ratio"), [model[f"latency_ms_{k}"] for k in ("median", "p95", "p99")]
            said = ""
            if ratio:
                said = f"x{ratio['estimate']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) {model['verdict'].replace('_', ' ')}"
            more = [model.get("peak_memory_mb"), model.get("cold_start_s")]
            shown = [f"{n:.2f}" for n in numbers] + [f"{model['throughput_img_s']:.1f}"]
            shown += ["" if more[0] is None else f"{more[0]:.0f}", "" if more[1] is None else f"{more[1]:.2f}"]
            lines.append((name, case, *shown, said))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def merge(files: Sequence[Path | str]) -> dict[str, Any]:
    """Several results of `mrl measure`, from one machine or many, as one; every row says its machine.

    Times of two machines stand side by side; they are never divided by each other, because they were not interleaved.

    Args:
        files: `measure.json` files of `mrl measure A B`.

    Raises:
        ConfigError: fewer than two, one twice, or a file that is not one of these.
    """
    if len(files) < 2:
        raise ConfigError("--merge: give two or more measure.json files.")
    rows, machines, missing, models, seen = [], [], [], [], []
    for file in files:
        found = _result(file)
        if found in seen:
            raise ConfigError(f"{file}: is the same result as {files[seen.index(found)]}; give each once.")
        seen.append(found)
        machine = f"{found['environment']['cpu']}"
        same = sum(m["cpu"] == machine for m in machines)
        label = machine if not same else f"{machine} ({same + 1})"
        machines.append({"machine": label, **found["environment"]})
        rows += [{**row, "machine": label} for row in found["rows"]]
        missing += found["not_measured"]
        models += [name for name in found["models"] if name not in models]
    return {
        "schema": 1,
        "kind": "merged",
        "models": models,
        "machines": machines,
        "rows": rows,
        "not_measured": missing,
    }


def _result(file: Path | str) -> dict[str, Any]:
    """A result of one machine."""
    try:
        found = run.read_json(file)
    except ValueError as error:
        raise ConfigError(f"{file}: is not JSON ({error}); copy it again, or measure again.") from error
    whole = isinstance(found, dict) and {"rows", "models", "not_measured", "environment"} <= found.keys()
    if isinstance(found, dict) and found.get("kind") == "merged":
        raise ConfigError(f"{file}: is merged already; give the measure.json files that it was made of.")
    if not whole or found.get("kind") != "side_by_side" or not isinstance(found["environment"], dict):
        raise ConfigError(f"{file}: was not written by `mrl measure A B`; measure again.")
    return found
