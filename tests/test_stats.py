import math
import warnings

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mrl.errors import ConfigError
from mrl.stats import (
    Interval,
    bca,
    bca_interval,
    combine,
    decide,
    delong,
    holm,
    latency_verdict,
    mcnemar_exact,
    minimum_detectable_effect,
    more_images,
    nadeau_bengio,
    newcombe_paired,
    primary_metric,
    quality_verdict,
    ratio_of_medians,
    resample,
    sign_flip,
    wilson,
)


def mean_difference(weights, a, b):
    return (weights @ b - weights @ a) / weights.sum(1)


# Intervals


def test_wilson__oracle():
    interval = wilson(90, 100)
    assert (round(interval.low, 3), round(interval.high, 3)) == (0.826, 0.945)


@pytest.mark.parametrize(
    ("k", "n", "alpha"), [(0, 5, 0.05), (5, 5, 0.05), (3, 17, 0.1), (649, 656, 0.01), (1, 1, 0.05)]
)
def test_wilson__equals_statsmodels(k, n, alpha):
    from statsmodels.stats.proportion import proportion_confint

    interval = wilson(k, n, alpha)
    assert (interval.low, interval.high) == pytest.approx(proportion_confint(k, n, alpha, method="wilson"), abs=1e-12)


def test_wilson__nothing_known():
    interval = wilson(0, 0)
    assert math.isnan(interval.estimate)
    assert (interval.low, interval.high) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n", "alpha"), [(3, 2, 0.05), (-1, 2, 0.05), (1, 2, 0.0), (1, 2, 1.0)])
def test_wilson__refuses(k, n, alpha):
    with pytest.raises(ConfigError):
        wilson(k, n, alpha)


def test_newcombe_paired__published():
    # Bentur et al. (2009), airway hyper-responsiveness: (1, 1, 7, 12). Newcombe's square-and-add interval in
    # Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33, 2850-2875: -0.507 to -0.026.
    interval = newcombe_paired(1, 7, 1, 12)
    assert [round(x, 3) for x in (interval.estimate, interval.low, interval.high)] == [-0.286, -0.507, -0.026]


@pytest.mark.parametrize("table", [(40, 8, 3, 12), (10, 10, 10, 10), (5, 9, 1, 0), (0, 3, 6, 0), (30, 0, 0, 5)])
def test_newcombe_paired__equals_formula_with_statsmodels_limits(table):
    from statsmodels.stats.proportion import proportion_confint

    e, f, g, h = table  # his letters: f right in the first only
    n = sum(table)
    p1, p2 = (e + f) / n, (e + g) / n
    (l1, u1), (l2, u2) = (proportion_confint(round(p * n), n, 0.05, method="wilson") for p in (p1, p2))
    margins = (e + f) * (g + h) * (e + g) * (f + h)
    top = e * h - f * g
    phi = 0 if margins == 0 else (max(top - n / 2, 0) if top > 0 else top) / margins**0.5
    delta = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    epsilon = math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    interval = newcombe_paired(*table)
    assert interval.estimate == pytest.approx(-(p1 - p2))
    assert interval.low == pytest.approx(-(p1 - p2 + epsilon), abs=1e-12)
    assert interval.high == pytest.approx(-(p1 - p2 - delta), abs=1e-12)


def test_newcombe_paired__mirrors():
    one, other = newcombe_paired(50, 9, 3, 10), newcombe_paired(50, 3, 9, 10)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_newcombe_paired__no_disagreement_is_not_certainty():
    interval = newcombe_paired(90, 0, 0, 10)
    assert interval.estimate == 0
    assert interval.low < -0.01
    assert interval.high > 0.01


def test_newcombe_paired__refuses_negative():
    with pytest.raises(ConfigError):
        newcombe_paired(1, -1, 2, 3)


