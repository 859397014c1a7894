"""A linear probe: the best linear head on features that stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mrl.errors import DataError

STRENGTHS = (0.3, 0.1, 0.03, 0.01, 0.003)
"""The L2 strengths that are tried, as a share of the mean loss (scikit-learn's C is 1 / (strength * images))."""

_ABSENT = -20.0  # the logit of a class without a training image, beside the mean of the others


@dataclass(frozen=True)
class Probe:
    """A linear head that works on raw features: the standardisation is folded into it.

    Args:
        weight: (K, F) float32.
        bias: (K,) float32.
        strength: the L2 strength that won.
        losses: the validation loss of each strength that was tried.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    losses: dict[float, float]


def linear_probe(
    features_train: Tensor,
    y_train: Tensor,
    features_val: Tensor,
    y_val: Tensor,
    *,
    num_classes: int,
    weights_train: Tensor | None = None,
    weights_val: Tensor | None = None,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Probe:
    """Fits a softmax regression on standardised features; the L2 strength is the one with the lowest validation loss.

    logits = W (f - mean) / std + b, returned as W' = W / std and b' = b - W' mean. Choosing by loss, not by the score,
    keeps the score that is read on the validation side afterwards nearly free of that choice.
    Nothing is drawn at random. A strength that has not converged after 500 iterations competes as it is: stopping early
    only regularises it further.

    Args:
        features_train: features of the training images.
        y_train: their labels, 0 to K - 1.
        features_val: features of the inner validation images.
        y_val: their labels.
        num_classes: K; a class without a training image is there, but never wins.
        weights_train: weight of each training image, or None for 1.
        weights_val: weight of each validation image in the loss that chooses, or None for 1.
        strengths: L2 strengths to try, as a share of the mean loss: large is flat, small fits the training images.

    Shape:
        features (N, F), labels (N,), weight (K, F).

    Raises:
        DataError: fewer than two classes among the training labels.

    Example:
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> x[:, 1] += 8 * y
        >>> probe = linear_probe(x, y, x, y, num_classes=2)
        >>> bool(((x @ probe.weight.T + probe.bias).argmax(1) == y).all())
        True
    """
    x, y = features_train.double().numpy(), y_train.numpy()
    present = np.unique(y)
    if len(present) < 2:
        raise DataError("linear_probe: the training side has fewer than 2 classes; give more images or another --seed.")
    mean, std = x.mean(0), x.std(0)
    std[std < 1e-6 * max(1.0, float(np.abs(mean).max()))] = 1.0  # what is constant must not be blown up
    weights = None if weights_train is None else weights_train.double().numpy()
    x = ((x - mean) / std).astype(np.float32)
    losses: dict[float, float] = {}
    best: Probe | None = None
    for strength, coef, intercept in _path(x, y, weights, strengths):
        weight, bias = _fold(coef, intercept, mean, std, present, num_classes)
        losses[strength] = _loss(features_val, y_val, weight, bias, weights_val)
        if best is None or losses[strength] < losses[best.strength]:
            best = Probe(weight, bias, strength, losses)
    return best


def _path(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray | None, strengths: tuple[float, ...]
) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Yields (strength, coef, intercept), strongest first, each starting from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=500, tol=1e-3, warm_start=True)
    for strength in sorted(strengths, reverse=True):
        model.set_params(C=1.0 / (strength * len(x)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings(
                "ignore", "The number of unique classes", UserWarning
            )  # there are K, few images or not
            model.fit(x, y, sample_weight=weights)
        yield strength, model.coef_.astype(np.float64), model.intercept_.astype(np.float64)


def _fold(
    coef: np.ndarray, intercept: np.ndarray, mean: np.ndarray, std: np.ndarray, present: np.ndarray, num_classes: int
) -> tuple[Tensor, Tensor]:
    """A head for all K classes on raw features, from one for the classes present on standardised ones."""
    if len(coef) == 1:  # two classes: one row of log-odds, shared between the two
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    coef = coef / std
    intercept = intercept - coef @ mean
    weight = np.tile(coef.mean(0), (num_classes, 1))  # an absent class follows the others' mean, far below it
    bias = np.full(num_classes, intercept.mean() + _ABSENT)
    weight[present], bias[present] = coef, intercept
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def _loss(features: Tensor, y: Tensor, weight: Tensor, bias: Tensor, weights: Tensor | None) -> float:
    """Weighted mean cross-entropy, in float64."""
    losses = torch.nn.functional.cross_entropy((features @ weight.T + bias).double(), y, reduction="none")
    weights = torch.ones_like(losses) if weights is None else weights.double()
    return float((weights * losses).sum() / weights.sum())
