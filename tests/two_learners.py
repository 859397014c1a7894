"""Two small learners on generated data sets, trained and tested by repeated k-fold: correlated folds that are real."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Folds:
    """Two classes that show in two blocks of features; the first learner reads the one, the second the other.

    Args:
        n: images of a data set.
        skill_a: distance of the classes in the first block.
        skill_b: in the second; equal skills are the null hypothesis, by symmetry.
        k: folds.
        repeats: of them.
    """

    n: int
    skill_a: float = 0.5
    skill_b: float = 0.5
    k: int = 5
    repeats: int = 2
    width: int = 5

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        label = np.arange(n) % 2
        x = rng.normal(size=(2, n, self.width))
        for block, skill in enumerate((self.skill_a, self.skill_b)):
            x[block, :, 0] += skill * (2 * label - 1)
        return x, label


def right(train: np.ndarray, label: np.ndarray, test: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which test images the nearest class mean has right."""
    means = [train[label == c].mean(0) for c in (0, 1)]
    nearer = ((test - means[1]) ** 2).sum(-1) < ((test - means[0]) ** 2).sum(-1)
    return nearer == truth


def differences_of(folds: Folds, *, runs: int, seed: int) -> Iterator[np.ndarray]:
    """For each data set the k * repeats differences of accuracy, stratified folds, second learner minus first."""
    rng = np.random.default_rng(seed)
    for _ in range(runs):
        x, label = folds.draw(rng, folds.n)
        found = []
        for _ in range(folds.repeats):
            fold = np.empty(folds.n, dtype=int)
            for c in (0, 1):
                rows = np.flatnonzero(label == c)
                fold[rng.permutation(rows)] = np.arange(len(rows)) % folds.k
            for f in range(folds.k):
                out = fold == f
                a, b = (right(x[i, ~out], label[~out], x[i, out], label[out]).mean() for i in (0, 1))
                found.append(b - a)
        yield np.array(found)


def same_mean(folds: Folds, *, seed: int, also_disagreement: bool = False, sets: int = 400):
    """The true difference of expected accuracies at this size of the training side, from fresh data; and p_d."""
    rng, gaps, apart = np.random.default_rng(seed), [], []
    n_train = folds.n - folds.n // folds.k
    for _ in range(sets):
        x, label = folds.draw(rng, n_train)
        test, truth = folds.draw(rng, 1000)
        a, b = (right(x[i], label, test[i], truth) for i in (0, 1))
        gaps.append(b.mean() - a.mean())
        apart.append((a != b).mean())
    return (float(np.mean(gaps)), float(np.mean(apart))) if also_disagreement else float(np.mean(gaps))