def test_combine__one_is_itself_and_weights_scale():
    one = wilson(45, 50)
    alone = combine([one])
    assert (alone.low, alone.high, alone.method) == (pytest.approx(one.low), pytest.approx(one.high), "wilson_combined")
    # Equal symmetric parts: the half-width shrinks by sqrt(2).
    half = wilson(50, 100)
    assert combine([half, half]).width == pytest.approx(half.width / math.sqrt(2))
    assert combine([one, half], [1.0, 0.0]).low == pytest.approx(one.low)


def test_combine__refuses():
    with pytest.raises(ConfigError):
        combine([])
    with pytest.raises(ConfigError):
        combine([wilson(1, 2)], [0.5, 0.5])


def brute_delong(target, a, b):
    """DeLong's variance from the definition: psi over all pairs, structural components, their covariance."""
    positives, negatives = np.flatnonzero(target), np.flatnonzero(~target)
    v10, v01 = [], []
    for score in (a, b):
        psi = np.array([[(score[i] > score[j]) + 0.5 * (score[i] == score[j]) for j in negatives] for i in positives])
        v10.append(psi.mean(1))
        v01.append(psi.mean(0))
    area = [v.mean() for v in v10]
    s10, s01 = np.cov(v10), np.cov(v01)
    contrast = np.array([-1, 1])
    variance = contrast @ (s10 / len(positives) + s01 / len(negatives)) @ contrast
    return area, variance


@pytest.mark.parametrize("rounded", [False, True])
def test_delong__equals_brute_force(rounded):
    rng = np.random.default_rng(3)
    target = rng.random(70) < 0.4
    a = rng.normal(size=70) + target
    b = a + rng.normal(size=70) * 0.7 + 0.4 * target
    if rounded:  # ties
        a, b = np.round(a), np.round(b)
    area, variance = brute_delong(target, a, b)
    found = delong(target, a, b, alpha=0.1)
    z = scipy_stats.norm.ppf(0.95)
    assert (found.auc_a, found.auc_b) == pytest.approx(area, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(
        (area[1] - area[0] - z * variance**0.5, area[1] - area[0] + z * variance**0.5), abs=1e-12
    )
    assert found.p_value == pytest.approx(2 * scipy_stats.norm.sf(abs(area[1] - area[0]) / variance**0.5))


def test_delong__areas_equal_sklearn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    target, a, b = rng.random(200) < 0.3, rng.random(200), np.round(rng.random(200), 1)
    found = delong(target, a, b)
    assert (found.auc_a, found.auc_b) == pytest.approx((roc_auc_score(target, a), roc_auc_score(target, b)))


def test_delong__same_scores_claim_nothing():
    target, score = np.array([0, 0, 1, 1, 1]), np.array([1, 4, 2, 3, 5])
    found = delong(target, score, score)
    assert found.difference == 0
    assert math.isnan(found.low)
    assert math.isnan(found.p_value)


def test_delong__refuses():
    with pytest.raises(ConfigError, match="at least 2"):
        delong(np.array([0, 1, 1]), np.zeros(3), np.zeros(3))
    with pytest.raises(ConfigError, match="one length"):
        delong(np.array([0, 0, 1, 1]), np.zeros(3), np.zeros(4))


# Hypotheses


def test_mcnemar_exact__oracle():
    assert round(mcnemar_exact(10, 2).p_value, 5) == 0.03857


@pytest.mark.parametrize(("b", "c"), [(10, 2), (2, 10), (5, 5), (0, 7), (0, 1), (31, 18)])
def test_mcnemar_exact__equals_statsmodels(b, c):
    from statsmodels.stats.contingency_tables import mcnemar

    assert mcnemar_exact(b, c).p_value == pytest.approx(mcnemar([[40, b], [c, 9]], exact=True).pvalue)


def test_mcnemar_exact__no_disagreement():
    assert mcnemar_exact(0, 0).p_value == 1.0


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03], [0.5], [0.02, 0.02, 0.9, 0.001], [1.0, 1.0], []])
def test_holm__equals_statsmodels(p):
    from statsmodels.stats.multitest import multipletests

    expected = multipletests(p, method="holm")[1] if p else []
    assert holm(p) == pytest.approx(np.array(expected))


