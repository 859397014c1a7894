"""What may be concluded: the primary metric, what the data can show, the verdicts and the default decision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mrl.errors import ConfigError
from mrl.stats.intervals import Interval, normal_quantile

QUALITY_VERDICTS = ("superior", "equivalent", "non-inferior", "inferior", "inconclusive")
COST_VERDICTS = ("faster", "slower", "not resolvable")
DECISIONS = ("go", "no-go", "inconclusive")
TIE = 1e-9  # counts over n, subtracted, are not exact


@dataclass(frozen=True)
class Reason:
    """One step of a decision: a key that a report can translate, and the numbers of its sentence."""

    key: str
    params: Mapping[str, Any] = field(default_factory=dict)


def primary_metric(class_counts: Mapping[str, int] | Sequence[int]) -> str:
    """Accuracy where the largest class is at most 3 times the smallest, else balanced accuracy.

    Args:
        class_counts: images a class.

    Raises:
        ConfigError: fewer than two classes, or an empty one.

    Example:
        >>> primary_metric({"ok": 300, "defective": 100}), primary_metric({"ok": 301, "defective": 100})
        ('accuracy', 'balanced_accuracy')
    """
    counts = list(class_counts.values() if isinstance(class_counts, Mapping) else class_counts)
    if len(counts) < 2 or min(counts) < 1:
        raise ConfigError(f"primary_metric: class counts {counts}; two classes or more, none empty, are needed.")
    return "accuracy" if max(counts) <= 3 * min(counts) else "balanced_accuracy"


def minimum_detectable_effect(
    n: int, disagreement: float, *, power: float = 0.8, alpha: float = 0.05, exact: bool = False
) -> float:
    """The smallest difference of accuracy that `n` test images would show with probability `power`.

    (z_{1 - alpha/2} + z_power) * sqrt(p_d / n), about 2.8 * sqrt(p_d / n). `exact` searches the difference at which the
    exact McNemar test has that power, a little more for few images.

    Args:
        n: test images (independent ones: groups, where images are grouped).
        disagreement: p_d, share of images that one arm has right and the other wrong.
        power: wanted probability of finding the difference.
        alpha: two-sided.
        exact: by the exact test. NaN where no difference would be found, even one in which every disagreement goes the
            same way (the formula then gives more than p_d itself, which cannot be).

    Raises:
        ConfigError: n < 1, or a share that is not between 0 and 1.

    Reference:
        Connor (1987), Sample size for testing differences in proportions for the paired-sample design. Biometrics 43.

    Example:
        >>> [round(100 * minimum_detectable_effect(200, p), 1) for p in (0.05, 0.10, 0.20)]
        [4.4, 6.3, 8.9]
        >>> [round(100 * minimum_detectable_effect(200, p, exact=True), 1) for p in (0.05, 0.10, 0.20)]
        [4.4, 6.4, 9.1]
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = normal_quantile(alpha, "minimum_detectable_effect")
    if n < 1 or not 0 < disagreement <= 1 or not 0 < power < 1:
        raise ConfigError(
            f"minimum_detectable_effect: n={n}, disagreement={disagreement}, power={power}; "
            "give n >= 1 and shares between 0 and 1."
        )
    if not exact:
        return (z + float(norm.ppf(power))) * math.sqrt(disagreement / n)
    achieved = _mcnemar_power(n, disagreement, alpha)
    if achieved(disagreement) < power:
        return math.nan
    return float(brentq(lambda effect: achieved(effect) - power, 0.0, disagreement, xtol=1e-6))


def _mcnemar_power(n: int, disagreement: float, alpha: float) -> Any:
    """The power of the exact McNemar test as a function of the difference."""
    from scipy.stats import binom

    sizes = np.arange(n + 1)
    chance = binom.pmf(sizes, n, disagreement)
    sizes, chance = sizes[chance > 1e-10], chance[chance > 1e-10]
    # The largest k with 2 * P(X <= k) <= alpha, X ~ Binomial(size, 1/2); -1 where there is none.
    critical = binom.ppf(alpha / 2, sizes, 0.5)
    critical = np.where(binom.cdf(critical, sizes, 0.5) > alpha / 2, critical - 1, critical)

    def power(effect: float) -> float:
        one_way = (1 + effect / disagreement) / 2
        rejects = binom.cdf(critical, sizes, one_way) + binom.sf(sizes - critical - 1, sizes, one_way)
        return float(chance @ np.where(critical >= 0, rejects, 0.0))

    return power


