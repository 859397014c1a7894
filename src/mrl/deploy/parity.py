"""The gate: an exported file answers like its model on real images, or it is not written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrl import run
from mrl.deploy.hurt import MOST_IMAGES, Hurt, layers_that_hurt, percent
from mrl.deploy.onnx import plain_float
from mrl.deploy.runtimes import files_of, open_runtime
from mrl.errors import ConfigError, ParityError
from mrl.stats import Interval, combine, newcombe_paired

BATCHES = (1, 8)
NAMED = 5  # layers in a refusal


def parity_path(path: Path | str) -> Path:
    """Where the proof of an ONNX file lies.

    Example:
        >>> parity_path("runs/a/model.onnx").as_posix()
        'runs/a/model.parity.json'
    """
    return Path(path).with_suffix(".parity.json")


def check_proof(path: Path | str, *, unproved: bool = False) -> dict[str, Any] | None:
    """Compares an exported file, byte by byte, with what its proof says; returns the proof, or None for `unproved`.

    Args:
        path: of the file; OpenVINO's weights beside it are compared too.
        unproved: take a file without a proof, with a damaged one, or with the proof of another file, with a warning.

    Raises:
        ParityError: no proof, a damaged one, or the proof of another file.
    """
    path, proof = Path(path), parity_path(path)
    found, wrong = None, None
    if not proof.is_file():
        wrong = f"{proof.name} is not beside {path.name}, so nothing shows that it equals its model"
    else:
        try:
            found = json.loads(proof.read_text(encoding="utf-8"))
            proved = set((found.get("files") or {found["file"]: found["sha256"]}).values())
            changed = [part.name for part in files_of(path) if run.sha256_file(part) not in proved]
        except (ValueError, KeyError, TypeError, AttributeError):
            changed, wrong = [], f"{proof.name} is damaged, so nothing shows that {path.name} equals its model"
        except OSError as error:
            raise ParityError(f"{path}: {error.filename} is not there; copy all files of the export.") from error
        if changed:
            wrong = (
                f"{', '.join(changed)} is not the file that {proof.name} proves equal to its model (another SHA-256): "
                "it was changed or damaged"
            )
    if wrong is None:
        return found
    if not unproved:
        raise ParityError(f"{path}: {wrong}; copy the files again, export again, or say --unproved to use it as it is.")
    run.say(f"warning: {wrong}.")
    return None


def check_parity(
    path: Path | str,
    model: nn.Module,
    images: Any,
    *,
    tolerance: float = 1e-4,
    precision: str = "fp32",
    max_drop: float = 0.005,
    targets: Sequence[int] | None = None,
    metric: str = "accuracy",
    hurt: Sequence[str] = (),
    calibration: Any = (),
) -> dict[str, Any]:
    """Compares an exported file with its model on every image: batches of 8, an odd tail, and up to 32 images one by one.

    In float32 the probabilities agree within `tolerance` and the decisions are the same. In any other precision the
    metric may drop, by `max_drop` at most: the one-sided 95 % bound of its drop (Newcombe's paired interval, class by class
    for balanced accuracy) counts, not the drop that was seen. Where that is too much, every layer is put into the
    precision by itself (`mrl.deploy.hurt`), and the refusal names the ones that change the answers most.

    Args:
        path: of the file; it is opened as `mrl predict` opens it.
        model: what the file should equal; it runs in eval mode and float32, as evaluation runs it.
        images: as for `mrl.export.export_model`.
        tolerance: the largest difference of a probability in float32.
        precision: of the file.
        max_drop: of the metric, as a share.
        targets: class index of every image; None takes the model's own decisions, so that every flip is a loss.
        metric: "accuracy" or "balanced_accuracy".
        hurt: layers that the accuracy control of int8 gave back to float32, worst first.
        calibration: images that set the ranges of int8, for the layers that a refusal names.

    Returns:
        n_images, n_answers, max_abs_diff, tolerance, same_decisions, flips, ties, batches, and for other precisions
        precision, metric, drop with its bounds, and max_drop.

    Raises:
        ConfigError: every image is one flat colour.
        ParityError: not equal, a value that is not finite, or a drop that may be larger than `max_drop`; its `facts` hold
            what was found.
    """
    runtime, plain, n = open_runtime(path), plain_float(model), len(images)
    rows = [i % n for i in range(max(n, 8))]  # fewer than 8 images fill one batch of 8 by repeating
    if len(rows) % 8 == 0:
        rows += [i % n for i in range(3)]  # always an odd tail
    groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    groups += [[int(i)] for i in np.unique(np.linspace(0, n - 1, min(n, 32)).astype(int))]
    found, expected, flat = [], [], True
    with run.progress("proving equality", len(groups)) as advance:
        for group in groups:
            batch = take_images(images, group)
            flat = flat and is_flat(batch)
            expected.append(torch_probabilities(plain, batch).numpy())
            found.append(runtime(batch))
            advance()
    if flat:
        raise ConfigError(f"{Path(path).name}: every image is one flat colour; equality is proved on real test images.")
    ours, theirs = np.concatenate(found), np.concatenate(expected)
    if precision == "fp32":
        return {"n_images": n, **_judge(ours, theirs, tolerance)}

    def blame() -> list[Hurt]:
        sample = [int(i) for i in np.unique(np.linspace(0, n - 1, MOST_IMAGES).astype(int))]
        rows = [int(i) for i in np.unique(np.linspace(0, len(calibration) - 1, MOST_IMAGES).astype(int))]
        ranges = take_images(calibration, rows) if len(calibration) else None
        return layers_that_hurt(plain, take_images(images, sample), precision, calibration=ranges, skip=hurt)

    chosen = np.asarray(theirs[:n].argmax(1) if targets is None else targets)
    given = np.array([row for group in groups for row in group])
    return {"n_images": n, **_judge_lower(ours, theirs, given, chosen, precision, metric, max_drop, hurt, blame)}


def _finite(found: np.ndarray, expected: np.ndarray) -> None:
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise ParityError(
            f"the exported file gave values that are not finite, or shape {found.shape} instead of {expected.shape}; "
            "nothing was written: keep using the torch model."
        )


def _judge(found: np.ndarray, expected: np.ndarray, tolerance: float) -> dict[str, Any]:
    """Float32: equal numbers and the same decisions."""
    _finite(found, expected)
    largest = float(np.abs(found.astype(np.float64) - expected).max())
    chosen = expected[np.arange(len(found)), found.argmax(1)]
    other = found.argmax(1) != expected.argmax(1)
    tied = other & (expected.max(1) - chosen <= 2 * tolerance)
    wrong = int((other & ~tied).sum())
    if largest > tolerance or wrong:
        raise ParityError(
            f"the exported file is not the model: probabilities differ by {largest:.2g} (allowed: {tolerance:.2g}) "
            f"and {wrong} of {len(found)} decisions changed; nothing was written: keep using the torch model."
        )
    answers = {"n_answers": len(found), "max_abs_diff": largest, "tolerance": tolerance, "flips": 0}
    return {**answers, "same_decisions": True, "ties": int(tied.sum()), "batches": list(BATCHES)}


def _judge_lower(
    found: np.ndarray,
    expected: np.ndarray,
    given: np.ndarray,
    target: np.ndarray,
    precision: str,
    metric: str,
    max_drop: float,
    returned: Sequence[str],
    blame: Callable[[], list[Hurt]],
) -> dict[str, Any]:
    """Any other precision: the bound of the metric's drop; `given` says which image each answer is of, each once at first.

    An image that was answered in a batch and by itself counts with the worse of its answers: a runtime may compute single
    images in another graph.
    """
    n = len(target)
    try:
        _finite(found, expected)
    except ParityError as error:
        layers = blame()
        named = f"{str(error).replace('; nothing', _named(returned, layers) + '; nothing')}"
        facts = {"n_images": n, "returned_to_fp32": list(returned), "hurt": list(map(asdict, layers))}
        raise ParityError(named, facts=facts) from None
    ours, theirs = found[:n].argmax(1), expected[:n].argmax(1)
    flipped = np.zeros(n, bool)
    for image, answer, meant in zip(given, found.argmax(1), expected.argmax(1), strict=True):
        flipped[image] |= answer != meant
        if answer != target[image]:
            ours[image] = answer
    flips, drop = int(flipped.sum()), metric_drop(target, theirs, ours, metric)
    facts = {
        "n_answers": len(found),
        "max_abs_diff": float(np.abs(found.astype(np.float64) - expected).max()),
        "tolerance": None,
        "same_decisions": flips == 0,
        "flips": flips,
        "ties": 0,
        "batches": list(BATCHES),
        "precision": precision,
        "metric": metric,
        "drop": {"estimate": drop.estimate, "low": drop.low, "high": drop.high},
        "max_drop": max_drop,
    }
    if drop.high <= max_drop:
        return facts
    layers = blame()
    moved = float(np.abs(found[:n] - expected[:n]).sum(1).mean() / 2)
    seen = f"{100 * drop.estimate:.1f} points (up to {100 * drop.high:.1f}, one-sided 95 %)"
    more = ""
    if not flips:
        needed = _images_needed(max_drop, target, metric)
        more = f"; about {needed} images would be needed to show it without a flip"
    raise ParityError(
        f"{precision} drops {metric.replace('_', ' ')} by {seen} on {n} images, {flips} decisions changed; allowed: "
        f"{100 * max_drop:.1f} points{_named(returned, layers, moved)}{more}; nothing was written: use fp32, more images, or "
        "a larger --max-drop.",
        facts={"n_images": n, **facts, "returned_to_fp32": list(returned), "change": moved, "hurt": list(map(asdict, layers))},
    )  # fmt: skip


def _named(returned: Sequence[str], layers: Sequence[Hurt], moved: float | None = None) -> str:
    """Who is to blame: what the accuracy control gave back already, then what hurts most by itself."""
    given = [f"{name} (in float32 again, which was not enough)" for name in returned[:NAMED]]
    given += [f"and {len(returned) - NAMED} more given back"] if len(returned) > NAMED else []
    whole = "" if moved is None else f"; all of the file: {percent(moved)}"
    worst = [str(hurt) for hurt in layers[:NAMED]]
    if worst:
        worst[-1] += f" (share of the probability that moves with that layer alone{whole})"
    return f"; layers that hurt: {', '.join([*given, *worst])}" if given or worst else ""


def metric_drop(target: np.ndarray, before: np.ndarray, after: np.ndarray, metric: str = "accuracy") -> Interval:
    """By how much a metric of decisions falls, with one-sided 95 % bounds at both ends.

    drop = metric(before) - metric(after), by Newcombe's paired interval at alpha = 0.1; balanced accuracy class by class.

    Args:
        target: true class of every image, (N,).
        before: decisions of the model, (N,).
        after: decisions of the file, (N,).
        metric: "accuracy" or "balanced_accuracy".

    Example:
        >>> same = np.zeros(656, int)
        >>> drop = metric_drop(same, same, same)
        >>> drop.estimate, round(drop.high, 4)
        (0.0, 0.0041)
    """
    groups = [np.ones(len(target), bool)] if metric == "accuracy" else [target == c for c in np.unique(target)]
    parts = []
    for group in groups:
        a, b = before[group] == target[group], after[group] == target[group]
        counts = (int((x & y).sum()) for x, y in ((a, b), (~a, b), (a, ~b), (~a, ~b)))  # second minus first
        parts.append(newcombe_paired(*counts, alpha=0.1))
    return parts[0] if len(parts) == 1 else combine(parts)


def _images_needed(max_drop: float, target: np.ndarray, metric: str) -> int:
    """With this many images, in the same shares of the classes, and no flip, the bound of the metric's drop is `max_drop`."""
    counts = np.bincount(target) if metric == "balanced_accuracy" else np.array([len(target)])
    shares = counts[counts > 0] / counts.sum()

    def bound(n: int) -> float:
        same = np.repeat(np.arange(len(shares)), np.maximum(1, np.round(n * shares)).astype(int))
        return metric_drop(same, same, same, metric).high

    low, high = 1, 8
    while bound(high) > max_drop and high < 10**6:
        low, high = high, 2 * high
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if bound(middle) > max_drop else (low, middle)
    return -(-high // 10) * 10


def is_flat(images: Tensor) -> bool:
    """Whether every image is one flat colour: each of its channels holds one value.

    Args:
        images: (B, 3, H, W).

    Example:
        >>> is_flat(torch.tensor([-2.1, -2.0, -1.8])[None, :, None, None].expand(2, 3, 4, 4))  # black, normalised
        True
    """
    channels = images.flatten(2)
    return bool((channels.amax(2) == channels.amin(2)).all())


def take_images(images: Any, rows: Sequence[int]) -> Tensor:
    """Some images as (n, 3, H, W) float32 on the CPU, from a tensor, or from items that are or have one ("image").

    Raises:
        ConfigError: the images are not (3, H, W).

    Example:
        >>> take_images([{"image": torch.zeros(3, 4, 4)}], [0, 0]).shape
        torch.Size([2, 3, 4, 4])
    """
    items = [images[row] for row in rows]
    tensors = [torch.as_tensor(item["image"] if isinstance(item, Mapping) else item) for item in items]
    if tensors[0].ndim != 3:
        raise ConfigError(f"images of shape {tuple(tensors[0].shape)}; give (3, H, W) each, resized and normalised.")
    return torch.stack(tensors).detach().to("cpu", torch.float32).contiguous()


@torch.no_grad()
def torch_probabilities(plain: nn.Module, images: Tensor) -> Tensor:
    """The reference: not the exported wrapper, but softmax in float64 of what the model itself gives.

    Example:
        >>> torch_probabilities(nn.Flatten(), torch.zeros(1, 2, 1, 1)).tolist()
        [[0.5, 0.5]]
    """
    return torch.softmax(plain(images).double(), -1)