@pytest.mark.parametrize("p", [[0.1, math.nan], [1.2], [-0.1]])
def test_holm__refuses(p):
    with pytest.raises(ConfigError):
        holm(p)


def test_sign_flip__oracle():
    assert sign_flip([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).p_value == 0.03125


@pytest.mark.parametrize("n", [6, 7, 10])
@pytest.mark.parametrize("ties", [False, True])
def test_sign_flip__equals_scipy_permutation(n, ties):
    rng = np.random.default_rng(n)
    d = rng.normal(0.5, 1, n)
    d = np.round(d) if ties else d
    result = scipy_stats.permutation_test(
        (d,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=math.inf, vectorized=True
    )
    assert sign_flip(d).p_value == pytest.approx(result.pvalue)


def test_sign_flip__many_pairs_and_zero_mean():
    assert sign_flip(np.ones(40)).p_value == 2 / 2**40
    assert sign_flip([1, -1, 1, -1, 1, -1]).p_value == 1.0


@pytest.mark.parametrize("d", [[0.1] * 5, [0.1] * 41, [0.1] * 5 + [math.nan]])
def test_sign_flip__refuses(d):
    with pytest.raises(ConfigError, match="6 to 40"):
        sign_flip(d)


@pytest.mark.parametrize("runs", [1, 2, 5])
def test_nadeau_bengio__equals_baycomp(runs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from baycomp.single import CorrelatedTTest

    rng = np.random.default_rng(runs)
    a, b = rng.normal(0.8, 0.02, 5 * runs), rng.normal(0.82, 0.02, 5 * runs)
    posterior = CorrelatedTTest(a, b, runs=runs)
    found = nadeau_bengio(b - a, k=5)
    student = scipy_stats.t(posterior.df, posterior.mean, math.sqrt(posterior.var))
    assert (found.low, found.high) == pytest.approx(student.ppf([0.025, 0.975]))
    assert found.p_value == pytest.approx(2 * min(posterior.probs()))


def test_nadeau_bengio__formula():
    d = [0.02, 0.01, 0.03, 0.00, 0.02, 0.04, 0.01, 0.02, 0.00, 0.05]
    found = nadeau_bengio(d, k=5)
    # mean 0.02, sd sqrt(0.0024 / 9), 1/J + 1/(k-1) = 0.35
    assert found.t == pytest.approx(0.02 / math.sqrt(0.0024 / 9 * 0.35))
    assert found.df == 9
    assert nadeau_bengio([0.2] * 5, k=5).p_value != 0
    assert math.isnan(nadeau_bengio([0.1] * 5, k=5).low)


@pytest.mark.parametrize(("d", "k"), [([0.1] * 4, 5), ([0.1] * 7, 5), ([0.1] * 4, 1)])
def test_nadeau_bengio__refuses(d, k):
    with pytest.raises(ConfigError):
        nadeau_bengio(d, k)


# Bootstrap


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_bca__equals_scipy(alpha):
    rng = np.random.default_rng(5)
    a = rng.exponential(size=60)
    b = a + rng.exponential(size=60) * 0.5
    ours = bca(mean_difference, a, b, n_resamples=20_000, alpha=alpha)
    theirs = scipy_stats.bootstrap(
        (a, b),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        confidence_level=1 - alpha,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    # Monte Carlo error of a 2.5 % quantile of 20,000 draws is about 0.02 standard errors; both sides have it.
    se = np.std(b - a) / math.sqrt(60)
    assert ours.method == "bca"
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.08 * se)


def test_bca_interval__same_resamples_equal_scipy_exactly():
    # A ratio of means, skewed, on the very draws and jackknife of scipy.
    rng = np.random.default_rng(2)
    a, b = rng.exponential(size=25), rng.exponential(size=25)
    draws = resample(lambda w, a, b: (w @ b) / (w @ a), a, b, n_resamples=4000)
    found = draws.interval(0)
    fits = scipy_stats.bootstrap(
        (a, b),
        lambda a, b, axis: b.mean(axis) / a.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=0,
        method="BCa",
        bootstrap_result=type("Draws", (), {"bootstrap_distribution": draws.replicates[:, 0]})(),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((fits.low, fits.high), abs=1e-9)


def test_bca__reproducible_and_seed_matters():
    x = np.random.default_rng(0).normal(size=40)
    first, again, other = (bca(lambda w, x: w @ x / w.sum(1), x, n_resamples=300, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_bca__groups_are_drawn_whole():
    # 20 groups of 10 equal images are worth 20 images: as wide as on one of each, and wider than on 200 alone.
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(20), 10)
    one = rng.normal(size=20)
    x = one[group]
    statistic = lambda w, x: w @ x / w.sum(1)  # noqa: E731
    grouped = bca(statistic, x, groups=np.array([f"g{g}" for g in group]), n_resamples=5000)
    single = bca(statistic, one, n_resamples=5000)
    ignored = bca(statistic, x, n_resamples=5000)
    assert grouped.width == pytest.approx(single.width, rel=0.05)
    assert ignored.width < 0.5 * grouped.width


def test_bca__chunks_do_not_matter(monkeypatch):
    import mrl.stats.bootstrap as module

    x = np.random.default_rng(0).normal(size=50)
    whole = bca(lambda w, x: w @ x / w.sum(1), x, n_resamples=500)
    monkeypatch.setattr(module, "CELLS", 1000)
    parts = bca(lambda w, x: w @ x / w.sum(1), x, n_resamples=500)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


def test_bca__jackknife_in_blocks_is_close(monkeypatch):
    import mrl.stats.bootstrap as module

    x = np.random.default_rng(0).exponential(size=600)
    alone = bca(lambda w, x: w @ x / w.sum(1), x, n_resamples=4000)
    monkeypatch.setattr(module, "MOST_JACKKNIFE", 100)
    blocks = bca(lambda w, x: w @ x / w.sum(1), x, n_resamples=4000)
    assert (blocks.low, blocks.high) == pytest.approx((alone.low, alone.high), abs=0.1 * x.std() / math.sqrt(600))


def test_bca__degenerate_says_so():
    interval = bca(mean_difference, np.ones(30), np.ones(30), n_resamples=200)
    assert interval == Interval(0.0, 0.0, 0.0, "degenerate")


def test_bca_interval__percentile_when_the_jackknife_is_flat_or_undefined():
    draws = np.random.default_rng(0).normal(size=2000)
    for jackknife in (np.zeros(10), np.full(10, math.nan)):
        interval = bca_interval(0.0, draws, jackknife)
        assert interval.method == "percentile"
        assert (interval.low, interval.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_bca_interval__holds_the_estimate_when_all_resamples_lie_above():
    draws = np.random.default_rng(0).uniform(1, 2, 1000)
    interval = bca_interval(0.5, draws, np.arange(10.0))
    assert interval.method == "percentile"
    assert interval.low == 0.5


def test_bca_interval__undefined():
    draws = np.r_[np.zeros(90), np.ones(10), np.full(10, math.nan)]
    assert bca_interval(0.1, draws, np.arange(10.0)).method == "undefined"
    assert bca_interval(math.nan, draws[:100], np.arange(10.0)).method == "undefined"
    assert math.isnan(bca_interval(math.nan, draws[:100], np.arange(10.0)).low)


def test_resample__refuses():
    x = np.arange(4.0)
    with pytest.raises(ConfigError, match="lengths"):
        resample(mean_difference, x, x[:3])
    with pytest.raises(ConfigError, match="groups"):
        resample(mean_difference, x, x, groups=np.zeros(4))
    with pytest.raises(ConfigError, match="several"):
        bca(lambda w, x: np.stack([w @ x, w @ x], 1), x, n_resamples=100)


def test_ratio_of_medians__direction_and_estimate():
    baseline, other = np.full((30, 3), 10.0), np.full((30, 3), 8.0)
    interval = ratio_of_medians(baseline, other)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.8, 0.8, 0.8))
    assert latency_verdict(interval) == "faster"
    assert latency_verdict(ratio_of_medians(other, baseline)) == "slower"


def test_ratio_of_medians__what_slows_both_cancels():
    # The machine halves its speed in half of the blocks: paired, the ratio is known exactly.
    rng = np.random.default_rng(0)
    load = np.where(rng.random(40) < 0.5, 1.0, 2.0)
    paired = ratio_of_medians(10 * load, 9 * load)
    assert (paired.low, paired.high) == pytest.approx((0.9, 0.9))


def test_ratio_of_medians__unequal_samples_in_a_block():
    rng = np.random.default_rng(0)
    interval = ratio_of_medians(rng.gamma(50, 0.2, (30, 4)), rng.gamma(50, 0.2, (30, 7)))
    assert latency_verdict(interval) == "not resolvable"


@pytest.mark.parametrize("bad", [np.ones(1), np.zeros(5), np.full(5, math.nan), np.ones((2, 2, 2)), np.ones((3, 0))])
def test_ratio_of_medians__refuses(bad):
    with pytest.raises(ConfigError):
        ratio_of_medians(bad, bad)


def test_ratio_of_medians__refuses_other_block_counts():
    with pytest.raises(ConfigError, match="interleave"):
        ratio_of_medians(np.ones(5), np.ones(6))


# Verdicts


@pytest.mark.parametrize(
    ("counts", "metric"),
    [({"a": 30, "b": 10}, "accuracy"), ({"a": 31, "b": 10}, "balanced_accuracy"), ([5, 5, 16], "balanced_accuracy")],
)
def test_primary_metric__threshold(counts, metric):
    assert primary_metric(counts) == metric


@pytest.mark.parametrize("counts", [{}, {"a": 3}, {"a": 3, "b": 0}])
def test_primary_metric__refuses(counts):
    with pytest.raises(ConfigError):
        primary_metric(counts)


# The table of shared/statistics.md: points at disagreements of 5, 10, 20 %, 80 % power, alpha 0.05, exact McNemar.
MDE = {200: (4.4, 6.4, 9.1), 500: (2.9, 4.1, 5.7), 1000: (2.0, 2.9, 4.0), 10_000: (0.6, 0.9, 1.3)}


@pytest.mark.parametrize("n", MDE)
def test_minimum_detectable_effect__table(n):
    exact = [minimum_detectable_effect(n, p, exact=True) for p in (0.05, 0.10, 0.20)]
    assert [round(100 * effect, 1) for effect in exact] == list(MDE[n])
    formula = [minimum_detectable_effect(n, p) for p in (0.05, 0.10, 0.20)]
    assert formula == pytest.approx(exact, rel=0.035)


def test_minimum_detectable_effect__is_about_2_8():
    assert minimum_detectable_effect(1, 1.0) == pytest.approx(2.8016, abs=1e-4)


def test_minimum_detectable_effect__exact_has_the_power_it_says():
    n, p, effect = 200, 0.10, minimum_detectable_effect(200, 0.10, exact=True)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, [(p - effect) / 2, (p + effect) / 2, 1 - p], size=4000)
    found = np.mean([mcnemar_exact(b, c).p_value <= 0.05 for b, c, _ in counts])
    assert found == pytest.approx(0.8, abs=0.025)


def test_minimum_detectable_effect__nothing_can_be_found():
    assert math.isnan(minimum_detectable_effect(50, 0.05, exact=True))


@pytest.mark.parametrize("kwargs", [{"n": 0}, {"disagreement": 0.0}, {"power": 1.0}, {"alpha": 0.0}])
def test_minimum_detectable_effect__refuses(kwargs):
    with pytest.raises(ConfigError):
        minimum_detectable_effect(**{"n": 100, "disagreement": 0.1, **kwargs})


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.02, "superior"),
        (0.001, 0.2, "superior"),
        (0.0, 0.02, "equivalent"),
        (-0.02, 0.02, "equivalent"),
        (-0.02, -0.01, "equivalent"),
        (-0.02, 0.03, "non-inferior"),
        (-0.02, 0.1, "non-inferior"),
        (-0.03, 0.02, "inconclusive"),
        (0.0 - (0.5 - 0.47), 0.02, "inconclusive"),  # -0.03 but for rounding
        (-0.05, -0.01, "inferior"),
        (-0.05, 0.0, "inconclusive"),
        (-0.05, 0.1, "inconclusive"),
        (math.nan, math.nan, "inconclusive"),
        (math.nan, 0.1, "inconclusive"),
    ],
)
def test_quality_verdict__first_that_holds(low, high, verdict):
    assert quality_verdict(low, high, 0.03) == verdict


