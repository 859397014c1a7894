"""What a model costs on this machine: latency side by side, memory, multiply-adds, and hours for a million images."""

from __future__ import annotations

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
from mrl.deploy.onnx import open_session, plain_float, to_onnx
from mrl.deploy.parity import is_flat, take_images
from mrl.errors import ConfigError, MrlError
from mrl.macs import Cost, count, image_pair, twin
from mrl.memory import memory_left_mb, needed_mb, peak_memory_mb
from mrl.stats import Interval, latency_verdict, ratio_of_medians
from mrl.timing import MIN_BLOCKS, Blocks, Call, interleave, mean_interval, schedule, summary, warm_up

BACKENDS = ("eager", "onnxruntime")
DECIDING_BLOCKS = 30
ALPHA = 0.05  # of the intervals of the ratios, all together
POOL = 32  # different images that the calls go through in turn
SHARE = {"decides": 0.25, "protocol": 0.08, "other": 0.15}  # of the time budget, a row
PATIENCE = 4  # a row that needs more than this many times its share is not measured

Size = tuple[int, int]
Resize = Callable[[nn.Module, Any], nn.Module | None]


class TooMuch(ConfigError):
    """A measurement that takes more time or memory than there is; it is left out, and the reason is reported."""


@dataclass(frozen=True)
class Row:
    """One measurement: every arm, under the same conditions."""

    backend: str
    batch: int
    size: Size
    seconds: float
    min_blocks: int = MIN_BLOCKS
    decides: bool = False


def measure_arms(models: Mapping[str, nn.Module], **options: Any) -> dict[str, Any]:
    """`measure_models` for the arms of a comparison, baseline first, then mrl; ratios are to the baseline.

    Args:
        models: {"baseline": ..., "mrl": ...}, and any others.
        options: those of `measure_models`.

    Raises:
        ConfigError: one of these two is not there.
    """
    if not {"baseline", "mrl"} <= set(models):
        raise ConfigError(f"measure_arms: arms {sorted(models)}; give 'baseline' and 'mrl'.")
    return measure_models({arm: models[arm] for arm in dict.fromkeys(("baseline", "mrl", *models))}, **options)


def measure_models(
    models: Mapping[str, nn.Module],
    *,
    image_size: int | Size,
    images: Any,
    backends: Sequence[str] = BACKENDS,
    batches: Sequence[int] = (1, 8),
    other_sizes: Sequence[int] = (224, 448, 896),
    resize: Resize | None = None,
    seed: int = 0,
    time_budget_s: float = 90.0,
    files: Sequence[Path | str] = (),
    preprocess: Any = None,
) -> dict[str, Any]:
    """Times one model, or several side by side, on real images; the CPU, float32, torch's number of threads.

    The row that decides is ONNX Runtime at the first batch size and `image_size`, at least 30 blocks. Other image sizes
    use ONNX Runtime at batch 1 on the same images resized, at least 5 blocks, or stand in `image_sizes_not_measured`
    with the reason. Memory is the peak of a fresh process that loads the file and runs one image (Python and ONNX
    Runtime included), in MB of 1e6 bytes. Hours for a million images come from the mean latency of the deciding row:
    the model alone, one image at a time; with `files` and `preprocess` also from file to answer (`end_to_end`).

    Args:
        models: name -> model. Ratios are to the first one; with m > 1 others, their intervals are of level
            1 - 0.05 / m, so that all of them hold at once with 95 %. They are not altered.
        image_size: pixels along a side, or (height, width): the size that decides.
        images: real images, resized and normalised: (N, 3, H, W), or items that are (3, H, W) or have it under "image".
        backends: "eager" (torch), "onnxruntime".
        batches: batch sizes at `image_size`.
        other_sizes: more sizes, for how the ratio changes with the image.
        resize: (model, size) -> a model for that size; None takes `at_image_size`.
        seed: of the bootstrap.
        time_budget_s: about how long the timing takes, exports aside; it sets the number of blocks.
        files: image files, read and preprocessed for the end-to-end time.
        preprocess: `mrl.data.Preprocess`, for `files`.

    Returns:
        What `measure.json` holds: rows, arms, verdict, latency_ratio, million_images_hours, end_to_end, and what was
        not measured, with the reason.

    Raises:
        ConfigError: no model, an unknown backend, images that are not real, or a model that cannot run.
    """
    _check(models, backends, batches)
    start, size = time.monotonic(), image_pair(image_size)
    if preprocess is None and files:
        raise ConfigError("measure: files need preprocess, to be measured as they are used.")
    rows = _plan(backends, batches, size, time_budget_s)
    extra = [image_pair(s) for s in dict.fromkeys(other_sizes) if image_pair(s) != size]
    found, skipped, missing = [], [], []
    with tempfile.TemporaryDirectory() as folder, run.progress("measure", len(rows) + len(extra)) as advance:
        with Bench(models, size, _pool(images), Path(folder), seed) as bench:
            for row in rows:
                try:
                    found.append(bench.measure(row))
                except TooMuch as error:
                    skipped.append({"backend": row.backend, "batch": row.batch, "reason": str(error)})
                advance(1, f"{row.backend}, batch {row.batch}")
            arms = bench.costs()
            end_to_end = bench.end_to_end(files, preprocess) if files else None
        for other in extra:
            try:
                with bench.resized(other, resize or at_image_size) as larger:
                    found.append(larger.measure(Row("onnxruntime", 1, other, SHARE["other"] * time_budget_s)))
            except (MrlError, MemoryError) as error:
                missing.append({"image_size": _as_json(other), "reason": str(error)})
            advance(1, f"{other[0]} x {other[1]} pixels")
    deciding = next(row for row in found if row["decides"])
    return {
        "schema": 1,
        "rows": found,
        "arms": arms,
        "verdict": deciding["verdict"],
        "latency_ratio": deciding["ratio"],
        **_each(deciding),
        "million_images_hours": bench.hours,
        "end_to_end": end_to_end,
        "rows_not_measured": skipped,
        "image_sizes_not_measured": missing,
        "seconds": time.monotonic() - start,
        "environment": run.environment(),
    }


