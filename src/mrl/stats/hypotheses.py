"""Hypothesis tests for paired results: exact McNemar, sign flip, corrected resampled t, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrl.errors import ConfigError
from mrl.stats.intervals import normal_quantile

MOST_FLIPS = 40


@dataclass(frozen=True)
class McNemar:
    """Disagreements in either direction, `b` for the first arm and `c` for the second, and the exact p-value."""

    b: int
    c: int
    p_value: float


@dataclass(frozen=True)
class SignFlip:
    """The mean difference of `n` pairs and its exact two-sided p-value under random signs."""

    estimate: float
    n: int
    p_value: float


@dataclass(frozen=True)
class CorrectedT:
    """The mean difference over resamplings with interval, t, degrees of freedom and p-value of the corrected t-test."""

    estimate: float
    low: float
    high: float
    t: float
    df: int
    p_value: float


def mcnemar_exact(b: int, c: int) -> McNemar:
    """McNemar's test, exact and two-sided: are `b` and `c` as unequal as coin tosses may be?

    p = min(1, 2 * P(X <= min(b, c))), X ~ Binomial(b + c, 1/2); 1 where the arms never disagree.

    Args:
        b: images right in the first arm (baseline) and wrong in the second.
        c: wrong in the first arm and right in the second.

    Raises:
        ConfigError: a negative count.

    Reference:
        McNemar (1947), Psychometrika 12; the exact, conditional form.

    Example:
        >>> round(mcnemar_exact(10, 2).p_value, 5)
        0.03857
    """
    from scipy.stats import binom

    if min(b, c) < 0:
        raise ConfigError(f"mcnemar_exact: b={b}, c={c}; counts cannot be negative.")
    return McNemar(int(b), int(c), float(min(1.0, 2 * binom.cdf(min(b, c), b + c, 0.5))))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: adjusted p-values that keep the family-wise error, in the order given.

    Args:
        p_values: each between 0 and 1.

    Raises:
        ConfigError: a value outside 0..1, or NaN.

    Reference:
        Holm (1979), A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(6).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ConfigError(f"holm: {p.tolist()}; give a list of p-values between 0 and 1.")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def sign_flip(differences: Sequence[float]) -> SignFlip:
    """Exact sign-flip test of paired differences: the share of all 2^n sign patterns with as large a |sum|.

    Fewer than 6 pairs can never reach 0.05 (2 / 2^5 = 0.0625), so they are refused. All patterns are counted, not
    sampled: the sums of two halves are sorted and matched, which needs 2^(n/2) memory.

    Args:
        differences: one a seed (or another independent pair), 6 to 40 of them.

    Raises:
        ConfigError: fewer than 6, more than 40, or a value that is not finite.

    Reference:
        Fisher (1935), The Design of Experiments; halves as in Horowitz and Sahni (1974), JACM 21.

    Example:
        >>> sign_flip([0.01, 0.02, 0.01, 0.03, 0.02, 0.01]).p_value
        0.03125
    """
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or not 6 <= d.size <= MOST_FLIPS or not np.isfinite(d).all():
        raise ConfigError(
            f"sign_flip: {d.size} differences; give 6 to {MOST_FLIPS} finite ones (fewer can never reach p < 0.05)."
        )
    bound = abs(d.sum()) - 1e-9 * np.abs(d).sum()
    if bound <= 0:
        return SignFlip(float(d.mean()), d.size, 1.0)
    left, right = np.sort(_signed_sums(d[: d.size // 2])), _signed_sums(d[d.size // 2 :])
    above = left.size - np.searchsorted(left, bound - right, side="left")
    # All sums come in pairs s, -s, so as many are below -bound.
    return SignFlip(float(d.mean()), d.size, float(2 * above.sum() / 2.0**d.size))


def _signed_sums(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def nadeau_bengio(differences: Sequence[float], k: int, alpha: float = 0.05) -> CorrectedT:
    """The corrected resampled t-test over the J = k * r differences of repeated k-fold cross-validation.

    t = mean(d) / (sd(d) * sqrt(1/J + 1/(k - 1))), J - 1 degrees of freedom: 1/(k - 1) is test over training size and
    pays for the training sets that overlap. Where all differences are equal, limits and p-value are NaN.

    Args:
        differences: one a fold and repeat, second arm minus first.
        k: number of folds, at least 2.
        alpha: 1 - confidence.

    Raises:
        ConfigError: k < 2, fewer than k differences, or not a multiple of k.

    Reference:
        Nadeau and Bengio (2003), Inference for the generalization error. Machine Learning 52; for repeated k-fold as
        Bouckaert and Frank (2004).

    Example:
        >>> r = nadeau_bengio([0.01, 0.03, 0.02, 0.00, 0.04], k=5)
        >>> print(f"{r.estimate:.3f} ({r.low:.3f} to {r.high:.3f}), p = {r.p_value:.2f}")
        0.020 (-0.009 to 0.049), p = 0.13
    """
    from scipy.special import stdtr, stdtrit

    normal_quantile(alpha, "nadeau_bengio")
    d = np.asarray(differences, dtype=float)
    if k < 2 or d.ndim != 1 or d.size < k or d.size % k:
        raise ConfigError(f"nadeau_bengio: {d.size} differences with k={k}; give k >= 2 and k * repeats differences.")
    mean, sd, df = float(d.mean()), float(d.std(ddof=1)), d.size - 1
    if not sd > 1e-15 * max(1.0, abs(mean)):
        return CorrectedT(mean, math.nan, math.nan, math.nan, df, math.nan)
    se = sd * math.sqrt(1 / d.size + 1 / (k - 1))
    t, half = mean / se, float(-stdtrit(df, alpha / 2)) * se
    return CorrectedT(mean, mean - half, mean + half, t, df, float(2 * stdtr(df, -abs(t))))