def test_quality_verdict__refuses():
    with pytest.raises(ConfigError):
        quality_verdict(0.1, 0.0, 0.03)
    with pytest.raises(ConfigError):
        quality_verdict(0.0, 0.1, -0.03)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.8, 0.99, "faster"), (0.8, 1.0, "not resolvable"), (1.0, 1.2, "not resolvable"), (1.01, 1.2, "slower")]
    + [(math.nan, math.nan, "not resolvable")],
)
def test_latency_verdict__bounds(low, high, verdict):
    assert latency_verdict(Interval(1.0, low, high, "percentile over blocks")) == verdict


def test_more_images__reaches_the_bound():
    for estimate, low, high in [(0.0, -0.06, 0.06), (-0.02, -0.05, 0.011), (0.01, -0.04, 0.05), (-0.04, -0.09, 0.01)]:
        more = more_images(estimate, low, high, n=200, margin=0.03)
        verdicts = []
        for extra in (more - 1, more):
            shrink = math.sqrt(200 / (200 + extra))
            verdicts.append(
                quality_verdict(estimate - (estimate - low) * shrink, estimate + (high - estimate) * shrink, 0.03)
            )
        assert verdicts[0] == "inconclusive" != verdicts[1]


def test_more_images__none_and_zero():
    assert more_images(0.0, -0.01, 0.01, n=200, margin=0.03) == 0
    assert more_images(math.nan, math.nan, math.nan, n=200, margin=0.03) is None
    assert more_images(0.0, -0.1, 0.1, n=200, margin=0.0) is None
    assert more_images(0.0, -0.5, 0.5, n=200, margin=0.001) is None