def _check(models: Mapping[str, nn.Module], backends: Sequence[str], batches: Sequence[int]) -> None:
    if not models:
        raise ConfigError("measure: 0 models; give one, or more to compare.")
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown or not backends:
        raise ConfigError(f"measure: backends {list(backends)}; choose from {', '.join(BACKENDS)}.")
    if not batches or any(not isinstance(b, int) or b < 1 for b in batches):
        raise ConfigError(f"measure: batches {list(batches)}; give whole numbers of at least 1.")


def _plan(backends: Sequence[str], batches: Sequence[int], size: Size, budget: float) -> list[Row]:
    """The rows at the protocol's image size, the deciding one first, while the machine is quiet."""
    ordered = sorted(backends, key=lambda name: name != "onnxruntime")
    rows = [
        Row(backend, batch, size, SHARE["protocol"] * budget) for batch in dict.fromkeys(batches) for backend in ordered
    ]
    first = rows[0]
    decides = Row(first.backend, first.batch, size, SHARE["decides"] * budget, DECIDING_BLOCKS, True)
    return [decides, *rows[1:]]


def _pool(images: Any) -> Tensor:
    """Up to 32 of the images, spread evenly: (n, 3, H, W)."""
    if not len(images):
        raise ConfigError("measure: no images; latency is measured on real images, give at least one.")
    pool = take_images(images, [int(i) for i in np.unique(np.linspace(0, len(images) - 1, POOL).astype(int))])
    if is_flat(pool):
        raise ConfigError("measure: every image is one flat colour; latency is measured on real images.")
    return pool


