"""Scores a fitted arm once on the test side, and keeps every image's probabilities on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from mrl.data.loading import ImageSet, make_loader
from mrl.errors import ConfigError
from mrl.fit_loop import START
from mrl.run import progress, read_csv, read_json, write_csv, write_json
from mrl.scores import score_all

HEADER = ("image", "target", "arm", "repeat", "fold", "seed")
SCHEMA = 1


@dataclass(frozen=True)
class Predictions:
    """The probabilities of one arm, repeat and fold, in the order of the images.

    Args:
        arm: name.
        images: ids.
        targets: class names.
        classes: class names in the order of the columns.
        probabilities: (N, K) float64, rows sum to 1.
        repeat: of a repeated cross-validation.
        fold: of it.
        seed: of the fit.
    """

    arm: str
    images: tuple[str, ...]
    targets: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: np.ndarray
    repeat: int = 0
    fold: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the sizes."""
        n, k = len(self.images), len(self.classes)
        if len(self.targets) != n or self.probabilities.shape != (n, k):
            raise ConfigError(
                f"predictions of {self.arm}: {n} images, {len(self.targets)} targets, {k} classes and probabilities "
                f"{self.probabilities.shape} do not belong together; give one target and one row an image."
            )

    @property
    def target_indices(self) -> np.ndarray:
        """The targets as columns of `probabilities`."""
        column = {name: i for i, name in enumerate(self.classes)}
        return np.array([column[t] for t in self.targets], dtype=np.int64)


@torch.no_grad()
def predict_probabilities(
    model: nn.Module, images: ImageSet, *, batch_size: int = 64, device: torch.device | str | None = None
) -> np.ndarray:
    """Class probabilities of every image, in fp32 with a float64 softmax, without augmentation of any kind.

    Args:
        model: images (B, 3, H, W) -> logits (B, K); it is left in the mode and on the device it came in.
        images: an `ImageSet` without augmentation.
        batch_size: images at a time; changes nothing but speed and memory.
        device: where to compute; None is where the model is.

    Shape:
        -> (N, K) float64.

    Raises:
        ConfigError: the image set augments.

    Example:
        >>> from mrl.data import Preprocess
        >>> nobody = ImageSet([], ["a", "b"], Preprocess((8, 8)))
        >>> predict_probabilities(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), nobody).shape
        (0, 2)
    """
    if images.augment is not None:
        raise ConfigError("predict_probabilities: these images are augmented; give an ImageSet with augment=None.")
    home, training = next(model.parameters()).device, model.training
    device = torch.device(device or home)
    model.to(device).eval()
    parts = []
    try:
        with progress("predicting", len(images)) as advance, torch.autocast(device.type, enabled=False):
            for batch in make_loader(images, batch_size):
                logits = model(batch["image"].to(device, torch.float32))
                parts.append(logits.double().softmax(-1).cpu().numpy())
                advance(len(logits))
    finally:
        model.to(home).train(training)
    return np.concatenate(parts) if parts else np.zeros((0, len(images.classes)))


def write_predictions(path: Path | str, predictions: Sequence[Predictions]) -> Path:
    """Writes `predictions.csv`: what is there of other arms stays, what is given replaces its own arm, repeat and fold.

    One row an image and arm: image, target, arm, repeat, fold, seed, p_<class>...; probabilities with all digits of a
    float64, so that reading them back gives the same numbers. The file appears whole or not at all.

    Raises:
        ConfigError: the classes differ from those in the file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "predictions.csv"
        >>> p = Predictions("baseline", ("a.png",), ("bad",), ("bad", "good"), np.array([[0.25, 0.75]]))
        >>> write_predictions(path, [p]).read_text().split()
        ['image,target,arm,repeat,fold,seed,p_bad,p_good', 'a.png,bad,baseline,0,0,0,0.25,0.75']
    """
    path = Path(path)
    kept = read_predictions(path) if path.is_file() else []
    new = {(p.arm, p.repeat, p.fold) for p in predictions}
    every = [p for p in kept if (p.arm, p.repeat, p.fold) not in new] + list(predictions)
    classes = every[0].classes
    for p in every:
        if p.classes != classes:
            names = f"{', '.join(p.classes)} of {p.arm} are not {', '.join(classes)}"
            raise ConfigError(f"{path}: the classes {names}; use a new --out.")
    rows = [
        (image, target, p.arm, p.repeat, p.fold, p.seed, *map(repr, values))
        for p in sorted(every, key=lambda p: (p.repeat, p.fold, p.arm))
        for image, target, values in zip(p.images, p.targets, p.probabilities.tolist(), strict=True)
    ]
    return write_csv(path, [*HEADER, *(f"p_{name}" for name in classes)], rows)