def test_decide__whole_table():
    faster, slower, unclear = (0.8, 0.9), (1.1, 1.3), (0.9, 1.1)
    ratios = {"faster": faster, "slower": slower, "not resolvable": unclear}
    expected = {
        "superior": ("go", "inconclusive", "go"),
        "equivalent": ("go", "no-go", "inconclusive"),
        "non-inferior": ("go", "no-go", "inconclusive"),
        "inferior": ("no-go", "no-go", "no-go"),
        "inconclusive": ("inconclusive", "no-go", "inconclusive"),
    }
    for quality, row in expected.items():
        for (cost, ratio), decision in zip(ratios.items(), row, strict=True):
            found, reasons = decide(quality, cost, ratio)
            assert found == decision, (quality, cost)
            assert len(reasons) == 1


@pytest.mark.parametrize(
    ("high", "decision"), [(1.19, "go"), (1.2, "go"), (1.21, "inconclusive"), (math.nan, "inconclusive")]
)
def test_decide__max_slowdown_bounds_the_high_end(high, decision):
    assert decide("superior", "slower", (1.1, high), max_slowdown=1.2)[0] == decision


@pytest.mark.parametrize("quality", ["equivalent", "non-inferior", "inconclusive", "inferior"])
def test_decide__max_slowdown_helps_only_the_superior(quality):
    assert decide(quality, "slower", (1.01, 1.02), max_slowdown=2.0)[0] == "no-go"