class Bench:
    """The models at one image size, ready to be timed; ONNX files and sessions are made when first needed.

    Args:
        models: name -> model.
        size: (height, width).
        pool: real images (n, 3, H, W) of any size; resized here.
        folder: for ONNX files.
        seed: of the bootstrap.
    """

    def __init__(self, models: Mapping[str, nn.Module], size: Size, pool: Tensor, folder: Path, seed: int) -> None:
        self.models = {arm: plain_float(model) for arm, model in models.items()}
        self.size, self.pool, self.folder, self.seed = size, pool, folder, seed
        self.sessions: dict[str, Any] = {}
        self._costs: dict[str, Cost] = {}
        self.hours: dict[str, dict[str, float]] = {}
        if tuple(pool.shape[-2:]) != size:
            self.pool = functional.interpolate(pool, size, mode="bicubic", antialias=True)

    def resized(self, size: Size, resize: Resize) -> Bench:
        """The same models at another size.

        Raises:
            ConfigError: a model that cannot have this size.
        """
        wanted = size[0] if size[0] == size[1] else size
        models = {}
        for arm, model in self.models.items():
            changed = resize(model, wanted)
            if changed is None:
                raise ConfigError(f"the model of arm {arm} cannot take images of {size[0]} x {size[1]} pixels")
            models[arm] = changed
        return Bench(models, size, self.pool, self.folder, self.seed)

    def measure(self, row: Row) -> dict[str, Any]:
        """One row of `measure.json`.

        Raises:
            TooMuch: not the row that decides, and its least sample takes far more than its share of time, or of memory.
        """
        if not row.decides:
            self._check_memory(row.batch)
        calls = {arm: self._call(arm, row) for arm in self.models}
        warm = {arm: warm_up(call) for arm, call in calls.items()}
        if not row.decides:
            self._check_time(sum(warm.values()), row)
        blocks, calls_per_block = schedule(warm, seconds=row.seconds, min_blocks=row.min_blocks)
        times = interleave(calls, blocks=blocks, calls_per_block=calls_per_block)
        if row.decides:
            self.hours = {arm: _hours(times[arm], row.batch, self.seed) for arm in times}
        ratios = _ratios(times, self.seed)
        ratio = next(iter(ratios.values()), None)
        return {
            "backend": row.backend,
            "precision": "fp32",
            "batch": row.batch,
            "image_size": _as_json(row.size),
            "threads": torch.get_num_threads(),
            "n_blocks": blocks,
            "calls_per_block": calls_per_block,
            "arms": {arm: summary(times[arm], row.batch) for arm in times},
            "ratio": None if ratio is None else _ends(ratio),
            "verdict": None if ratio is None else latency_verdict(ratio),
            **({"ratios": {arm: _ends(found) for arm, found in ratios.items()}} if len(ratios) > 1 else {}),
            "decides": row.decides,
            "note": f"only {blocks} blocks, to save time" if blocks < DECIDING_BLOCKS else None,
        }

    def _check_time(self, block_ms: float, row: Row) -> None:
        allowed = PATIENCE * row.seconds
        if block_ms / 1e3 * row.min_blocks > allowed:
            each, least = f"a block takes {block_ms / 1e3:.1f} s", row.min_blocks
            raise TooMuch(f"{each}, and {least} of them are the least; the time budget allows {allowed:.0f} s")

    def _check_memory(self, batch: int) -> None:
        needed, left = sum(needed_mb(self.cost(arm), batch) for arm in self.models), memory_left_mb()
        if left is not None and needed > 0.8 * left:
            raise TooMuch(f"it needs about {needed:.0f} MB of memory, and {left:.0f} MB are left")

    def cost(self, arm: str) -> Cost:
        """The arm's parameters and multiply-adds at this size."""
        if arm not in self._costs:
            self._costs[arm] = count(self.models[arm], self.size)
        return self._costs[arm]

    def _call(self, arm: str, row: Row) -> Call:
        n = len(self.pool)
        turns = range(0, max(n, row.batch), row.batch)
        batches = [self.pool[[(start + i) % n for i in range(row.batch)]].contiguous() for start in turns]
        if row.backend == "onnxruntime":
            session, arrays = self.session(arm), [batch.numpy() for batch in batches]
            return lambda i: session.run(None, {"image": arrays[i % len(arrays)]})
        model = self.models[arm]

        def eager(i: int) -> None:
            with torch.inference_mode():
                model(batches[i % len(batches)])

        return eager

    def file(self, arm: str) -> Path:
        """The arm's ONNX file."""
        path = self._path(arm)
        return path if path.is_file() else to_onnx(self.models[arm], path, self.size)

    def _path(self, arm: str) -> Path:
        return self.folder / f"{list(self.models).index(arm)}_{self.size[0]}x{self.size[1]}.onnx"

    def session(self, arm: str) -> Any:
        """The arm's ONNX Runtime session."""
        if arm not in self.sessions:
            self.sessions[arm] = open_session(self.file(arm))
        return self.sessions[arm]

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.sessions.clear()
        for arm in self.models:
            self._path(arm).unlink(missing_ok=True)

    def costs(self) -> dict[str, dict[str, float | None]]:
        """What does not depend on the clock: parameters, multiply-adds, peak memory, size of the file."""
        image = self.folder / "image.npy"
        np.save(image, self.pool[:1].numpy())
        costs = {}
        for arm in self.models:
            cost, path = self.cost(arm), self.file(arm)
            memory = peak_memory_mb(path, image)
            file_mb = path.stat().st_size / 1e6
            costs[arm] = {"params_m": cost.params_m, "gmacs": cost.gmacs, "peak_memory_mb": memory, "file_mb": file_mb}
        return costs

    def end_to_end(self, files: Sequence[Path | str], preprocess: Any) -> dict[str, Any]:
        """From file to answer, one image at a time: reading, resizing and ONNX Runtime, interleaved over the arms."""
        from mrl.data import read_image

        chosen = [files[int(i)] for i in np.unique(np.linspace(0, len(files) - 1, POOL).astype(int))]

        def read(i: int) -> np.ndarray:
            image = read_image(chosen[i % len(chosen)], bit_depth=preprocess.bit_depth)
            return preprocess(image)[None].numpy()

        calls: dict[str, Call] = {}
        for arm in self.models:
            session = self.session(arm)
            calls[arm] = lambda i, session=session: session.run(None, {"image": read(i)})
        for call in calls.values():
            warm_up(call, seconds=1)
        times = interleave({"": read, **calls}, blocks=len(chosen), calls_per_block=1)
        arms = {arm: {"latency_ms_median": float(np.median(times[arm]))} for arm in calls}
        for arm in arms:
            arms[arm]["million_images_hours"] = _hours(times[arm], 1, self.seed)
        return {"n_images": len(chosen), "read_ms_median": float(np.median(times[""])), "arms": arms}


