"""The comparison over folds: the corrected test on the folds' differences, Bayesian chances, and the first repeat's tests."""

import itertools
import warnings

import numpy as np
import pytest

from mrl.compare import compare_predictions
from mrl.compare_folds import compare_fold_predictions
from mrl.decision import decision_of
from mrl.errors import ConfigError, DataError
from mrl.report.reasons import translated
from mrl.report.words import Words
from mrl.run import plain
from mrl.stats import nadeau_bengio

K, REPEATS = 5, 2
FAST = {"metric": "accuracy", "margin": 0.03, "k": K, "repeats": REPEATS, "n_resamples": 200}


def table(n=200, right=(0.8, 0.8), seed=0, same=0.0):
    """Predictions of two arms that are right with these chances; a share `same` of the images is answered alike."""
    rng = np.random.default_rng(seed)
    rows = []
    for repeat in range(REPEATS):
        order = rng.permutation(n)
        for i, image in enumerate(order):
            target, alike = int(image % 2), rng.random() < same
            luck = rng.random(2)
            for a, arm in enumerate(("baseline", "mrl")):
                hit = luck[0 if alike else a] < right[0 if alike else a]
                p = 0.5 + 0.4 * (1 if hit == bool(target) else -1) * rng.uniform(0.2, 1)
                rows.append(
                    {
                        "image": f"{image}.png",
                        "target": "ab"[target],
                        "arm": arm,
                        "repeat": str(repeat),
                        "fold": str(i % K),
                        "seed": "0",
                        "p_a": 1 - p,
                        "p_b": p,
                    }
                )
    return rows


def gaps(rows):
    found = {}
    for row in rows:
        hit = (float(row["p_b"]) > 0.5) == (row["target"] == "b")
        sign = 1 if row["arm"] == "mrl" else -1
        found.setdefault((int(row["repeat"]), int(row["fold"])), []).append(2 * sign * hit)
    return [np.mean(found[key]) for key in sorted(found)]


def test_compare_fold_predictions__primary_is_the_corrected_t_over_the_folds():
    rows = table()
    found, expected = compare_fold_predictions(rows, **FAST), nadeau_bengio(gaps(rows), K)
    assert found["method"] == "corrected_t"
    assert found["difference"]["estimate"] == pytest.approx(expected.estimate)
    assert (found["difference"]["low"], found["difference"]["high"]) == pytest.approx((expected.low, expected.high))
    assert found["test"]["p_value"] == pytest.approx(expected.p_value)
    assert [row["difference"] for row in found["folds"]["rows"]] == pytest.approx(gaps(rows))
    assert found["folds"]["n_fits"] == 10
    assert "10 fits an arm, each on 80 %" in found["scope"]
    for arm in ("baseline", "mrl"):
        scores = [row[arm] for row in found["folds"]["rows"]]
        mean = nadeau_bengio(scores, K)
        assert found["arms"][arm]["estimate"] == pytest.approx(np.mean(scores))
        assert (found["arms"][arm]["low"], found["arms"][arm]["high"]) == pytest.approx((mean.low, mean.high))
        assert found["arms"][arm]["intervals"]["auroc"]["method"] == "corrected_t"


def test_compare_fold_predictions__chances_equal_baycomp():
    rows = table(right=(0.8, 0.83))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from baycomp.single import CorrelatedTTest
    found = compare_fold_predictions(rows, **FAST)
    by = {arm: np.array([row[arm] for row in found["folds"]["rows"]]) for arm in ("baseline", "mrl")}
    theirs = CorrelatedTTest(by["baseline"], by["mrl"], rope=0.03, runs=REPEATS).probs()
    assert [found["bayes"][f"p_{k}"] for k in ("worse", "equivalent", "better")] == pytest.approx(theirs, abs=1e-9)


def test_compare_fold_predictions__secondary_is_one_hold_out_of_the_first_repeat():
    rows = table()
    first = [{**row, "fold": 0} for row in rows if row["repeat"] == "0"]
    told = {k: FAST[k] for k in ("metric", "margin", "n_resamples")}
    pooled, found = compare_predictions(first, **told), compare_fold_predictions(rows, **FAST)
    for key in ("secondary", "flips", "n"):
        assert found[key] == pooled[key]
    for arm in ("baseline", "mrl"):
        assert found["arms"][arm]["confusion"] == pooled["arms"][arm]["confusion"]
        assert found["arms"][arm]["per_class"] == pooled["arms"][arm]["per_class"]


