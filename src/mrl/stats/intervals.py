"""Closed-form intervals: one proportion, two paired proportions, two areas under one ROC curve each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrl.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """An estimate, its two-sided interval, and how the interval was computed.

    Args:
        estimate: the value on the data itself.
        low: lower end; NaN where there is none.
        high: upper end; NaN where there is none.
        method: `wilson`, `newcombe`, `bca`, `percentile`, `degenerate` (every resample gave the same value: zero width,
            no evidence of certainty) or `undefined`.

    Example:
        >>> Interval(0.9, 0.8, 0.95, "wilson").width
        0.15
    """

    estimate: float
    low: float
    high: float
    method: str

    @property
    def width(self) -> float:
        """`high - low`, rounded to twelve digits."""
        return round(self.high - self.low, 12)


@dataclass(frozen=True)
class DeLong:
    """The difference of two areas under the ROC curve, `auc_b - auc_a`, with its interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    auc_a: float
    auc_b: float


def normal_quantile(alpha: float, who: str) -> float:
    """The two-sided normal quantile of `alpha`; raises ConfigError unless 0 < alpha < 1."""
    from scipy.special import ndtri

    if not 0 < alpha < 1:
        raise ConfigError(f"{who}: alpha={alpha} is not between 0 and 1; use 0.05 for 95 % intervals.")
    return float(-ndtri(alpha / 2))


def wilson(successes: float, n: float, alpha: float = 0.05) -> Interval:
    """Wilson's score interval of one proportion.

    (p + z^2/2n -+ z * sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n). With n = 0 nothing is known: NaN, 0 to 1.

    Args:
        successes: how many of the `n`; a fraction of one is allowed, for an effective sample size.
        n: how many in all.
        alpha: 1 - confidence.

    Raises:
        ConfigError: `successes` is outside 0..n.

    Reference:
        Wilson (1927), Probable inference, the law of succession, and statistical inference. JASA 22.

    Example:
        >>> i = wilson(90, 100)
        >>> print(f"{i.estimate:.2f} ({i.low:.3f} to {i.high:.3f})")
        0.90 (0.826 to 0.945)
    """
    z = normal_quantile(alpha, "wilson")
    if not 0 <= successes <= n:
        raise ConfigError(f"wilson: {successes} successes of {n}; give 0 <= successes <= n.")
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, "wilson")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the limit is the estimate itself; rounding must not put it on the wrong side.
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), "wilson")


def newcombe_paired(n11: float, b: float, c: float, n00: float, alpha: float = 0.05) -> Interval:
    """Newcombe's interval of the difference of two paired proportions (his method 10, "square and add").

    The difference is (c - b) / n, second arm minus first. With no disagreement at all (b = c = 0) it still has a width.

    Args:
        n11: images both arms have right.
        b: right in the first arm (baseline), wrong in the second.
        c: wrong in the first arm, right in the second.
        n00: images both arms have wrong.
        alpha: 1 - confidence.

    Raises:
        ConfigError: a negative count.

    Reference:
        Newcombe (1998), Improved confidence intervals for the difference between binomial proportions based on paired
        data. Statistics in Medicine 17, 2635-2650. The correlation is corrected for continuity, as there.

    Example:
        >>> i = newcombe_paired(1, 7, 1, 12)
        >>> print(f"{i.estimate:.3f} ({i.low:.3f} to {i.high:.3f})")
        -0.286 (-0.507 to -0.026)
    """
    normal_quantile(alpha, "newcombe_paired")
    if min(n11, b, c, n00) < 0:
        raise ConfigError(f"newcombe_paired: counts {(n11, b, c, n00)}; none may be negative.")
    n = n11 + b + c + n00
    if n == 0:
        return Interval(math.nan, -1.0, 1.0, "newcombe")
    second, first = wilson(n11 + c, n, alpha), wilson(n11 + b, n, alpha)
    cross = n11 * n00 - b * c
    product = (n11 + b) * (c + n00) * (n11 + c) * (b + n00)
    phi = 0.0 if product == 0 else (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)
    down, up = second.estimate - second.low, second.high - second.estimate
    first_down, first_up = first.estimate - first.low, first.high - first.estimate
    low = math.sqrt(max(0.0, down**2 - 2 * phi * down * first_up + first_up**2))
    high = math.sqrt(max(0.0, up**2 - 2 * phi * up * first_down + first_down**2))
    difference = (c - b) / n
    return Interval(difference, max(-1.0, difference - low), min(1.0, difference + high), "newcombe")


