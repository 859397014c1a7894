"""Repeated k-fold: the Bayesian twin against baycomp, what can be detected, Holm's levels, and simulations."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mrl.errors import ConfigError
from mrl.stats import correlated_t, detectable_by_folds, holm, holm_levels, more_images, nadeau_bengio, quality_verdict
from two_learners import Folds, differences_of, same_mean

K, REPEATS = 5, 2


@pytest.mark.parametrize("runs", [1, 2, 5])
@pytest.mark.parametrize("rope", [0.0, 0.01, 0.03])
def test_correlated_t__equals_baycomp(runs, rope):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from baycomp.single import CorrelatedTTest

    rng = np.random.default_rng(runs)
    a, b = rng.normal(0.80, 0.02, K * runs), rng.normal(0.82, 0.02, K * runs)
    theirs = CorrelatedTTest(a, b, rope=rope, runs=runs)
    ours = correlated_t(b - a, K, rope)
    found = theirs.probs()
    expected = (found[0], 0.0, found[1]) if rope == 0 else found
    assert (ours.p_worse, ours.p_equivalent, ours.p_better) == pytest.approx(expected, abs=1e-9)
    assert ours.p_worse + ours.p_equivalent + ours.p_better == pytest.approx(1)


def test_correlated_t__flat_prior_is_the_corrected_t():
    d = [0.02, 0.01, 0.03, 0.00, 0.02, 0.04, 0.01, 0.02, 0.00, 0.05]
    assert 2 * correlated_t(d, K, 0.0).p_worse == pytest.approx(nadeau_bengio(d, K).p_value)


def test_correlated_t__no_spread_claims_nothing():
    found = correlated_t([0.01] * 10, K, 0.03)
    assert math.isnan(found.p_equivalent)
    assert found.estimate == pytest.approx(0.01)


@pytest.mark.parametrize(("d", "k", "rope"), [([0.1] * 10, 5, -0.1), ([0.1] * 10, 5, math.nan), ([0.1] * 4, 5, 0.1)])
def test_correlated_t__refuses(d, k, rope):
    with pytest.raises(ConfigError):
        correlated_t(d, k, rope)


def test_detectable_by_folds__has_the_power_it_says():
    n, share = 1000, 0.1
    effect = detectable_by_folds(n, share, k=K, repeats=REPEATS)
    se = math.sqrt(share * K / n * (1 / (K * REPEATS) + 1 / (K - 1)))
    critical = scipy_stats.t.ppf(0.975, K * REPEATS - 1)
    assert scipy_stats.nct.sf(critical, K * REPEATS - 1, effect / se) == pytest.approx(0.8)


def test_detectable_by_folds__every_argument_matters():
    base = {"n": 1000, "disagreement": 0.1, "k": 5, "repeats": 2, "power": 0.8, "alpha": 0.05}
    first = detectable_by_folds(**base)
    assert detectable_by_folds(**{**base, "n": 4000}) == pytest.approx(first / 2)
    assert detectable_by_folds(**{**base, "disagreement": 0.05}) == pytest.approx(first / math.sqrt(2))
    assert detectable_by_folds(**{**base, "repeats": 5}) < first
    assert detectable_by_folds(**{**base, "k": 10}) != first
    assert detectable_by_folds(**{**base, "power": 0.9}) > first
    assert detectable_by_folds(**{**base, "alpha": 0.1}) < first


@pytest.mark.parametrize(
    "change", [{"k": 1}, {"repeats": 0}, {"n": 3}, {"disagreement": 0}, {"power": 1.0}, {"alpha": 0}]
)
def test_detectable_by_folds__refuses(change):
    with pytest.raises(ConfigError):
        detectable_by_folds(**{"n": 100, "disagreement": 0.1, "k": 5, "repeats": 2, **change})


@pytest.mark.parametrize("seed", range(5))
def test_holm_levels__decide_as_holm(seed):
    p = np.random.default_rng(seed).beta(0.5, 5, 6)
    for alpha in (0.01, 0.05, 0.2):
        assert ((p < holm_levels(p, alpha)) == (holm(p) < alpha)).all()


def test_holm_levels__one_comparison_and_none_and_nan():
    assert holm_levels([0.3]).tolist() == [0.05]
    assert holm_levels([]).tolist() == []
    assert holm_levels([math.nan, 0.001]).tolist() == [0.05, 0.025]
    with pytest.raises(ConfigError):
        holm_levels([1.5])


# Simulations


def judged(d, margin=0.03, alpha=0.05):
    found = nadeau_bengio(d, K, alpha)
    return found, quality_verdict(found.low, found.high, margin)


@pytest.mark.slow
def test_verdict__false_superior_on_correlated_folds_of_real_learners():
    """Two learners of equal skill trained on the overlapping training sides of 2,000 data sets: none is superior."""
    found = [judged(d)[1] for d in differences_of(Folds(n=200), runs=2000, seed=1)]
    assert found.count("superior") / len(found) <= 0.06
    assert found.count("inferior") / len(found) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("sd", [0.01, 0.05])
def test_verdict__false_superior_and_coverage_where_the_folds_correlate_as_assumed(sd):
    """Correlation 1/k between the fold differences, Nadeau and Bengio's assumption: 95 % is 95 %."""
    rng, runs, truth = np.random.default_rng(3), 6000, 0.012
    shared = rng.normal(0, math.sqrt(1 / K), (runs, 1))
    noise = sd * (shared + rng.normal(0, math.sqrt(1 - 1 / K), (runs, K * REPEATS)))
    null = [judged(d)[1] for d in noise]
    assert null.count("superior") / runs <= 0.06
    intervals = [judged(d + truth)[0] for d in noise]
    assert 0.93 <= np.mean([i.low <= truth <= i.high for i in intervals]) <= 0.97