def test_decide__refuses():
    with pytest.raises(ConfigError, match="verdicts"):
        decide("better", "faster", (0.8, 0.9))
    with pytest.raises(ConfigError, match="max_slowdown"):
        decide("superior", "faster", (0.8, 0.9), max_slowdown=0.9)


# Coverage by simulation


def _covered(intervals, truth):
    return np.mean([i.low - 1e-9 <= truth <= i.high + 1e-9 for i in intervals])


@pytest.mark.slow
def test_bca__coverage_of_a_paired_difference():
    # n = 300, 12 % disagreement, truth +2 points. Two standard errors of 1,000 runs are 1.4 points.
    rng = np.random.default_rng(0)
    found = []
    for run in range(1000):
        change = rng.choice([-1.0, 0.0, 1.0], size=300, p=[0.05, 0.88, 0.07])
        found.append(bca(lambda w, d: w @ d / w.sum(1), change, n_resamples=1000, seed=run))
    assert 0.93 <= _covered(found, 0.02) <= 0.97


@pytest.mark.slow
def test_bca__coverage_over_groups():
    # 60 groups of 1 to 6 images with a common effect: ignoring the groups would cover far less.
    rng = np.random.default_rng(1)
    grouped, ignored = [], []
    for run in range(600):
        sizes = rng.integers(1, 7, 60)
        group = np.repeat(np.arange(60), sizes)
        change = rng.normal(0, 1, 60)[group] + rng.normal(0, 0.5, sizes.sum())
        statistic = lambda w, d: w @ d / w.sum(1)  # noqa: E731
        grouped.append(bca(statistic, change, groups=group, n_resamples=1000, seed=run))
        ignored.append(bca(statistic, change, n_resamples=1000, seed=run))
    assert 0.92 <= _covered(grouped, 0.0) <= 0.975
    assert _covered(ignored, 0.0) < 0.85