def quality_verdict(low: float, high: float, margin: float) -> str:
    """The first that holds of superior, equivalent, non-inferior, inferior; inconclusive where none does.

    superior: low > 0. equivalent: -margin < low and high < margin. non-inferior: low > -margin. inferior: high < 0.
    An end that lies on a bound (within 1e-9: 3 of 100 images are the margin 0.03) does not hold; NaN holds nothing. A
    difference that is surely below zero and surely smaller than the margin is *equivalent*: the margin says so.

    Args:
        low: lower end of the interval of the difference, new minus old, a fraction.
        high: upper end.
        margin: delta, the difference that matters, a fraction of at least 0.

    Raises:
        ConfigError: a negative margin, or ends in the wrong order.

    Example:
        >>> quality_verdict(0.001, 0.02, 0.03), quality_verdict(-0.02, 0.02, 0.03), quality_verdict(-0.03, 0.02, 0.03)
        ('superior', 'equivalent', 'inconclusive')
    """
    if not margin >= 0 or low > high:
        raise ConfigError(f"quality_verdict: interval {low} to {high}, margin {margin}; give low <= high, margin >= 0.")
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if low > TIE:
        return "superior"
    if low > -margin + TIE:
        return "equivalent" if high < margin - TIE else "non-inferior"
    return "inferior" if high < -TIE else "inconclusive"


def latency_verdict(ratio: Interval) -> str:
    """Faster where the whole interval of the latency ratio (new / old) is below 1, slower above; else not resolvable.

    Example:
        >>> latency_verdict(Interval(0.9, 0.85, 0.97, "percentile over blocks"))
        'faster'
    """
    if ratio.high < 1:
        return "faster"
    return "slower" if ratio.low > 1 else "not resolvable"


def more_images(
    estimate: float, low: float, high: float, *, n: int, margin: float, most: int = 1_000_000
) -> int | None:
    """About how many more test images an inconclusive result needs; 0 where it is conclusive already.

    An approximation: the estimate stays as it is and both half-widths shrink with sqrt(n), until the interval leaves
    -margin (non-inferior) or zero (inferior), whichever comes first. The estimate will move, so the number is a lower
    bound for planning: with exactly that many the chance to conclude is about one half.

    Args:
        estimate: difference, new minus old, a fraction.
        low: lower end of its interval.
        high: upper end.
        n: test images so far.
        margin: delta.
        most: give up beyond this many.

    Returns:
        The number of further images; None where it cannot be reached (or NaN went in).

    Example:
        >>> more_images(0.0, -0.06, 0.06, n=100, margin=0.03)
        301
    """
    if not all(math.isfinite(value) for value in (estimate, low, high)):
        return None
    if quality_verdict(low, high, margin) != "inconclusive":
        return 0
    shrink = []
    if estimate > -margin and estimate > low:
        shrink.append((estimate + margin) / (estimate - low))
    if estimate < 0 and high > estimate:
        shrink.append(-estimate / (high - estimate))
    needed = [n / s**2 for s in shrink if s > 0]
    if not needed or min(needed) - n > most:
        return None
    # The end must pass the bound, not touch it.
    return max(1, math.floor(min(needed) + 1e-6) + 1 - n)


def decide(quality: str, cost: str, ratio: tuple[float, float], max_slowdown: float = 1.0) -> tuple[str, list[Reason]]:
    """The default rule: go, no-go or inconclusive, with the step of the rule that decided.

    go = superior and not slower, or (equivalent or non-inferior) and faster; no-go = inferior, or slower without being
    superior; inconclusive otherwise. A superior arm that is slower goes only if the *high* end of its latency ratio is
    at most `max_slowdown`: the data must show that it is no slower than allowed.

    Args:
        quality: the quality verdict.
        cost: the cost verdict.
        ratio: low and high end of the latency ratio, new / old; NaN where it was not measured.
        max_slowdown: 1 allows none; 1.2 lets a superior arm take up to 1.2 times as long.

    Raises:
        ConfigError: an unknown verdict, or a `max_slowdown` below 1.

    Example:
        >>> decide("equivalent", "faster", (0.7, 0.8))[0], decide("superior", "slower", (1.1, 1.3))[0]
        ('go', 'inconclusive')
        >>> decide("superior", "slower", (1.1, 1.3), max_slowdown=1.4)
        ('go', [Reason(key='superior_slower_allowed', params={'ratio_high': 1.3, 'max_slowdown': 1.4})])
    """
    if quality not in QUALITY_VERDICTS or cost not in COST_VERDICTS:
        raise ConfigError(
            f"decide: verdicts {quality!r} and {cost!r}; use one of {QUALITY_VERDICTS} and one of {COST_VERDICTS}."
        )
    if not max_slowdown >= 1:
        raise ConfigError(f"decide: max_slowdown={max_slowdown}; use 1.0 (no slowdown) or more, as 1.2.")
    limits = {"ratio_high": ratio[1], "max_slowdown": max_slowdown}
    if quality == "superior":
        if cost != "slower":
            return "go", [Reason("superior_not_slower", {"cost": cost})]
        if ratio[1] <= max_slowdown:
            return "go", [Reason("superior_slower_allowed", limits)]
        return "inconclusive", [Reason("superior_too_slow", limits)]
    if quality == "inferior":
        return "no-go", [Reason("quality_lost", {})]
    if cost == "slower":
        return "no-go", [Reason("slower_not_superior", {"quality": quality})]
    if quality == "inconclusive":
        return "inconclusive", [Reason("quality_inconclusive", {"cost": cost})]
    if cost == "faster":
        return "go", [Reason("kept_and_faster", {"quality": quality})]
    return "inconclusive", [Reason("kept_not_faster", {"quality": quality})]
