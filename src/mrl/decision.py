"""The decision of a run and its reasons: one plain sentence each, with the numbers it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mrl.errors import ConfigError
from mrl.stats import decide

MRL = "mrl"

LATENCY = "One image takes {ratio} times as long with MRL as without ({level} % interval {low} to {high}{where}): "
SENTENCES = {
    "scores": (
        "On {n} test images the {metric_name} is {mrl} % with MRL and {baseline} % without: a difference of {estimate} "
        "points ({level} % interval {low} to {high})."
    ),
    "scores_folds": (
        "Over {fits} fits an arm the mean {metric_name} is {mrl} % with MRL and {baseline} % without: a difference of "
        "{estimate} points ({level} % interval {low} to {high}; {n} images)."
    ),
    "scores_no_interval": (
        "On {n} test images the {metric_name} is {mrl} % with MRL and {baseline} % without; these images give no "
        "interval of the difference, so nothing is concluded about quality."
    ),
    "superior": "The whole interval is above zero: MRL is superior.",
    "equivalent": (
        "The whole interval lies within the margin of {margin} points that was fixed before training: the two are "
        "equivalent."
    ),
    "equivalent_lower": (
        "The whole interval is below zero, but within the margin of {margin} points that was fixed before training: "
        "MRL is worse by less than what was declared to matter, and counts as equivalent."
    ),
    "non-inferior": (
        "A loss as large as the margin of {margin} points is ruled out, and no gain is shown: MRL is non-inferior."
    ),
    "inferior": (
        "The whole interval is below zero, and a loss as large as the margin of {margin} points is not ruled out: "
        "MRL is inferior."
    ),
    "inferior_beyond": "The whole interval lies below a loss of {margin} points, the margin: MRL is inferior.",
    "inconclusive": (
        "A loss as large as the margin of {margin} points is neither shown nor ruled out: these images do not settle "
        "the quality."
    ),
    "more_images": (
        "If the difference stays as it is, at least about {more} more test images are needed to settle the quality."
    ),
    "faster": LATENCY + "faster.",
    "slower": LATENCY + "slower.",
    "not resolvable": LATENCY + "this does not tell faster from slower.",
    "latency_unknown": "No latency ratio was measured, so nothing is concluded about speed.",
    "superior_not_slower": "Go: superior, and not shown to be slower.",
    "superior_slower_allowed": (
        "Go: superior, and at most {ratio_high} times as slow, within the {max_slowdown} that the protocol allows."
    ),
    "superior_too_slow": (
        "Inconclusive: superior but slower, and taking more than {max_slowdown} times as long, the most that the "
        "protocol allows, is not ruled out."
    ),
    "quality_lost": "No-go: the quality is inferior, whatever the speed.",
    "slower_not_superior": "No-go: slower, and not superior in quality.",
    "quality_inconclusive": "Inconclusive: the quality is not settled, and speed alone does not decide.",
    "kept_and_faster": "Go: the quality holds ({quality}) and it is faster.",
    "kept_not_faster": (
        "Inconclusive: the quality holds ({quality}), but it is not shown to be faster: no reason to change yet."
    ),
}
BACKENDS = {"onnxruntime": "ONNX Runtime", "eager": "PyTorch"}
METRIC_NAMES = {"auroc": "AUROC", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}


def decision_of(comparison: Mapping[str, Any], measure: Mapping[str, Any], protocol: Any) -> dict[str, Any]:
    """The decision by the protocol's rule, and its reasons.

    Args:
        comparison: content of comparison.json.
        measure: content of measure.json: its `verdict`, `latency_ratio` (of 95 % unless it has an `alpha`) and the row
            that decides.
        protocol: the run's protocol, for `max_slowdown`.

    Returns:
        decision: go, no-go or inconclusive; reasons: English sentences; reason_keys: for each the key of `SENTENCES`
        and the texts that fill it, so that a report can say it in another language. With more than two arms also `arm`,
        the one they are about: of the arms that go the one with the highest score; where none goes, of those that are
        not settled; else of all; and `decisions`, every arm's. The scores only order arms that have passed at levels
        that count all of them.

    Example:
        >>> arm = {"estimate": 0.9}
        >>> comparison = {"metric": "accuracy", "margin": 0.03, "alpha": 0.05, "n": 656, "verdict": "equivalent",
        ...     "arms": {"baseline": arm, "mrl": arm}, "difference": {"estimate": 0.0, "low": -0.01, "high": 0.012}}
        >>> measure = {"verdict": "faster", "latency_ratio": {"estimate": 0.8, "low": 0.78, "high": 0.83}}
        >>> class Rule:
        ...     max_slowdown = 1.0
        >>> d = decision_of(comparison, measure, Rule())
        >>> d["decision"], d["reasons"][-1]
        ('go', 'Go: the quality holds (equivalent) and it is faster.')
        >>> print(d["reasons"][0])
        On 656 test images the accuracy is 90.0 % with MRL and 90.0 % without: a difference of 0.0 points (95 % interval
        -1.0 to +1.2).
    """
    if comparison.get("comparisons"):
        return _decision_of_many(comparison, measure, protocol)
    return _decision_of_one(comparison, measure, protocol, MRL)


def comparisons_of(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every arm's comparison with the baseline; with two arms the only one.

    Example:
        >>> comparisons_of({"verdict": "superior"})
        [{'arm': 'mrl', 'verdict': 'superior'}]
    """
    return comparison.get("comparisons") or [{"arm": MRL, **comparison}]


