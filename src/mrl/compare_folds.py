"""Compares the arms over the folds of a repeated cross-validation: the corrected test, and the rest inside one repeat."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mrl.compare import about_images, against_simple_rules, compare_predictions, judge_pair
from mrl.compared import Compared, check_metric, check_same_images, groups_of, read_compared
from mrl.errors import DataError
from mrl.family import Judged, compare_family, known_ends
from mrl.pairs import ARMS, Pairs, pair_predictions
from mrl.run import plain, read_csv
from mrl.scores import METRICS, score_all
from mrl.stats import Interval, correlated_t, more_images, nadeau_bengio, quality_verdict

FROZEN_FILE = "predictions-frozen.csv"
METHOD, WIDENED = "corrected_t", "corrected_t_widened"
SCOPE = (
    "The intervals cover which images were drawn, how they were divided, and one training run for each division: {fits} "
    "fits an arm, each on {share} of the images. Variation between data sets that are not like these images is not in them."
)
KEPT_OF_FROZEN = ("n", "n_groups", "unit", "method", "difference", "verdict", "more_images", "disagreement", "warnings")


def compare_fold_predictions(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    margin: float,
    k: int,
    repeats: int,
    alpha: float = 0.05,
    groups: Mapping[str, Hashable] | None = None,
    seed: int = 0,
    n_resamples: int = 10_000,
    linear_probes: Mapping[str, float | None] | None = None,
    arms: tuple[str, str] = ARMS,
) -> dict[str, Any]:
    """The content of `comparison.json` from the predictions of all k * repeats fits of each arm; a pure function.

    The primary test is the corrected resampled t-test (Nadeau and Bengio) over the differences of the folds. The scores
    of the arms are means over the fits, with the same corrected interval. Beside it stand the chances of the Bayesian
    correlated t-test, the margin being the region of practical equivalence, and, inside the first repeat, where every
    image is tested once, all that one hold-out would have: McNemar, Newcombe, bootstrap, flips, recall. Where the arms
    disagree on fewer than 20 images of that repeat, or the folds' differences do not spread, the corrected interval knows
    too little: it is then widened until it holds the one-repeat interval as well.

    Args:
        rows: one an image, arm and repeat: image, target, arm, repeat, fold, seed, p_<class>...
        metric: the primary one: accuracy, balanced_accuracy, macro_f1 or auroc.
        margin: delta, a fraction.
        k: folds.
        repeats: of them.
        alpha: 1 - confidence.
        groups: image -> group; images that are not in it stand alone.
        seed: of the bootstrap inside the first repeat.
        n_resamples: draws of it.
        linear_probes: mean test score of a linear probe of each arm.
        arms: the two names; the difference is the second minus the first.

    Raises:
        ConfigError: an unknown metric, or a negative margin.
        DataError: a fold is missing, is not paired, or an image is not tested exactly once a repeat.

    Example:
        >>> rows = [
        ...     {"image": i, "target": "ab"[i % 2], "arm": arm, "repeat": r, "fold": i // 2 % 5, "p_a": p, "p_b": 1 - p}
        ...     for r in range(2) for i in range(60) for arm in ("baseline", "mrl")
        ...     for p in [0.8 if i % 2 == 0 or i % 9 == 1 + (arm == "mrl") else 0.1]
        ... ]
        >>> result = compare_fold_predictions(rows, metric="accuracy", margin=0.15, k=5, repeats=2, n_resamples=200)
        >>> result["folds"]["n_fits"], result["method"], len(result["folds"]["rows"]), result["test"]["df"]
        (10, 'corrected_t_widened', 10, 9)
    """
    told = {"metric": metric, "margin": margin, "alpha": alpha, "groups": groups, "seed": seed, "arms": arms}
    return judge_folds(rows, **told, k=k, repeats=repeats, n_resamples=n_resamples, linear_probes=linear_probes).result


def judge_folds(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    margin: float,
    k: int,
    repeats: int,
    alpha: float,
    groups: Mapping[str, Hashable] | None,
    seed: int,
    arms: tuple[str, str],
    n_resamples: int = 10_000,
    linear_probes: Mapping[str, float | None] | None = None,
) -> Judged:
    """`compare_fold_predictions`, and with it the primary interval at any other alpha."""
    check_metric(metric)
    cells = _cells(rows, k, repeats, groups, arms)
    scores = {arm: {cell: score_all(p.target, p.probabilities[arm]) for cell, p in cells.items()} for arm in arms}
    values = {arm: {m: [s[m] for s in scores[arm].values()] for m in METRICS} for arm in arms}
    gaps = np.subtract(*(values[arm][metric] for arm in reversed(arms)))
    found, bayes = nadeau_bengio(gaps, k, alpha), correlated_t(gaps, k, margin)
    first = [{**row, "fold": 0} for row in rows if int(row["repeat"]) == 0]
    told = {"metric": metric, "margin": margin, "alpha": alpha, "groups": groups, "seed": seed, "arms": arms}
    inside = judge_pair(first, **told, n_resamples=n_resamples)
    pooled = inside.result

    def at(level: float) -> Interval:
        over = nadeau_bengio(gaps, k, level)
        return _primary(Interval(over.estimate, over.low, over.high, METHOD), inside.at(level))

    primary = at(alpha)
    images = pair_predictions(first, groups, arms)
    result = {
        **pooled,
        "method": primary.method,
        "arms": {
            arm: _arm(pooled["arms"][arm], values[arm], metric, k, alpha, (linear_probes or {}).get(arm))
            for arm in arms
        },
        "difference": asdict(primary),
        "test": {
            "name": METHOD,
            "t": found.t,
            "df": found.df,
            "p_value": found.p_value,
            "low": found.low,
            "high": found.high,
        },
        "bayes": asdict(bayes),
        "verdict": quality_verdict(primary.low, primary.high, margin),
        "more_images": more_images(primary.estimate, primary.low, primary.high, n=images.n, margin=margin) or None,
        "disagreement": float(np.mean([_apart(p) for p in _by_repeat(cells, repeats)])),
        "folds": {"k": k, "repeats": repeats, "n_fits": k * repeats, "rows": _rows(cells, scores, metric)},
        "scope": SCOPE.format(fits=k * repeats, share=f"{100 * (k - 1) / k:.0f} %"),
    }
    counts = np.bincount(images.target, minlength=len(images.classes))
    said = _warnings(result, pooled)
    warnings = [*said, *about_images(images), *against_simple_rules(counts, plain(result))]
    p_value = found.p_value if primary.method == METHOD else None
    return Judged(plain({**result, "warnings": warnings}), at, p_value, said)


def compare_folds(out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Compares the arms of a run of folds by its protocol and writes `comparison.json`.

    A frozen test set, where the run has one, is compared as one hold-out beside the folds, under "frozen"; it does not
    decide.

    Args:
        out: the run folder, with protocol.yaml, split.csv and predictions.csv.
        overwrite: replace a comparison that is there.

    Raises:
        ConfigError: a file is not there, or comparison.json is.
        DataError: predictions that are not those of the folds.

    Example:
        >>> compare_folds("no-such-run")
        Traceback (most recent call last):
        mrl.errors.ConfigError: no-such-run/protocol.yaml: no protocol yet; ...
    """
    run = read_compared(out, overwrite=overwrite)
    protocol, tested = run.protocol, run.images(test=False)
    check_same_images(run.rows, tested)
    _same_folds(run.rows, tested)
    last: Sequence[Mapping[str, Any]] = []
    if protocol.folds["n_frozen"]:
        last = read_csv(run.out / FROZEN_FILE)
        check_same_images(last, run.images(test=True))
    dealt = {"k": protocol.folds["k"], "repeats": protocol.folds["repeats"], "groups": groups_of(run.out, tested)}

    def judge(rows: Sequence[Mapping[str, Any]], arms: tuple[str, str]) -> Judged:
        found = judge_folds(rows, **run.told, **dealt, linear_probes=run.probes, arms=arms)
        if last:
            found.result["frozen"] = _frozen(run, last, arms)
        return found

    if protocol.n_comparisons == 1:
        return run.write(judge(run.rows, ARMS).result)
    return run.write(compare_family(run.rows, judge, protocol.arms, margin=protocol.margin, alpha=protocol.alpha))


def _frozen(run: Compared, last: Sequence[Mapping[str, Any]], arms: tuple[str, str]) -> dict[str, Any]:
    """Two arms on the frozen test set, as one hold-out; with several arms at alpha / m."""
    told = {**run.told, "alpha": run.protocol.alpha / run.protocol.n_comparisons, "arms": arms}
    rows = [row for row in last if row["arm"] in arms]
    whole = compare_predictions(rows, **told, groups=groups_of(run.out, run.images(test=True)))
    parts = {arm: {key: whole["arms"][arm][key] for key in ("estimate", "low", "high", "n")} for arm in arms}
    kept = {key: whole[key] for key in KEPT_OF_FROZEN}
    return {**kept, "arms": parts, "mcnemar": whole["secondary"]["mcnemar"]}


def _cells(
    rows: Sequence[Mapping[str, Any]],
    k: int,
    repeats: int,
    groups: Mapping[str, Hashable] | None,
    arms: tuple[str, str],
) -> dict[tuple[int, int], Pairs]:
    """Each fold's pairs; every repeat tests the same images, each of them once."""
    parts: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault((int(row["repeat"]), int(row["fold"])), []).append(row)
    wanted = [(repeat, fold) for repeat in range(repeats) for fold in range(k)]
    if set(parts) != set(wanted):
        lacking, extra = sorted(set(wanted) - set(parts)), sorted(set(parts) - set(wanted))
        raise DataError(
            f"predictions.csv lacks the folds (repeat, fold) {lacking[:5]} and has {extra[:5]} beyond {repeats} x {k}; run "
            "`mrl fit` and `mrl evaluate --overwrite`."
        )
    cells = {cell: pair_predictions(parts[cell], groups, arms) for cell in wanted}
    tested = [sorted(image for fold in range(k) for image in cells[r, fold].images) for r in range(repeats)]
    if any(images != tested[0] or len(set(images)) < len(images) for images in tested):
        raise DataError(
            "predictions.csv does not test every image exactly once a repeat; run `mrl evaluate --overwrite`."
        )
    return cells


def _same_folds(rows: Sequence[Mapping[str, str]], tested: Mapping[str, Mapping[str, str]]) -> None:
    wrong = sorted({r["image"] for r in rows if tested[r["image"]].get(f"fold_r{r['repeat']}") != r["fold"]})
    if wrong:
        raise DataError(
            f"predictions.csv tests {len(wrong)} images {wrong[:3]} in other folds than split.csv; run "
            "`mrl evaluate --overwrite`."
        )


def _primary(found: Interval, inside: Interval) -> Interval:
    """The corrected interval, widened to hold that of one repeat where the folds' differences know too little."""
    known = math.isfinite(found.low)
    if known and not inside.method.startswith("newcombe"):
        return found
    other = known_ends(inside)
    if not all(map(math.isfinite, other)):
        return found
    ends = [*other, found.estimate, *([found.low, found.high] if known else [])]
    return Interval(found.estimate, min(ends), max(ends), WIDENED)


def _arm(
    pooled: Mapping[str, Any], values: Mapping[str, list[float]], metric: str, k: int, alpha: float, probe: float | None
) -> dict[str, Any]:
    """An arm's part: means over its fits with corrected intervals, and the counts of the first repeat."""
    found = {}
    for name, scores in values.items():
        interval = nadeau_bengio(scores, k, alpha)
        bounded = [min(1.0, max(0.0, end)) if math.isfinite(end) else math.nan for end in (interval.low, interval.high)]
        found[name] = {"estimate": interval.estimate, "low": bounded[0], "high": bounded[1], "method": METHOD}
    return {
        **pooled,
        **{key: found[metric][key] for key in ("estimate", "low", "high")},
        "interval_method": METHOD,
        "metrics": {name: record["estimate"] for name, record in found.items()},
        "intervals": {name: {key: record[key] for key in ("low", "high", "method")} for name, record in found.items()},
        "linear_probe": probe,
    }


def _by_repeat(cells: Mapping[tuple[int, int], Pairs], repeats: int) -> list[list[Pairs]]:
    return [[pairs for (r, _), pairs in cells.items() if r == repeat] for repeat in range(repeats)]


def _apart(folds: Sequence[Pairs]) -> float:
    """The share of images of a repeat that one arm has right and the other wrong."""
    apart = sum(float(np.sum(p.change != 0)) for p in folds)
    return apart / sum(p.n for p in folds)


def _rows(
    cells: Mapping[tuple[int, int], Pairs],
    scores: Mapping[str, Mapping[tuple[int, int], Mapping[str, float]]],
    metric: str,
) -> list[dict[str, Any]]:
    found = []
    for (repeat, fold), pairs in cells.items():
        by = {arm: scores[arm][repeat, fold][metric] for arm in pairs.arms}
        first, second = by.values()
        found.append({"repeat": repeat, "fold": fold, "n": pairs.n, **by, "difference": second - first})
    return found


def _warnings(result: Mapping[str, Any], pooled: Mapping[str, Any]) -> list[str]:
    found = []
    if result["method"] == WIDENED and not pooled["method"].startswith("newcombe"):
        found.append(
            "All folds have the same difference and so give no interval: it is the bootstrap's of one repeat instead."
        )
    elif result["method"] == WIDENED:
        apart = round(pooled["disagreement"] * pooled["n"])
        found.append(
            f"The arms differ in correctness on only {apart} of {pooled['n']} images of one repeat: the interval over the "
            "folds was widened to hold Newcombe's of that repeat."
        )
    elif not math.isfinite(result["difference"]["low"]):
        found.append(f"No interval of the {result['metric']} difference can be had from these folds.")
    p_value = pooled["secondary"]["mcnemar"]["p_value"]
    if result["verdict"] in ("superior", "inferior") and result["metric"] == "accuracy" and p_value >= result["alpha"]:
        found.append(
            f"The folds say {result['verdict']}, the exact McNemar test inside one repeat does not (p = {p_value:.3f}): take "
            "it as borderline."
        )
    return found
