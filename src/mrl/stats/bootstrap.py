"""The bootstrap: BCa intervals over groups, and block intervals of latency ratios. Everything is resampled in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mrl.errors import ConfigError
from mrl.stats.intervals import Interval, normal_quantile

MOST_JACKKNIFE = 2_000  # with more groups the jackknife leaves out one of this many blocks of groups
MOST_UNDEFINED = 0.05  # share of resamples in which a statistic may be undefined
CELLS = 4_000_000  # numbers held at once
TIE = 1e-12


@dataclass(frozen=True)
class Resamples:
    """S statistics on the data, on R resamples and on J jackknife samples, all from the same draws.

    Args:
        point: (S,) on the data.
        replicates: (R, S) on the resamples.
        jackknife: (J, S) with one group (or one block of groups) left out.
    """

    point: np.ndarray
    replicates: np.ndarray
    jackknife: np.ndarray

    def interval(self, column: int, alpha: float = 0.05) -> Interval:
        """The BCa interval of statistic `column`."""
        return bca_interval(
            float(self.point[column]), self.replicates[:, column], self.jackknife[:, column], alpha=alpha
        )


def resample(
    statistic: Callable[..., np.ndarray],
    *arrays: np.ndarray,
    groups: np.ndarray | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Resamples:
    """Draws groups with replacement and evaluates weighted statistics on every draw.

    Args:
        statistic: takes weights (R, n), how often each image was drawn, and the arrays; returns (R,) or (R, S). Written
            with matrix products (`weights @ x`) it does all draws at once.
        arrays: data of n images each, in the same order (both arms: this is what makes it paired).
        groups: (n,) labels; images of one label are drawn together. None: every image alone.
        n_resamples: number of draws.
        seed: of the draws.

    Raises:
        ConfigError: arrays of different lengths, fewer than 2 groups, or fewer than 100 resamples.

    Reference:
        Efron and Tibshirani (1993), An Introduction to the Bootstrap; whole groups as Davison and Hinkley (1997), 3.8.

    Example:
        >>> x = np.arange(10.0)
        >>> r = resample(lambda w, x: w @ x / w.sum(1), x, n_resamples=500)
        >>> r.point.tolist(), r.replicates.shape, r.jackknife.shape
        ([4.5], (500, 1), (10, 1))
    """
    lengths = {len(array) for array in arrays} | ({len(groups)} if groups is not None else set())
    if len(lengths) != 1:
        raise ConfigError(f"resample: arrays of lengths {sorted(lengths)}; all must have one row an image.")
    n = lengths.pop()
    member = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n_groups = int(member.max(initial=-1)) + 1
    if n_groups < 2 or n_resamples < 100:
        raise ConfigError(f"resample: {n_groups} groups and {n_resamples} resamples; at least 2 and 100 are needed.")

    def evaluate(weights: np.ndarray) -> np.ndarray:
        values = np.asarray(statistic(weights, *arrays), dtype=float)
        return values.reshape(len(weights), -1)

    rng = np.random.default_rng(seed)
    step = max(1, CELLS // max(n, n_groups))
    replicates = []
    for start in range(0, n_resamples, step):
        rows = min(step, n_resamples - start)
        drawn = rng.integers(n_groups, size=(rows, n_groups)) + np.arange(rows)[:, None] * n_groups
        counts = np.bincount(drawn.ravel(), minlength=rows * n_groups).reshape(rows, n_groups).astype(float)
        replicates.append(evaluate(counts if groups is None else counts[:, member]))
    n_left = min(n_groups, MOST_JACKKNIFE)
    block = member % n_left
    jackknife = [
        evaluate((block[None, :] != np.arange(start, min(start + step, n_left))[:, None]).astype(float))
        for start in range(0, n_left, step)
    ]
    return Resamples(evaluate(np.ones((1, n)))[0], np.concatenate(replicates), np.concatenate(jackknife))


def bca_interval(point: float, replicates: np.ndarray, jackknife: np.ndarray, alpha: float = 0.05) -> Interval:
    """The bias-corrected and accelerated interval from resamples and jackknife values.

    The percentiles are Phi(z0 + (z0 + z) / (1 - a(z0 + z))), z0 from the share of resamples below the estimate (ties
    half), a from the jackknife's skewness. It falls back and says so in `method`: `degenerate` where every resample
    gave the same value (zero width: this is no evidence of certainty), `percentile` where a is not defined or |z0| is
    so large that the interval would leave the estimate out (then widened to hold it; a calibration error near 0 does
    this), `undefined` (NaN) where the estimate or more than 5 % of the resamples are.

    Args:
        point: the estimate.
        replicates: (R,) resamples; NaN where undefined.
        jackknife: (J,) leave-one-group-out values.
        alpha: 1 - confidence.

    Reference:
        Efron (1987), Better bootstrap confidence intervals. JASA 82.

    Example:
        >>> bca_interval(0.0, np.zeros(1000), np.zeros(10)).method
        'degenerate'
    """
    from scipy.stats import norm

    z = normal_quantile(alpha, "bca_interval")
    usable = replicates[np.isfinite(replicates)]
    if not math.isfinite(point) or usable.size < (1 - MOST_UNDEFINED) * replicates.size:
        return Interval(point, math.nan, math.nan, "undefined")
    if np.ptp(usable) <= TIE:
        return Interval(point, point, point, "degenerate")
    below, above = np.mean(usable < point - TIE), np.mean(usable > point + TIE)
    z0 = float(norm.ppf((below + 1 - above) / 2))
    influence = jackknife.mean() - jackknife
    spread = float(np.sum(influence**2))
    method, levels = "percentile", np.array([alpha / 2, 1 - alpha / 2])
    if abs(z0) < z and spread > TIE**2:
        a = float(np.sum(influence**3)) / (6 * spread**1.5)
        shifted = z0 + np.array([-z, z])
        if math.isfinite(a) and np.all(1 - a * shifted > 0):
            method, levels = "bca", norm.cdf(z0 + shifted / (1 - a * shifted))
    low, high = (float(end) for end in np.quantile(usable, levels))
    if method == "percentile":
        low, high = min(low, point), max(high, point)
    return Interval(point, low, high, method)


def bca(
    statistic: Callable[..., np.ndarray],
    *arrays: np.ndarray,
    groups: np.ndarray | None = None,
    n_resamples: int = 10_000,
    alpha: float = 0.05,
    seed: int = 0,
) -> Interval:
    """The paired bootstrap BCa interval of one statistic, over groups.

    `resample` and `bca_interval` in one; see there for the arguments, the fall-backs and the references.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a, b = rng.normal(0.0, 1.0, 200), rng.normal(0.2, 1.0, 200)
        >>> i = bca(lambda w, a, b: (w @ b - w @ a) / w.sum(1), a, b, n_resamples=2000)
        >>> i.low < i.estimate < i.high, i.method
        (True, 'bca')
    """
    resamples = resample(statistic, *arrays, groups=groups, n_resamples=n_resamples, seed=seed)
    if resamples.point.size != 1:
        raise ConfigError(f"bca: the statistic gave {resamples.point.size} values; use `resample` for several.")
    return resamples.interval(0, alpha)


def ratio_of_medians(
    baseline: np.ndarray, other: np.ndarray, *, alpha: float = 0.05, n_resamples: int = 5_000, seed: int = 0
) -> Interval:
    """The ratio median(other) / median(baseline) of interleaved timings; below 1 the other one is faster.

    Blocks are drawn with replacement, the same ones for both arms, so that what slowed the machine for a while slows
    both; the limits are percentiles (a jackknife of a median is inconsistent, so no BCa).

    Args:
        baseline: (blocks, samples a block) or (blocks,) timings of the baseline, in any unit.
        other: the same of the other arm; block i of both was timed in the same turn.
        alpha: 1 - confidence.
        n_resamples: number of draws.
        seed: of the draws.

    Raises:
        ConfigError: not as many blocks in both, fewer than 2, or timings that are not above 0.

    Reference:
        Kalibera and Jones (2013), Rigorous benchmarking in reasonable time. ISMM: the effect size is a ratio, its
        interval comes from resampling the upper level of repetition.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> slow, fast = rng.gamma(100, 0.10, (30, 5)), rng.gamma(100, 0.08, (30, 5))
        >>> i = ratio_of_medians(slow, fast)
        >>> print(f"{i.estimate:.2f}", i.high < 1)
        0.82 True
    """
    blocks = [_as_blocks(array, "ratio_of_medians") for array in (baseline, other)]
    if len(blocks[0]) != len(blocks[1]):
        raise ConfigError(
            f"ratio_of_medians: {len(blocks[0])} and {len(blocks[1])} blocks; interleave A and B, one block of each."
        )
    first, second = _block_medians(blocks, n_resamples, seed)
    estimate = float(np.median(blocks[1]) / np.median(blocks[0]))
    low, high = _percentiles(second / first, alpha, "ratio_of_medians")
    return Interval(estimate, low, high, "percentile over blocks")


def _as_blocks(samples: np.ndarray, who: str) -> np.ndarray:
    blocks = np.asarray(samples, dtype=float)
    blocks = blocks[:, None] if blocks.ndim == 1 else blocks
    if blocks.ndim != 2 or len(blocks) < 2 or blocks.shape[1] < 1 or not (np.isfinite(blocks) & (blocks > 0)).all():
        raise ConfigError(
            f"{who}: timings of shape {blocks.shape}; give (blocks, samples), 2 blocks or more, finite and above 0."
        )
    return blocks


def _block_medians(arms: list[np.ndarray], n_resamples: int, seed: int) -> list[np.ndarray]:
    rng, n_blocks = np.random.default_rng(seed), len(arms[0])
    step = max(1, CELLS // max(arm.size for arm in arms))
    medians: list[list[np.ndarray]] = [[] for _ in arms]
    for start in range(0, n_resamples, step):
        drawn = rng.integers(n_blocks, size=(min(step, n_resamples - start), n_blocks))
        for arm, found in zip(arms, medians, strict=True):
            found.append(np.median(arm[drawn].reshape(len(drawn), -1), axis=1))
    return [np.concatenate(found) for found in medians]


def _percentiles(values: np.ndarray, alpha: float, who: str) -> tuple[float, float]:
    normal_quantile(alpha, who)
    low, high = np.quantile(values, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)
