"""Several arms against one baseline: Holm's levels, intervals that go with them, and what is said of every arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrl.run import plain
from mrl.stats import Interval, holm, holm_levels, more_images, quality_verdict

At = Callable[[float], Interval]
LEAST_P = 1e-4  # the bootstrap's draws tell no smaller one
OF_PAIR = ("difference", "method", "verdict", "more_images", "p_value", "p_adjusted", "interval_alpha")
KEPT = (*OF_PAIR, "secondary", "flips", "disagreement", "test", "bayes", "frozen")
GUARANTEE = (
    "The chance that any arm without a true difference is called superior or inferior is at most alpha (Holm), and so is "
    "the chance that any arm is wrongly called equivalent or non-inferior (these are read at alpha / m)."
)


@dataclass(frozen=True)
class Judged:
    """One arm against the baseline.

    Args:
        result: the comparison at the protocol's alpha, as for two arms.
        at: its primary interval at any alpha.
        p_value: of the primary test; None where it is read off the intervals.
        told: those of its warnings that are about this pair.
    """

    result: dict[str, Any]
    at: At
    p_value: float | None = None
    told: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Ruling:
    """What multiplicity leaves of one comparison: the interval, its alpha, the verdict, and the p-values."""

    interval: Interval
    interval_alpha: float
    verdict: str
    p_value: float
    p_adjusted: float


def p_of_intervals(at: At) -> float:
    """The smallest alpha, from 0.0001, at which the interval shuts zero out: the p-value that belongs to it; else 1.

    Example:
        >>> from scipy.stats import norm
        >>> z = lambda alpha: norm.ppf(1 - alpha / 2)
        >>> round(p_of_intervals(lambda alpha: Interval(0.02, 0.02 - 0.01 * z(alpha), 0.02 + 0.01 * z(alpha), "")), 4)
        0.0455
    """
    most, least = 0.9999, LEAST_P
    if not _without_zero(at(most)):
        return 1.0
    if _without_zero(at(least)):
        return LEAST_P
    for _ in range(40):
        middle = math.sqrt(least * most)
        least, most = (least, middle) if _without_zero(at(middle)) else (middle, most)
    return most


def _without_zero(interval: Interval) -> bool:
    return quality_verdict(*known_ends(interval), 0.0) in ("superior", "inferior")


def known_ends(interval: Interval) -> tuple[float, float]:
    """The ends that may be used: a degenerate interval has none."""
    if interval.method == "degenerate":
        return math.nan, math.nan
    return interval.low, interval.high


def rule_family(
    ats: Sequence[At], *, margin: float, alpha: float, p_values: Sequence[float | None] = ()
) -> list[Ruling]:
    """Verdicts on m arms against one baseline by Holm's procedure, each with the interval that it is read off.

    An arm whose zero difference Holm rejects is judged at its Holm level, between alpha / m and alpha: superior or
    inferior. Every other arm has the interval at alpha / m, and equivalent and non-inferior are never said on less than
    that. So the chance that any arm without a true difference is called superior or inferior is at most alpha, whatever
    the dependence between arms that share a baseline and images; the same holds for any wrong "equivalent" or
    "non-inferior", whose intervals hold at once with 1 - alpha. Both hold as far as the single intervals do.

    Args:
        ats: the primary interval of each arm at any alpha.
        margin: delta.
        alpha: of the whole family.
        p_values: of the primary tests; None, or none at all, is read off the intervals.

    Reference:
        Holm (1979), A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6.

    Example:
        >>> from mrl.stats import nadeau_bengio
        >>> def at(d):
        ...     def interval(alpha):
        ...         r = nadeau_bengio(d, 5, alpha)
        ...         return Interval(r.estimate, r.low, r.high, "corrected_t")
        ...     return interval
        >>> found = rule_family([at([0.05, 0.06, 0.05, 0.04, 0.05]), at([0.01, -0.01, 0.02, 0, 0])], margin=0.03, alpha=0.05)
        >>> [(r.verdict, r.interval_alpha) for r in found]
        [('superior', 0.025), ('non-inferior', 0.025)]
    """
    m = len(ats)
    given = list(p_values) or [None] * m
    p = [
        p_of_intervals(at) if value is None or math.isnan(value) else value
        for at, value in zip(ats, given, strict=True)
    ]
    levels, adjusted = holm_levels(p, alpha), holm(p)
    found = []
    for at, own, level, after in zip(ats, p, levels, adjusted, strict=True):
        level = float(level) if own < level else alpha / m
        interval = at(level)
        verdict = quality_verdict(*known_ends(interval), margin)
        strict = quality_verdict(*known_ends(at(alpha / m)), margin)
        if verdict == "equivalent" and strict not in ("equivalent", "non-inferior", "superior"):
            verdict = "inferior"  # surely below zero, but surely within the margin only at a weaker level
        found.append(Ruling(interval, level, verdict, float(own), float(after)))
    return found


def compare_family(
    rows: Sequence[Mapping[str, Any]],
    judge: Callable[[Sequence[Mapping[str, Any]], tuple[str, str]], Judged],
    arms: Sequence[str],
    *,
    margin: float,
    alpha: float,
) -> dict[str, Any]:
    """The content of `comparison.json` for more than two arms: that of the first pair, and `comparisons` with every one.

    Args:
        rows: of `predictions.csv`, of all arms.
        judge: compares two arms, given their rows and names.
        arms: names, the baseline first.
        margin: delta.
        alpha: of the whole family.
    """
    baseline, *others = arms
    pairs = {arm: judge([row for row in rows if row["arm"] in (baseline, arm)], (baseline, arm)) for arm in others}
    rulings = rule_family(
        [pair.at for pair in pairs.values()],
        margin=margin,
        alpha=alpha,
        p_values=[pair.p_value for pair in pairs.values()],
    )
    for pair, ruling in zip(pairs.values(), rulings, strict=True):
        low, high = known_ends(ruling.interval)
        estimate, n = ruling.interval.estimate, pair.result["n"]
        pair.result.update(
            difference={"estimate": estimate, "low": low, "high": high, "method": ruling.interval.method},
            method=ruling.interval.method,
            verdict=ruling.verdict,
            more_images=more_images(estimate, low, high, n=n, margin=margin) or None,
            p_value=ruling.p_value,
            p_adjusted=ruling.p_adjusted,
            interval_alpha=ruling.interval_alpha,
        )
    first = pairs[others[0]].result
    result = {
        **first,
        "arms": {arm: pairs[arm if arm in pairs else others[0]].result["arms"][arm] for arm in arms},
        "comparisons": [
            {"arm": arm, **{key: pair.result[key] for key in KEPT if key in pair.result}} for arm, pair in pairs.items()
        ],
        "multiplicity": {"method": "holm", "m": len(others), "alpha": alpha, "guarantee": GUARANTEE},
        "warnings": list(dict.fromkeys(text for arm, pair in pairs.items() for text in _warnings(arm, pair))),
    }
    if "folds" in first:
        result["folds"] = {**first["folds"], "rows": _rows(pairs)}
    return plain(result)


def _warnings(arm: str, pair: Judged) -> list[str]:
    decided = pair.result["verdict"] in ("superior", "inferior")
    texts = [text for text in pair.result["warnings"] if decided or not text.endswith("take it as borderline.")]
    return [f"Arm {arm}: {text}" if text in pair.told else text for text in texts]


def _rows(pairs: Mapping[str, Judged]) -> list[dict[str, Any]]:
    """The score of every arm in every fold; `difference` is the first pair's."""
    tables = [pair.result["folds"]["rows"] for pair in pairs.values()]
    return [
        {**dict(pair for row in rows for pair in row.items()), "difference": rows[0]["difference"]}
        for rows in zip(*tables, strict=True)
    ]