def read_predictions(path: Path | str) -> list[Predictions]:
    """Reads `predictions.csv`, one record for each arm, repeat and fold, in the order of the file.

    Raises:
        ConfigError: the file is not there, empty, or not one of ours.
    """
    rows = read_csv(path)
    if not rows or list(rows[0])[: len(HEADER)] != list(HEADER):
        raise ConfigError(f"{path}: not a predictions file of this version; run `mrl evaluate --overwrite`.")
    classes = tuple(name.removeprefix("p_") for name in list(rows[0])[len(HEADER) :])
    groups: dict[tuple[str, int, int, int], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], int(row["repeat"]), int(row["fold"]), int(row["seed"])), []).append(row)
    return [
        Predictions(
            arm,
            tuple(row["image"] for row in part),
            tuple(row["target"] for row in part),
            classes,
            np.array([[float(row[f"p_{name}"]) for name in classes] for row in part]),
            repeat,
            fold,
            seed,
        )
        for (arm, repeat, fold, seed), part in groups.items()
    ]


def evaluate_arm(
    model: nn.Module,
    folder: Path | str,
    images: ImageSet,
    *,
    metric: str,
    batch_size: int = 64,
    repeat: int = 0,
    fold: int = 0,
) -> tuple[Predictions, dict[str, Any]]:
    """Scores an arm's best candidate once on the test side, and beside it the linear probe it started from, if it did.

    Args:
        model: the arm's best candidate; unchanged afterwards.
        folder: the arm's, with the `fit.json` and `start.safetensors` of `fit`.
        images: the test side.
        metric: the primary metric.
        batch_size: images at a time.
        repeat: for the predictions.
        fold: for the predictions.

    Returns:
        The predictions, and the arm's part of `evaluation.json`: `linear_probe` (the primary metric of the starting
        head, None for a fit from scratch), `metrics`, `linear_probe_metrics`, `below_linear_probe` (the best candidate is
        below the probe on the test side), and `warnings`.
    """
    folder = Path(folder)
    record = read_json(folder / "fit.json")
    probabilities = predict_probabilities(model, images, batch_size=batch_size)
    names = tuple(s.image for s in images.samples)
    targets = tuple(s.label for s in images.samples)
    arm = record["arm"]
    found = Predictions(arm, names, targets, tuple(images.classes), probabilities, repeat, fold, record["seed"])
    metrics = score_all(found.target_indices, probabilities)
    probed = record["config"].get("start", "probe") == "probe"
    probe_metrics = metrics if probed else None
    if probed and record["best_update"] != 0:
        best = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(load_file(folder / START))
        probe_metrics = score_all(found.target_indices, predict_probabilities(model, images, batch_size=batch_size))
        model.load_state_dict(best)
    below = probed and metrics[metric] < probe_metrics[metric]
    warnings = []
    if below:
        warnings.append(
            f"{arm}: the fit ended below its linear probe on the test side ({metric} {metrics[metric]:.4f} against "
            f"{probe_metrics[metric]:.4f})"
        )
    part = {
        "linear_probe": probe_metrics[metric] if probed else None,
        "metrics": metrics,
        "linear_probe_metrics": probe_metrics,
        "below_linear_probe": below,
        "warnings": warnings,
    }
    return found, part


def write_evaluation(path: Path | str, arms: Mapping[str, Mapping[str, Any]], stamp: Mapping[str, Any]) -> Path:
    """Writes `evaluation.json`; the parts of arms that are not given stay.

    Args:
        path: the file.
        arms: parts from `evaluate_arm`.
        stamp: protocol hash and environment.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "evaluation.json"
        >>> _ = write_evaluation(path, {"mrl": {"linear_probe": 0.9}}, {})
        >>> _ = write_evaluation(path, {"baseline": {"linear_probe": 0.8}}, {})
        >>> sorted(read_json(path)["arms"])
        ['baseline', 'mrl']
    """
    there = read_json(path)["arms"] if Path(path).is_file() else {}
    return write_json(path, {"schema": SCHEMA, **stamp, "arms": {**there, **arms}})
