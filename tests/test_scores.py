import math

import numpy as np
import pytest

from mrl.errors import ConfigError
from mrl.scores import (
    METRICS,
    Scorer,
    accuracy,
    auroc,
    balanced_accuracy,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    score_all,
)


def make(n=90, k=3, seed=0, digits=None):
    rng = np.random.default_rng(seed)
    target = np.r_[np.arange(k), rng.integers(k, size=n - k)]
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), target] += 1
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    return target, p if digits is None else np.round(p, digits)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_score_all__equals_torchmetrics(k):
    import torch
    from torchmetrics.functional import classification as tm

    target, p = make(k=k)
    y, q = torch.tensor(target), torch.tensor(p)
    expected = {
        "accuracy": tm.multiclass_accuracy(q, y, k, average="micro"),
        "balanced_accuracy": tm.multiclass_accuracy(q, y, k, average="macro"),
        "macro_f1": tm.multiclass_f1_score(q, y, k, average="macro"),
        "auroc": tm.binary_auroc(q[:, 1], y) if k == 2 else tm.multiclass_auroc(q, y, k, average="macro"),
        "ece": tm.multiclass_calibration_error(q, y, k, n_bins=15, norm="l1"),
    }
    assert score_all(target, p) == pytest.approx({name: float(v) for name, v in expected.items()}, abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("digits", [None, 1])
def test_scorer__weights_of_one_equal_score_all(k, digits):
    target, p = make(k=k, digits=digits)
    found = Scorer(target, p)(np.ones((1, len(target))))[0]
    assert dict(zip(METRICS, found, strict=True)) == pytest.approx(score_all(target, p), abs=1e-12)


@pytest.mark.parametrize("k", [2, 4])
def test_scorer__weights_are_repetitions(k):
    target, p = make(n=40, k=k, digits=1)  # one digit: many ties
    rng = np.random.default_rng(1)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=20).astype(float)
    weights[:, :k] += 1  # no class is lost
    found = Scorer(target, p)(weights)
    for row, counts in zip(found, weights.astype(int), strict=True):
        expected = score_all(np.repeat(target, counts), np.repeat(p, counts, axis=0))
        assert dict(zip(METRICS, row, strict=True)) == pytest.approx(expected, abs=1e-12)


def test_scorer__class_absent_from_a_sample():
    target, p = make(n=30, k=3)
    weights = (target != 2).astype(float)[None]
    found = dict(zip(METRICS, Scorer(target, p)(weights)[0], strict=True))
    kept = target != 2
    prediction = p[kept].argmax(1)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy(target[kept], prediction))
    assert found["macro_f1"] == pytest.approx(macro_f1(target[kept], prediction))
    assert math.isnan(found["auroc"])


def test_accuracy__and_balanced_accuracy_equal_sklearn():
    from sklearn.metrics import balanced_accuracy_score

    target, p = make()
    assert accuracy(target, p.argmax(1)) == np.mean(target == p.argmax(1))
    assert balanced_accuracy(target, p.argmax(1)) == pytest.approx(balanced_accuracy_score(target, p.argmax(1)))


def test_auroc__either_column_of_two_gives_the_same():
    target, p = make(k=2)
    assert auroc(target, p) == pytest.approx(auroc(1 - target, p[:, ::-1]))


def test_auroc__undefined_without_a_class():
    target, p = make(k=3)
    assert math.isnan(auroc(np.zeros_like(target), p))
    assert math.isnan(auroc(np.where(target == 2, 1, target), p))


def test_expected_calibration_error__edges():
    certain = np.array([[0.0, 1.0], [0.0, 1.0]])
    assert expected_calibration_error(np.array([1, 1]), certain) == 0
    assert expected_calibration_error(np.array([0, 0]), certain) == 1
    # 1.0 and 0.95 share the last of 15 bins: |1 - 1 + 0 - 0.95| / 2
    assert expected_calibration_error(np.array([1, 0]), np.array([[0.0, 1.0], [0.05, 0.95]])) == pytest.approx(0.475)
    # a bin has its lower edge: 0.5 and 0.55 share one of two bins, 0.45 has its own
    p = np.array([[0.5, 0.25, 0.25], [0.55, 0.25, 0.2], [0.45, 0.3, 0.25]])
    assert expected_calibration_error(np.array([0, 1, 0]), p, n_bins=2) == pytest.approx((0.05 + 0.55) / 3)


def test_confusion_matrix__rows_are_the_truth_and_absent_classes_stay():
    assert confusion_matrix(np.array([0, 0, 2]), np.array([0, 2, 2]), 4).tolist() == [
        [1, 0, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("target", "p"), [(np.zeros(3), np.ones((2, 2))), (np.zeros(0), np.ones((0, 2))), (np.zeros(2), np.ones(2))]
)
def test_score_all__refuses(target, p):
    with pytest.raises(ConfigError):
        score_all(target, p)
