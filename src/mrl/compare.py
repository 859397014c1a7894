"""Compares the two arms' stored predictions: scores with intervals, paired tests, and the verdict on quality."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mrl.compared import check_metric, check_same_images, groups_of, read_compared
from mrl.decision import decision_of
from mrl.errors import DataError
from mrl.family import At, Judged, compare_family, known_ends
from mrl.pairs import ARMS, Pairs, pair_predictions
from mrl.run import plain
from mrl.scores import METRICS, Scorer, confusion_matrix
from mrl.stats import (
    Interval,
    Resamples,
    combine,
    delong,
    holm,
    mcnemar_exact,
    more_images,
    newcombe_paired,
    quality_verdict,
    resample,
    wilson,
)

__all__ = ["compare", "compare_predictions", "decision_of"]

FEW_DISAGREEMENTS = 20  # below it the bootstrap of a difference of shares is too narrow (8 % of errors at 5, not 5 %)
FEW_UNITS = 30
FEW_OF_A_CLASS = 10
SCOPE = (
    "The intervals cover which images were drawn for the test side. Each arm was trained once: what another training "
    "seed or another split would give is not in them."
)


def compare_predictions(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    margin: float,
    alpha: float = 0.05,
    groups: Mapping[str, Hashable] | None = None,
    seed: int = 0,
    n_resamples: int = 10_000,
    linear_probes: Mapping[str, float | None] | None = None,
    arms: tuple[str, str] = ARMS,
) -> dict[str, Any]:
    """The content of `comparison.json` from the rows of `predictions.csv`; a pure function.

    The primary interval is the paired bootstrap BCa of the difference (mrl - baseline) over groups. Where the arms
    disagree in correctness on fewer than 20 images (or groups), it is Newcombe's instead (by class and combined for
    balanced accuracy): the bootstrap knows no disagreement but those it saw, and with none it would claim certainty.
    Both arms are scored on the same draws. With groups, counts enter closed-form intervals as if a group were one
    image, McNemar's test becomes the sign test over groups, and DeLong is left out.

    Args:
        rows: one an image and arm: image, target, arm, repeat, fold, seed, p_<class>...
        metric: the primary one: accuracy, balanced_accuracy, macro_f1 or auroc.
        margin: delta, a fraction.
        alpha: 1 - confidence.
        groups: image -> group; images that are not in it stand alone.
        seed: of the bootstrap.
        n_resamples: draws of the bootstrap.
        linear_probes: test score of a linear probe of each arm, to be repeated beside the arm's.
        arms: the two names; the difference is the second minus the first.

    Raises:
        ConfigError: an unknown metric, or a negative margin.
        DataError: rows that do not pair (see `pair_predictions`), or a single independent unit.

    Example:
        >>> rows = [
        ...     {"image": i, "target": "ab"[i % 2], "arm": arm, "p_a": p, "p_b": 1 - p}
        ...     for i in range(40) for arm in ("baseline", "mrl") for p in [0.8 if i % 2 == 0 or i == 39 else 0.1]
        ... ]
        >>> result = compare_predictions(rows, metric="accuracy", margin=0.15, n_resamples=200)
        >>> result["arms"]["mrl"]["estimate"], result["difference"]["method"], result["verdict"]
        (0.975, 'newcombe', 'equivalent')
    """
    told = {"metric": metric, "margin": margin, "alpha": alpha, "groups": groups, "seed": seed, "arms": arms}
    return judge_pair(rows, **told, n_resamples=n_resamples, linear_probes=linear_probes).result


def judge_pair(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    margin: float,
    alpha: float,
    groups: Mapping[str, Hashable] | None,
    seed: int,
    arms: tuple[str, str],
    n_resamples: int = 10_000,
    linear_probes: Mapping[str, float | None] | None = None,
) -> Judged:
    """`compare_predictions`, and with it the primary interval at any other alpha."""
    check_metric(metric)
    pairs = pair_predictions(rows, groups, arms)
    if pairs.n_units < 2:
        raise DataError(f"compare: {pairs.n} test images in one group; at least 2 groups are needed for any interval.")
    right = {arm: pairs.right(arm) for arm in arms}
    draws = _draws(pairs, n_resamples, seed)
    parts = {arm: _arm(pairs, right[arm], draws, arm, metric, alpha, (linear_probes or {}).get(arm)) for arm in arms}
    differences = {name: draws.interval(_column(2, name), alpha) for name in METRICS}
    at = _primary(pairs, right, draws, metric)
    primary = at(alpha)
    ends = known_ends(primary)
    change = pairs.change
    result = {
        "schema": 1,
        "metric": metric,
        "margin": margin,
        "alpha": alpha,
        "method": primary.method,
        "n": pairs.n,
        "n_groups": pairs.n_units,
        "unit": "group" if pairs.grouped else "image",
        "n_resamples": n_resamples,
        "seed": seed,
        "classes": list(pairs.classes),
        "arms": parts,
        "difference": _record(primary),
        "verdict": quality_verdict(*ends, margin),
        "more_images": more_images(primary.estimate, *ends, n=pairs.n, margin=margin) or None,
        "secondary": _secondary(pairs, right, differences, alpha),
        "flips": {
            "right_to_wrong": [pairs.images[i] for i in np.flatnonzero(change < 0)],
            "wrong_to_right": [pairs.images[i] for i in np.flatnonzero(change > 0)],
        },
        "disagreement": float(np.mean(change != 0)),
        "scope": SCOPE,
    }
    counts = np.bincount(pairs.target, minlength=len(pairs.classes))
    told = _warnings(pairs, result)
    warnings = [*told, *about_images(pairs), *against_simple_rules(counts, result)]
    return Judged(plain({**result, "warnings": warnings}), at, told=told)


def compare(out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Compares the arms of a run by its protocol and writes `comparison.json`.

    Images that share a group, a file (sha256) or pixels (the audit's exact duplicates) are one unit of every interval.

    Args:
        out: the run folder, with protocol.yaml, split.csv and predictions.csv (and evaluation.json, audit.json).
        overwrite: replace a comparison that is there.

    Raises:
        ConfigError: a file is not there, or comparison.json is.
        DataError: predictions that are not exactly those of the split's test side, or do not pair.

    Example:
        >>> compare("no-such-run")
        Traceback (most recent call last):
        mrl.errors.ConfigError: no-such-run/protocol.yaml: no protocol yet; ...
    """
    run = read_compared(out, overwrite=overwrite)
    test = run.images(test=True)
    check_same_images(run.rows, test)
    told = {**run.told, "groups": groups_of(run.out, test), "linear_probes": run.probes}
    if run.protocol.n_comparisons == 1:
        return run.write(compare_predictions(run.rows, **told))

    def judge(rows: Sequence[Mapping[str, Any]], arms: tuple[str, str]) -> Judged:
        return judge_pair(rows, **told, arms=arms)

    one = {"margin": run.protocol.margin, "alpha": run.protocol.alpha}
    return run.write(compare_family(run.rows, judge, run.protocol.arms, **one))