def combine(intervals: Sequence[Interval], weights: Sequence[float] | None = None) -> Interval:
    """The interval of a weighted sum of independent estimates, from the interval of each ("square and add").

    estimate = sum w_k e_k; low = estimate - sqrt(sum w_k^2 (e_k - low_k)^2); high alike. Equal weights 1/K turn one
    proportion a class into balanced accuracy, the numbers of images of the classes taken as given.

    Args:
        intervals: one of each part, all with low <= estimate <= high.
        weights: not negative; None is the mean.

    Raises:
        ConfigError: nothing to combine, or not one weight an interval.

    Reference:
        Zou and Donner (2008), Construction of confidence limits about effect measures. Statistics in Medicine 27.

    Example:
        >>> i = combine([wilson(90, 100), wilson(45, 50)])
        >>> print(f"{i.estimate:.2f} ({i.low:.3f} to {i.high:.3f}), {i.method}")
        0.90 (0.832 to 0.936), wilson_combined
    """
    if not intervals or (weights is not None and len(weights) != len(intervals)):
        raise ConfigError(f"combine: {len(intervals)} intervals; give one or more, and as many weights.")
    w = np.full(len(intervals), 1 / len(intervals)) if weights is None else np.asarray(weights, dtype=float)
    estimate, low, high = (np.array([getattr(i, name) for i in intervals]) for name in ("estimate", "low", "high"))
    centre = float(w @ estimate)
    down, up = math.sqrt(np.sum((w * (estimate - low)) ** 2)), math.sqrt(np.sum((w * (high - estimate)) ** 2))
    return Interval(centre, centre - down, centre + up, f"{intervals[0].method}_combined")


def delong(target: np.ndarray, score_a: np.ndarray, score_b: np.ndarray, alpha: float = 0.05) -> DeLong:
    """The difference of two correlated areas under the ROC curve, after DeLong.

    Each area is a U-statistic, P(score of a positive > score of a negative) + half of the ties; the variance of the
    difference comes from the structural components of both, O(n log n) by mid-ranks. Where it is zero (both rank the
    images alike, or both perfectly), the limits and the p-value are NaN: the data cannot say.

    Args:
        target: (n,) true for positives; at least two of each kind.
        score_a: (n,) higher means more likely positive; first arm.
        score_b: (n,) second arm, the same images in the same order.
        alpha: 1 - confidence.

    Raises:
        ConfigError: shapes that differ, or fewer than two positives or negatives.

    Reference:
        DeLong, DeLong and Clarke-Pearson (1988), Biometrics 44; mid-ranks as Sun and Xu (2014), IEEE SPL 21.
        Images are taken as independent: not for grouped images.

    Example:
        >>> t = np.array([0, 0, 0, 1, 1, 1])
        >>> d = delong(t, np.array([1, 2, 5, 3, 4, 6]), np.array([1, 2, 3, 4, 5, 6]))
        >>> print(f"{d.auc_a:.3f} {d.auc_b:.3f} {d.difference:.3f}")
        0.778 1.000 0.222
    """
    from scipy.stats import norm

    z = normal_quantile(alpha, "delong")
    target = np.asarray(target).astype(bool)
    scores = [np.asarray(score, dtype=float) for score in (score_a, score_b)]
    if target.ndim != 1 or any(score.shape != target.shape for score in scores):
        raise ConfigError(
            f"delong: shapes {[target.shape, *(s.shape for s in scores)]}; give three vectors of one length."
        )
    positives, negatives = int(target.sum()), int((~target).sum())
    if min(positives, negatives) < 2:
        raise ConfigError(f"delong: {positives} positives and {negatives} negatives; at least 2 of each are needed.")
    (v10_a, v01_a), (v10_b, v01_b) = (_components(target, score) for score in scores)
    auc_a, auc_b = float(v10_a.mean()), float(v10_b.mean())
    variance = float(np.var(v10_b - v10_a, ddof=1) / positives + np.var(v01_b - v01_a, ddof=1) / negatives)
    difference = auc_b - auc_a
    if variance < 1e-24:
        return DeLong(difference, math.nan, math.nan, math.nan, auc_a, auc_b)
    se = math.sqrt(variance)
    return DeLong(
        difference,
        max(-1.0, difference - z * se),
        min(1.0, difference + z * se),
        float(2 * norm.sf(abs(difference) / se)),
        auc_a,
        auc_b,
    )


def _components(target: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each positive's share of negatives below it, and each negative's share of positives above it (ties half)."""
    from scipy.stats import rankdata

    ranks = rankdata(score)
    positives, negatives = ranks[target], ranks[~target]
    below = (positives - rankdata(score[target])) / len(negatives)
    above = 1 - (negatives - rankdata(score[~target])) / len(positives)
    return below, above