def latency_of(measure: Mapping[str, Any], arm: str) -> tuple[Mapping[str, Any], str | None]:
    """An arm's latency ratio to the baseline, and its verdict.

    Example:
        >>> latency_of({"latency_ratio": {"estimate": 0.8}, "verdict": "faster"}, "mrl")
        ({'estimate': 0.8}, 'faster')
    """
    for found in measure.get("comparisons") or []:
        if found["arm"] == arm:
            return found["latency_ratio"], found["verdict"]
    if arm != MRL:
        return {}, None
    return measure.get("latency_ratio") or {}, measure.get("verdict")


def _decision_of_many(comparison: Mapping[str, Any], measure: Mapping[str, Any], protocol: Any) -> dict[str, Any]:
    each = {}
    for one in comparison["comparisons"]:
        arm = one["arm"]
        ratio, verdict = latency_of(measure, arm)
        each[arm] = _decision_of_one(
            {**comparison, **one}, {**measure, "latency_ratio": ratio, "verdict": verdict}, protocol, arm
        )
    for decision in ("go", "inconclusive", "no-go"):
        arms = [arm for arm, found in each.items() if found["decision"] == decision]
        if arms:
            best = max(arms, key=lambda arm: comparison["arms"][arm]["estimate"])
            decisions = {arm: found["decision"] for arm, found in each.items()}
            return {**each[best], "arm": best, "decisions": decisions}
    raise ConfigError("comparison.json has no comparison; run `mrl compare --overwrite`.")


def _decision_of_one(
    comparison: Mapping[str, Any], measure: Mapping[str, Any], protocol: Any, arm: str
) -> dict[str, Any]:
    ratio = measure.get("latency_ratio") or {}
    ends = _number(ratio.get("low")), _number(ratio.get("high"))
    cost = measure.get("verdict") or "not resolvable"
    slowest = float(protocol.max_slowdown)
    decision, steps = decide(comparison["verdict"], cost, ends, slowest)
    said = [*_quality(comparison, arm), _latency(measure, cost, slowest)]
    for step in steps:
        params = dict(step.params)
        if "max_slowdown" in params:
            params = {"ratio_high": _texts([ends[1]], [slowest], least=2)[0], "max_slowdown": f"{slowest:g}"}
        said.append((step.key, params))
    return {
        "decision": decision,
        "reasons": [named(SENTENCES[key], arm).format(**params) for key, params in said],
        "reason_keys": [{"key": key, "params": params} for key, params in said],
    }


def named(text: str, arm: str) -> str:
    """A sentence on MRL, said of another arm.

    Example:
        >>> named("MRL is superior.", "mrl"), named("MRL is superior.", "region4")
        ('MRL is superior.', 'region4 is superior.')
    """
    return text if arm == MRL else text.replace("MRL", arm)


def _quality(comparison: Mapping[str, Any], arm: str) -> list[tuple[str, dict[str, str]]]:
    difference, margin, verdict = comparison["difference"], 100 * comparison["margin"], comparison["verdict"]
    low, high = 100 * _number(difference.get("low")), 100 * _number(difference.get("high"))
    metric = comparison["metric"]
    numbers = {
        "n": f"{comparison['n']:,}",
        "metric": metric,
        "metric_name": METRIC_NAMES.get(metric, metric),
        "baseline": f"{100 * comparison['arms']['baseline']['estimate']:.1f}",
        "mrl": f"{100 * comparison['arms'][arm]['estimate']:.1f}",
    }
    if math.isnan(low) or math.isnan(high):
        return [("scores_no_interval", numbers)]
    numbers["estimate"] = _texts([100 * difference["estimate"]], [0.0], signed=True)[0]
    numbers["low"], numbers["high"] = _texts([low, high], [0.0, -margin, margin], signed=True)
    numbers["level"] = _level(comparison.get("interval_alpha", comparison["alpha"]))
    folds = comparison.get("folds")
    said = [("scores_folds", {**numbers, "fits": f"{folds['n_fits']:,}"}) if folds else ("scores", numbers)]
    key = "equivalent_lower" if verdict == "equivalent" and high < 0 else verdict
    key = "inferior_beyond" if verdict == "inferior" and high < -margin else key
    said.append((key, {} if verdict == "superior" else {"margin": f"{margin:g}"}))
    if verdict == "inconclusive" and comparison.get("more_images"):
        said.append(("more_images", {"more": f"{_two_digits(comparison['more_images']):,}"}))
    return said


def _latency(measure: Mapping[str, Any], cost: str, slowest: float) -> tuple[str, dict[str, str]]:
    ratio = measure.get("latency_ratio") or {}
    values = [_number(ratio.get(key)) for key in ("estimate", "low", "high")]
    if any(math.isnan(value) for value in values):
        return "latency_unknown", {}
    estimate, low, high = _texts(values, [1.0, slowest], least=2)
    row = next((row for row in measure.get("rows") or [] if row.get("decides")), None)
    where = ""
    if row:
        where = f"; {BACKENDS.get(row['backend'], row['backend'])}, batch {row['batch']}, {row['image_size']} px"
    return cost, {
        "ratio": estimate,
        "low": low,
        "high": high,
        "level": _level(measure.get("alpha", 0.05)),
        "where": where,
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _level(alpha: float) -> str:
    return f"{100 * (1 - alpha):.4g}"


def _two_digits(n: int) -> int:
    """`n` rounded up to two leading digits: more would claim precision that a projection does not have."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return -(-n // unit) * unit


def _texts(values: Sequence[float], marks: Sequence[float], *, signed: bool = False, least: int = 1) -> list[str]:
    """Numbers with as few digits (at most 4) as keep each on its side of every mark: 0.04 is not shown as 0.0."""
    for digits in range(least, 5):
        shown = [round(value, digits) for value in values]
        if all((v > m) == (s > m) and (v < m) == (s < m) for v, s in zip(values, shown, strict=True) for m in marks):
            break
    return [f"{0.0 if s == 0 else s:{'+' if signed and s != 0 else ''}.{digits}f}" for s in shown]
