"""Scores of classification: accuracy, balanced accuracy, macro-F1, AUROC, calibration error, confusion matrix.

`Scorer` gives the same scores of many weighted samples at once, which is what the bootstrap needs.
"""

from __future__ import annotations

import math

import numpy as np

from mrl.errors import ConfigError

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
N_BINS = 15


def accuracy(target: np.ndarray, prediction: np.ndarray) -> float:
    """Share of images whose predicted class is the true one.

    Example:
        >>> accuracy(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]))
        0.75
    """
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(target, prediction))


def balanced_accuracy(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean over the classes that occur in `target` of the share of their images that are right.

    Example:
        >>> balanced_accuracy(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0])).__round__(4)
        0.8333
    """
    from sklearn.metrics import recall_score

    return float(recall_score(target, prediction, labels=np.unique(target), average="macro"))


def macro_f1(target: np.ndarray, prediction: np.ndarray) -> float:
    """Mean over the classes that occur in `target` or `prediction` of F1 = 2 tp / (2 tp + fp + fn).

    Example:
        >>> macro_f1(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0])).__round__(4)
        0.7333
    """
    from sklearn.metrics import f1_score

    return float(f1_score(target, prediction, average="macro", zero_division=0.0))


def auroc(target: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve; ties count half. NaN where a class is absent from `target`.

    Two classes: the last column's probability ranks the images (classes are sorted by name; where the two columns add
    to 1 the other choice gives the same area). More: the unweighted mean of one class against the rest.

    Args:
        target: (n,) class indices.
        probabilities: (n, K).

    Example:
        >>> p = np.array([0.1, 0.4, 0.35, 0.8])
        >>> auroc(np.array([0, 0, 1, 1]), np.stack([1 - p, p], 1))
        0.75
    """
    from sklearn.metrics import roc_auc_score

    target, probabilities = _checked(target, probabilities)
    k = probabilities.shape[1]
    if len(np.unique(target)) < k:
        return math.nan
    columns = [1] if k == 2 else range(k)
    return float(np.mean([roc_auc_score(target == j, probabilities[:, j]) for j in columns]))


def expected_calibration_error(target: np.ndarray, probabilities: np.ndarray, n_bins: int = N_BINS) -> float:
    """Expected calibration error of the predicted class: sum_b n_b/n * |accuracy_b - confidence_b|.

    Bins are equally wide over 0..1, each with its lower edge and without its upper one; 1.0 is in the last. It is never
    negative, so on few images it lies above that of the population.

    Args:
        target: (n,) class indices.
        probabilities: (n, K).
        n_bins: number of bins.

    Reference:
        Guo et al. (2017), On calibration of modern neural networks; torchmetrics' `calibration_error` with norm l1, but
        for a bin of its own that it gives to 1.0.

    Example:
        >>> expected_calibration_error(np.array([1, 0]), np.array([[0.1, 0.9], [0.3, 0.7]])).__round__(4)
        0.4
    """
    target, probabilities = _checked(target, probabilities)
    gap, bins = _calibration_gaps(target, probabilities, n_bins)
    return float(np.abs(np.bincount(bins, weights=gap, minlength=n_bins)).sum() / len(target))


def confusion_matrix(target: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (K, K): rows are the truth, columns the prediction.

    Example:
        >>> confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 0]), 2).tolist()
        [[1, 0], [1, 1]]
    """
    from sklearn.metrics import confusion_matrix as count

    return count(target, prediction, labels=np.arange(num_classes))


def score_all(target: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Every score of `METRICS`; AUROC is NaN where it is not defined.

    Example:
        >>> sorted(score_all(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]])))
        ['accuracy', 'auroc', 'balanced_accuracy', 'ece', 'macro_f1']
    """
    target, probabilities = _checked(target, probabilities)
    prediction = probabilities.argmax(1)
    return {
        "accuracy": accuracy(target, prediction),
        "balanced_accuracy": balanced_accuracy(target, prediction),
        "macro_f1": macro_f1(target, prediction),
        "auroc": auroc(target, probabilities),
        "ece": expected_calibration_error(target, probabilities),
    }


class Scorer:
    """The scores of `METRICS`, of R weighted samples of the same images at once.

    A weight says how often an image is in the sample; with all weights 1 it equals `score_all`.

    Args:
        target: (n,) class indices.
        probabilities: (n, K).
        n_bins: bins of the calibration error.

    Shape:
        weights (R, n) -> (R, 5), columns in the order of `METRICS`.

    Example:
        >>> t, p = np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> Scorer(t, p)(np.array([[1.0, 1, 1], [1, 2, 0]]))[:, 0].round(3).tolist()
        [0.667, 1.0]
    """

    def __init__(self, target: np.ndarray, probabilities: np.ndarray, n_bins: int = N_BINS):
        target, probabilities = _checked(target, probabilities)
        self.num_classes = probabilities.shape[1]
        prediction = probabilities.argmax(1)
        truth = np.eye(self.num_classes)[target]
        self._truth, self._answer = truth, np.eye(self.num_classes)[prediction]
        self._hit = truth * (target == prediction)[:, None]
        gap, bins = _calibration_gaps(target, probabilities, n_bins)
        self._gaps = np.eye(n_bins)[bins] * gap[:, None]
        self._rankings = [
            _ranking(probabilities[:, j], target == j)
            for j in ([1] if self.num_classes == 2 else range(self.num_classes))
        ]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Scores (R, 5) of weights (R, n); NaN where a sample does not define one."""
        hits, support, answered = weights @ self._hit, weights @ self._truth, weights @ self._answer  # (R, K) each
        total = support.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            recall, f1 = hits / support, 2 * hits / (support + answered)
        return np.stack(
            [
                hits.sum(1) / total,
                _row_mean(recall),
                _row_mean(f1),
                np.mean([_weighted_auroc(weights, *ranking) for ranking in self._rankings], axis=0),
                np.abs(weights @ self._gaps).sum(1) / total,
            ],
            axis=1,
        )


def _row_mean(values: np.ndarray) -> np.ndarray:
    """The mean of every row over the classes that are defined there (0 / 0 is not)."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(1) / known.sum(1)


def _ranking(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of the images by score, whether each is positive, and where each run of equal scores starts."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    return order, positive[order].astype(float), starts


def _weighted_auroc(weights: np.ndarray, order: np.ndarray, positive: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(R,) areas: sum of w+ * (w- below + half of w- tied), over all w+ times all w-."""
    ordered = weights[:, order]
    ups = ordered * positive
    ups, downs = np.add.reduceat(ups, starts, axis=1), np.add.reduceat(ordered - ups, starts, axis=1)
    below = np.cumsum(downs, axis=1)
    n_up, n_down = ups.sum(1), below[:, -1].copy()
    below -= downs / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.einsum("rn,rn->r", ups, below) / (n_up * n_down)


def _calibration_gaps(target: np.ndarray, probabilities: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Each image's (right or wrong) - confidence, and the bin of its confidence."""
    confidence = probabilities.max(1)
    edges = np.linspace(0, 1, n_bins + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, n_bins - 1)
    return (probabilities.argmax(1) == target) - confidence, bins


def _checked(target: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target, probabilities = np.asarray(target), np.asarray(probabilities, dtype=float)
    if probabilities.ndim != 2 or target.shape != probabilities.shape[:1] or len(target) == 0:
        raise ConfigError(
            f"scores: targets {target.shape} and probabilities {probabilities.shape}; give (n,) and (n, K) with n >= 1."
        )
    return target.astype(int), probabilities