def _column(which: int, metric: str) -> int:
    """The column of the first arm's, the second's, or (2) the difference's draws of a metric."""
    return which * len(METRICS) + METRICS.index(metric)


def _draws(pairs: Pairs, n_resamples: int, seed: int) -> Resamples:
    """All scores of both arms and their differences, on the same draws of units."""
    first, second = (Scorer(pairs.target, pairs.probabilities[arm]) for arm in pairs.arms)

    def statistic(weights: np.ndarray, _: np.ndarray) -> np.ndarray:
        a, b = first(weights), second(weights)
        return np.concatenate([a, b, b - a], axis=1)

    groups = pairs.unit if pairs.grouped else None
    return resample(statistic, pairs.target, groups=groups, n_resamples=n_resamples, seed=seed)


def _shares(pairs: Pairs, chosen: np.ndarray) -> float:
    """Independent units per image among the chosen images: 1 where none are grouped."""
    return len(np.unique(pairs.unit[chosen])) / int(chosen.sum())


def _wilson(pairs: Pairs, right: np.ndarray, chosen: np.ndarray, alpha: float) -> Interval:
    scale = _shares(pairs, chosen)
    return wilson(float(right[chosen].sum()) * scale, int(chosen.sum()) * scale, alpha)


def _newcombe(pairs: Pairs, right: Mapping[str, np.ndarray], chosen: np.ndarray, alpha: float) -> Interval:
    a, b = (right[arm][chosen] for arm in pairs.arms)
    cells = (np.sum(a * b), np.sum(a * (1 - b)), np.sum((1 - a) * b), np.sum((1 - a) * (1 - b)))
    scale = _shares(pairs, chosen)
    return newcombe_paired(*(float(cell) * scale for cell in cells), alpha=alpha)