@pytest.mark.slow
@pytest.mark.parametrize(("p_b", "p_c"), [(0.004, 0.004), (0.01, 0.02), (0.05, 0.05)])
def test_newcombe_paired__coverage(p_b, p_c):
    rng = np.random.default_rng(2)
    tables = rng.multinomial(400, [0.85 - p_b, p_b, p_c, 0.15 - p_c], size=3000)
    assert _covered([newcombe_paired(*map(int, t)) for t in tables], p_c - p_b) >= 0.94


@pytest.mark.slow
def test_delong__coverage():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(1500):
        target = np.arange(200) < 70
        common = rng.normal(size=200) + 1.2 * target
        a, b = common + rng.normal(size=200) * 0.6, common + rng.normal(size=200) * 0.6
        d = delong(target, a, b)
        found.append(Interval(d.difference, d.low, d.high, "delong"))
    assert 0.93 <= _covered(found, 0.0) <= 0.97


@pytest.mark.slow
def test_ratio_of_medians__coverage_of_equal_models():
    # Skewed timings with a load that drifts from block to block and hits both arms.
    rng = np.random.default_rng(4)
    found = []
    for run in range(800):
        load = np.exp(np.cumsum(rng.normal(0, 0.03, 30)))[:, None]
        a, b = (load * (5 + rng.gamma(2, 0.3, (30, 6))) for _ in range(2))
        found.append(ratio_of_medians(a, b, n_resamples=800, seed=run))
    assert 0.92 <= _covered(found, 1.0) <= 0.985


@pytest.mark.slow
def test_nadeau_bengio__fewer_false_positives_than_the_naive_t():
    # Differences of overlapping training sets: correlation 1/k between folds, none of it real.
    rng = np.random.default_rng(5)
    k, runs = 5, 2000
    shared = rng.normal(0, math.sqrt(1 / k), (runs, 1))
    differences = shared + rng.normal(0, math.sqrt(1 - 1 / k), (runs, 2 * k))
    corrected = np.mean([nadeau_bengio(d, k).p_value < 0.05 for d in differences])
    naive = np.mean([scipy_stats.ttest_1samp(d, 0).pvalue < 0.05 for d in differences])
    assert corrected < 0.07 < 0.2 < naive