@pytest.mark.slow
def test_interval__coverage_over_real_learners():
    """The interval holds the true difference of expected accuracies at least as often as it says."""
    folds = Folds(n=200, skill_b=0.75)
    truth = same_mean(folds, seed=100)
    found = [judged(d)[0] for d in differences_of(folds, runs=2000, seed=2)]
    assert np.mean([i.low <= truth <= i.high for i in found]) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("n", [200, 500])
def test_verdict__power_at_the_printed_detectable_effect(n):
    """A difference as large as the printed one is called superior in at least 75 of 100 data sets."""
    low, high = 0.5, 2.5  # skill of the second learner; that of the first is 0.5
    for _ in range(12):
        folds = Folds(n=n, skill_b=(low + high) / 2)
        truth, share = same_mean(folds, seed=100, also_disagreement=True)
        printed = detectable_by_folds(n, share, k=K, repeats=REPEATS)
        low, high = (folds.skill_b, high) if truth < printed else (low, folds.skill_b)
    assert truth == pytest.approx(printed, abs=0.003)
    found = [judged(d)[1] for d in differences_of(folds, runs=1000, seed=4)]
    assert found.count("superior") / len(found) >= 0.75


@pytest.mark.slow
def test_holm_levels__family_of_three_arms_keeps_its_alpha():
    rng, runs = np.random.default_rng(5), 4000
    wrong = 0
    for _ in range(runs):
        shared = rng.normal(0, math.sqrt(1 / K), (3, 1))
        arms = shared + rng.normal(0, math.sqrt(1 - 1 / K), (3, K * REPEATS))
        levels = holm_levels([nadeau_bengio(d, K).p_value for d in arms])
        wrong += any(judged(d, alpha=a)[1] in ("superior", "inferior") for d, a in zip(arms, levels, strict=True))
    assert wrong / runs <= 0.06


@pytest.mark.slow
def test_more_images__half_of_the_runs_conclude_with_that_many():
    """The estimate stays and the spread shrinks with sqrt(n), as documented: then about half of new runs conclude."""
    rng, runs, n, sd, margin = np.random.default_rng(6), 4000, 200, 0.05, 0.03
    half = scipy_stats.t.ppf(0.975, 9) * sd * math.sqrt(0.1 + 0.25)
    more = more_images(0.0, -half, half, n=n, margin=margin)
    shrunk = sd * math.sqrt(n / (n + more))
    shared = rng.normal(0, math.sqrt(1 / K), (runs, 1))
    d = shrunk * math.sqrt(K / (K - 1)) * (shared + rng.normal(0, math.sqrt(1 - 1 / K), (runs, K * REPEATS)))
    concluded = np.mean([judged(row, margin)[1] in ("equivalent", "non-inferior", "superior") for row in d])
    assert 0.4 <= concluded <= 0.62