def _by_class(pairs: Pairs) -> list[np.ndarray]:
    """The images of each class that occurs."""
    masks = (pairs.target == k for k in range(len(pairs.classes)))
    return [mask for mask in masks if mask.any()]


def _arm(
    pairs: Pairs, right: np.ndarray, draws: Resamples, arm: str, metric: str, alpha: float, probe: float | None
) -> dict[str, Any]:
    intervals = {name: draws.interval(_column(pairs.arms.index(arm), name), alpha) for name in METRICS}
    if not pairs.grouped or intervals["accuracy"].method != "bca":
        intervals["accuracy"] = _wilson(pairs, right, np.ones(pairs.n, dtype=bool), alpha)
    if intervals["balanced_accuracy"].method == "degenerate":
        intervals["balanced_accuracy"] = combine([_wilson(pairs, right, mask, alpha) for mask in _by_class(pairs)])
    prediction = pairs.probabilities[arm].argmax(1)
    per_class = []
    for k, name in enumerate(pairs.classes):
        mask = pairs.target == k
        recall = _wilson(pairs, right, mask, alpha) if mask.any() else wilson(0, 0, alpha)
        per_class.append(
            {"class": name, "n": int(mask.sum()), "recall": recall.estimate, "low": recall.low, "high": recall.high}
        )
    records = {name: _record(interval) for name, interval in intervals.items()}
    return {
        **{key: records[metric][key] for key in ("estimate", "low", "high")},
        "n": pairs.n,
        "interval_method": records[metric]["method"],
        "metrics": {name: record["estimate"] for name, record in records.items()},
        "intervals": {name: {k: record[k] for k in ("low", "high", "method")} for name, record in records.items()},
        "confusion": {
            "labels": list(pairs.classes),
            "counts": confusion_matrix(pairs.target, prediction, len(pairs.classes)).tolist(),
        },
        "per_class": per_class,
        "linear_probe": probe,
    }


def _primary(pairs: Pairs, right: Mapping[str, np.ndarray], draws: Resamples, metric: str) -> At:
    """The primary interval at any alpha: the bootstrap's, or Newcombe's where the arms hardly differ."""
    few = len(np.unique(pairs.unit[pairs.change != 0])) < FEW_DISAGREEMENTS
    if metric == "accuracy" and few:
        return lambda alpha: _newcombe(pairs, right, np.ones(pairs.n, dtype=bool), alpha)
    if metric == "balanced_accuracy" and few:
        return lambda alpha: combine([_newcombe(pairs, right, mask, alpha) for mask in _by_class(pairs)])
    return lambda alpha: draws.interval(_column(2, metric), alpha)


def _secondary(
    pairs: Pairs, right: Mapping[str, np.ndarray], differences: Mapping[str, Interval], alpha: float
) -> dict[str, Any]:
    change = pairs.change
    everything = np.ones(pairs.n, dtype=bool)
    p_values = [_sign_test(pairs, change, mask) for mask in _by_class(pairs)]
    names = [name for k, name in enumerate(pairs.classes) if (pairs.target == k).any()]
    return {
        "mcnemar": {
            "b": int(np.sum(change < 0)),
            "c": int(np.sum(change > 0)),
            "p_value": _sign_test(pairs, change, everything),
            "unit": "group" if pairs.grouped else "image",
        },
        "newcombe": _record(_newcombe(pairs, right, everything, alpha)),
        "delong": _delong(pairs, alpha),
        **{name: _record(interval) for name, interval in differences.items()},
        "holm": [
            {"class": name, "p_value": p, "adjusted": float(adjusted)}
            for name, p, adjusted in zip(names, p_values, holm(p_values), strict=True)
        ],
    }