def at_image_size(model: nn.Module, image_size: int | Size) -> nn.Module:
    """A copy of a trained model that takes images of another size: weights shared, position embeddings resampled.

    Args:
        model: stays as it is. The outermost part with timm's `set_input_size` is resized; a model without one is taken
            as it is, if it takes the size.
        image_size: pixels along a side, or (height, width).

    Raises:
        ConfigError: the model cannot have this size.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", img_size=32, num_classes=3)
        >>> at_image_size(model, 64)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 3])
    """
    size = image_pair(image_size)
    copy = twin(model)
    for module in copy.modules():
        if callable(getattr(module, "set_input_size", None)):
            try:
                module.set_input_size(img_size=size)
            except (AssertionError, RuntimeError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"{type(model).__name__} cannot take images of {size[0]} x {size[1]}: {error}"
                ) from error
            break
    count(copy, size)
    return copy


def _ratios(times: Blocks, seed: int) -> dict[str, Interval]:
    """The ratio of every model but the first to the first."""
    first, *others = times
    alpha = ALPHA / max(len(others), 1)
    told = {"seed": seed, "alpha": alpha}
    return {arm: ratio_of_medians(np.asarray(times[first]), np.asarray(times[arm]), **told) for arm in others}


def _ends(ratio: Interval) -> dict[str, float]:
    return {"estimate": ratio.estimate, "low": ratio.low, "high": ratio.high}


def _each(deciding: Mapping[str, Any]) -> dict[str, Any]:
    """With several models beside the first: the level of the intervals, and every one's ratio and verdict."""
    ratios = deciding.get("ratios")
    if not ratios:
        return {}
    said = {arm: latency_verdict(Interval(**ends, method="")) for arm, ends in ratios.items()}
    found = [{"arm": arm, "latency_ratio": ends, "verdict": said[arm]} for arm, ends in ratios.items()]
    return {"alpha": ALPHA / len(ratios), "comparisons": found}


def _hours(blocks: Sequence[Sequence[float]], batch: int, seed: int) -> dict[str, float]:
    """Hours for a million images from milliseconds a call."""
    names = ("estimate", "low", "high")
    return {name: ms / batch / 3.6 for name, ms in zip(names, mean_interval(blocks, seed=seed), strict=True)}


def _as_json(size: Size) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
