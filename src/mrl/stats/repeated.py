"""Repeated k-fold cross-validation: Bayesian correlated t-test, what it can detect, and Holm's levels for several arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrl.errors import ConfigError
from mrl.stats.hypotheses import nadeau_bengio
from mrl.stats.intervals import normal_quantile


@dataclass(frozen=True)
class CorrelatedT:
    """What a Bayesian says of the true mean difference: the chances that it is worse, practically alike, or better.

    Args:
        estimate: the posterior's centre, the mean difference.
        scale: of the posterior, a Student distribution.
        df: its degrees of freedom.
        rope: half-width of the region of practical equivalence.
        p_worse: P(difference < -rope).
        p_equivalent: P(-rope <= difference <= rope).
        p_better: P(difference > rope).
    """

    estimate: float
    scale: float
    df: int
    rope: float
    p_worse: float
    p_equivalent: float
    p_better: float


def correlated_t(differences: Sequence[float], k: int, rope: float) -> CorrelatedT:
    """The Bayesian correlated t-test over the J = k * r differences of repeated k-fold, with a region of equivalence.

    The posterior of the true difference is Student with J - 1 degrees of freedom, centre mean(d) and scale
    sd(d) * sqrt(1/J + rho / (1 - rho)), rho = 1/k the correlation of folds whose training sets overlap: the flat-prior
    twin of `nadeau_bengio`. Where all differences are equal the probabilities are NaN: no spread is no certainty.

    Args:
        differences: one a fold and repeat, second arm minus first.
        k: number of folds, at least 2.
        rope: half-width of the region of practical equivalence, the margin; 0 gives it no room.

    Raises:
        ConfigError: a negative rope, or differences that `nadeau_bengio` refuses.

    Reference:
        Corani and Benavoli (2015), A Bayesian approach for comparing cross-validated algorithms on multiple data sets.
        Machine Learning 100; the region as Benavoli, Corani, Demsar and Zaffalon (2017), JMLR 18.

    Example:
        >>> r = correlated_t([0.01, 0.03, 0.02, 0.00, 0.04], k=5, rope=0.03)
        >>> print(f"{r.p_worse:.3f} {r.p_equivalent:.3f} {r.p_better:.3f}")
        0.005 0.796 0.200
    """
    from scipy.stats import t as student

    if not rope >= 0:
        raise ConfigError(f"correlated_t: rope={rope}; give the margin, a fraction of 0 or more.")
    found = nadeau_bengio(differences, k)
    if math.isnan(found.t):
        return CorrelatedT(found.estimate, math.nan, found.df, rope, math.nan, math.nan, math.nan)
    scale = float(np.std(differences, ddof=1)) * math.sqrt(1 / (found.df + 1) + 1 / (k - 1))
    posterior = student(found.df, found.estimate, scale)
    worse, better = float(posterior.cdf(-rope)), float(posterior.sf(rope))
    return CorrelatedT(found.estimate, scale, found.df, rope, worse, max(0.0, 1 - worse - better), better)


def detectable_by_folds(
    n: int, disagreement: float, *, k: int, repeats: int, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest true difference of accuracy that repeated k-fold on `n` images would show with probability `power`.

    The fold differences spread by sqrt(p_d * k / n), their mean by sqrt(1/J + 1/(k - 1)) times that, and the t-test of
    `nadeau_bengio` finds a difference with the power of the non-central t. The training luck that makes fold
    differences spread more is in p_d only in so far as it makes the arms disagree: take the number as the least.

    Args:
        n: images in all, each tested once a repeat.
        disagreement: p_d, share of images that one arm has right and the other wrong.
        k: number of folds.
        repeats: r; J = k * r.
        power: wanted probability of the verdict "superior".
        alpha: two-sided.

    Raises:
        ConfigError: fewer than 2 folds, 1 repeat or k images, or a share that is not between 0 and 1.

    Example:
        >>> [round(100 * detectable_by_folds(2624, p, k=5, repeats=2), 1) for p in (0.05, 0.10, 0.20)]
        [1.8, 2.6, 3.6]
    """
    from scipy.optimize import brentq
    from scipy.stats import nct
    from scipy.stats import t as student

    normal_quantile(alpha, "detectable_by_folds")
    if k < 2 or repeats < 1 or n < k or not 0 < disagreement <= 1 or not alpha / 2 < power < 1:
        raise ConfigError(
            f"detectable_by_folds: n={n}, k={k}, repeats={repeats}, disagreement={disagreement}, power={power}; give k >= 2, "
            "repeats >= 1, n >= k and shares between 0 and 1."
        )
    folds = k * repeats
    critical = student.ppf(1 - alpha / 2, folds - 1)
    centre = brentq(lambda shift: nct.sf(critical, folds - 1, shift) - power, 0.0, 10 * critical + 10)
    return float(centre * math.sqrt(disagreement * k / n) * math.sqrt(1 / folds + 1 / (k - 1)))


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> np.ndarray:
    """The alpha at which Holm's procedure judges each comparison: an interval at 1 - level shuts zero out iff Holm rejects.

    The smallest of m p-values is judged at alpha / m, the next at alpha / (m - 1), and so on; after the first that is not
    below its level all others are judged at that same one. Verdicts read off these intervals keep the chance of any
    false "superior" or "inferior" among all arms at alpha.

    Args:
        p_values: of each arm against the baseline, two-sided; NaN (no spread) counts as 1.
        alpha: of the whole family.

    Raises:
        ConfigError: a p-value outside 0..1.

    Reference:
        Holm (1979), A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6.

    Example:
        >>> holm_levels([0.01, 0.04, 0.03]).round(4).tolist()
        [0.0167, 0.025, 0.025]
    """
    normal_quantile(alpha, "holm_levels")
    p = np.asarray(p_values, dtype=float)
    p = np.where(np.isnan(p), 1.0, p)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ConfigError(f"holm_levels: {p.tolist()}; give a list of p-values between 0 and 1.")
    levels = np.empty_like(p)
    level, open_ = alpha, True
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        level = alpha / (len(p) - rank) if open_ else level
        levels[i] = level
        open_ = open_ and p[i] < level
    return levels