def test_compare_fold_predictions__verdicts():
    assert compare_fold_predictions(table(2000, (0.7, 0.85)), **FAST)["verdict"] == "superior"
    assert compare_fold_predictions(table(2000, (0.85, 0.7)), **FAST)["verdict"] == "inferior"
    open_ = compare_fold_predictions(table(100), **FAST)
    assert open_["verdict"] == "inconclusive"
    assert open_["more_images"] > 0


def test_compare_fold_predictions__few_disagreements_widen_the_interval():
    rows = table(300, same=0.99, seed=3)
    found = compare_fold_predictions(rows, **FAST)
    first = [{**row, "fold": 0} for row in rows if row["repeat"] == "0"]
    one = compare_predictions(first, **{k: FAST[k] for k in ("metric", "margin", "n_resamples")})["difference"]
    assert one["method"] == "newcombe"
    assert found["method"] == "corrected_t_widened"
    assert found["difference"]["low"] <= min(one["low"], found["test"]["low"] or 0)
    assert found["difference"]["high"] >= max(one["high"], found["test"]["high"] or 0)
    assert any("was widened to hold Newcombe's" in text for text in found["warnings"])


def test_compare_fold_predictions__equal_folds_with_many_disagreements_name_the_bootstrap():
    """In every fold of 40 images the second arm loses 3 and gains 5; so many disagreements are the bootstrap's."""
    rows = []
    for repeat, i, arm in itertools.product(range(REPEATS), range(40 * K), ("baseline", "mrl")):
        place, target = i // K, "ab"[i % 2]
        hit = not (place < 3 if arm == "mrl" else 3 <= place < 8)
        p = 0.9 if hit == (target == "b") else 0.1
        rows.append({"image": f"{i}.png", "target": target, "arm": arm, "repeat": str(repeat), "fold": str(i % K)})
        rows[-1] |= {"seed": "0", "p_a": 1 - p, "p_b": p}
    found = compare_fold_predictions(rows, **FAST)
    assert found["test"]["p_value"] is None
    assert found["method"] == "corrected_t_widened"
    assert found["difference"]["low"] < found["difference"]["estimate"] < found["difference"]["high"]
    (said,) = [text for text in found["warnings"] if "of one repeat" in text]
    assert "the bootstrap's of one repeat" in said
    assert translated(Words("ja"), said)["key"] == "warning.one_repeat"


def test_compare_fold_predictions__equal_arms_are_not_certain():
    rows = table(300, same=1.0)
    found = compare_fold_predictions(rows, **FAST)
    assert found["test"]["p_value"] is None
    assert found["difference"]["estimate"] == 0
    assert found["difference"]["low"] < 0 < found["difference"]["high"]
    assert found["bayes"]["p_equivalent"] is None


def test_compare_fold_predictions__balanced_accuracy_and_groups():
    rows = table()
    groups = {f"{i}.png": i // 2 for i in range(200)}
    folds = {row["image"]: row["fold"] for row in rows if row["repeat"] == "0"}
    found = compare_fold_predictions(rows, **{**FAST, "metric": "balanced_accuracy"}, groups=groups)
    assert found["metric"] == "balanced_accuracy"
    assert found["unit"] == "group"
    assert len(folds) == found["n"] == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [r for r in rows if (r["repeat"], r["fold"]) != ("1", "3")], r"lacks the folds .*\(1, 3\)"),
        (lambda rows: [{**r, "fold": "7"} if r["fold"] == "3" else r for r in rows], r"\(0, 7\)"),
        (lambda rows: rows[2:], "exactly once a repeat"),
        (lambda rows: rows[1:], "scored by one arm only"),
        (lambda rows: [*rows, rows[0], rows[1]], "more than once"),
    ],
)
def test_compare_fold_predictions__refuses(change, message):
    with pytest.raises(DataError, match=message):
        compare_fold_predictions(change(table(60)), **FAST)


def test_compare_fold_predictions__wrong_metric():
    with pytest.raises(ConfigError, match="primary metric 'recall'"):
        compare_fold_predictions(table(60), **{**FAST, "metric": "recall"})


def test_decision_of__says_how_many_fits():
    class Rule:
        max_slowdown = 1.0

    measure = {"verdict": "faster", "latency_ratio": {"estimate": 0.8, "low": 0.78, "high": 0.83}}
    found = decision_of(plain(compare_fold_predictions(table(2000, (0.7, 0.85)), **FAST)), measure, Rule())
    assert found["decision"] == "go"
    assert found["reasons"][0].startswith("Over 10 fits an arm the mean accuracy is 8")
    assert found["reasons"][0].endswith("; 2,000 images).")