def _sign_test(pairs: Pairs, change: np.ndarray, chosen: np.ndarray) -> float:
    """Exact McNemar; over groups, the same test on which arm has more of a group right."""
    by_unit = np.bincount(pairs.unit[chosen], weights=change[chosen])
    return mcnemar_exact(int(np.sum(by_unit < 0)), int(np.sum(by_unit > 0))).p_value


def _delong(pairs: Pairs, alpha: float) -> dict[str, float] | None:
    if len(pairs.classes) != 2 or pairs.grouped or min(np.bincount(pairs.target, minlength=2)) < 2:
        return None
    first, second = (pairs.probabilities[arm][:, 1] for arm in pairs.arms)
    return asdict(delong(pairs.target == 1, first, second, alpha))


def _record(interval: Interval) -> dict[str, Any]:
    low, high = known_ends(interval)
    return {"estimate": interval.estimate, "low": low, "high": high, "method": interval.method}


def _warnings(pairs: Pairs, result: Mapping[str, Any]) -> list[str]:
    found = []
    p_value, verdict, method = result["secondary"]["mcnemar"]["p_value"], result["verdict"], result["method"]
    if method.startswith("newcombe"):
        apart = round(result["disagreement"] * pairs.n)
        found.append(
            f"The arms differ in correctness on only {apart} of {pairs.n} images: too few for a bootstrap; "
            "the interval of the difference is Newcombe's."
        )
    if method in ("degenerate", "undefined"):
        found.append(f"No interval of the {result['metric']} difference can be had from this test side ({method}).")
    if result["metric"] == "accuracy" and verdict in ("superior", "inferior") and p_value >= result["alpha"]:
        found.append(
            f"The interval says {verdict}, the exact McNemar test does not (p = {p_value:.3f}): take it as borderline."
        )
    return found


def about_images(pairs: Pairs) -> list[str]:
    """Warnings where the images are too few to say much, whatever the arms."""
    found = []
    if pairs.n_units < FEW_UNITS:
        kind = "groups" if pairs.grouped else "images"
        found.append(
            f"Only {pairs.n_units} independent test {kind}: bootstrap intervals tend to be too narrow with so few."
        )
    counts = np.bincount(pairs.target, minlength=len(pairs.classes))
    few = [f"{name} ({n})" for name, n in zip(pairs.classes, counts, strict=True) if n < FEW_OF_A_CLASS]
    if few:
        found.append(f"Fewer than {FEW_OF_A_CLASS} test images of: {', '.join(few)}. Their recall is hardly known.")
    return found


def against_simple_rules(counts: np.ndarray, result: Mapping[str, Any]) -> list[str]:
    """Warnings where an arm is no better than always giving one answer, or than a linear probe.

    Args:
        counts: test images a class.
        result: a comparison, with its arms and metric.
    """
    found = []
    classes = int(np.sum(counts > 0))
    simple = {"accuracy": counts.max() / counts.sum(), "balanced_accuracy": 1 / classes, "auroc": 0.5}
    metric = result["metric"]
    for name, arm in result["arms"].items():
        if metric in simple and not (arm["low"] is not None and arm["low"] > simple[metric]):
            found.append(
                f"The {name} arm is not shown to beat always giving the same answer ({100 * simple[metric]:.1f} % "
                f"{metric.replace('_', ' ')}): that the arms are alike then says little."
            )
        if arm["linear_probe"] is not None and arm["estimate"] < arm["linear_probe"]:
            found.append(
                f"The {name} arm ({100 * arm['estimate']:.1f} %) is below a linear probe of its own features "
                f"({100 * arm['linear_probe']:.1f} %): its fine-tuning did not help."
            )
    return found
