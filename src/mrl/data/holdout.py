"""One stratified hold-out of units that cannot be divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrl.errors import DataError

TRIALS = 300
STEPS = 100_000
"""How many random orders of the units are tried, and how many units are looked at in all."""


@dataclass(frozen=True)
class Unit:
    """Images that stay together.

    Args:
        images: their names.
        counts: how many of them each class has.
        classes: the names of the classes.
    """

    images: tuple[str, ...]
    counts: tuple[int, ...]
    classes: tuple[str, ...]


def hold_out(units: Sequence[Unit], fraction: float, rng: np.random.Generator, *, leave: int, sides: str) -> list[Unit]:
    """Draws units whose images are as near as possible to `fraction` of each class.

    Units of one image are drawn at random, as many of each class as are missing: alone they make each class exact to
    one image. Units of several images come first: in a random order, each is taken if that brings the class shares and
    the total nearer to their target. The best of up to 300 orders is kept.

    Args:
        units: what is divided.
        fraction: the share of images to draw.
        rng: where chance comes from.
        leave: how many units of each class must stay behind.
        sides: for messages: what a class needs a unit each for.

    Raises:
        DataError: a class has too few units, or none of the draws has every class on both sides.

    Example:
        >>> units = [Unit((f"{n}.png",), (1, 0) if n % 2 else (0, 1), ("a", "b")) for n in range(16)]
        >>> held = hold_out(units, 0.25, np.random.default_rng(0), leave=1, sides="both")
        >>> np.sum([unit.counts for unit in held], axis=0).tolist()
        [2, 2]
    """
    counts = np.array([unit.counts for unit in units])
    totals, present = counts.sum(0), (counts > 0).sum(0)
    short = [f"{units[0].classes[k]} has {present[k]}" for k in np.flatnonzero(present <= leave)]
    if short:
        raise DataError(
            "too few independent units of a class (groups, or images that are no copies of each other): "
            f"{', '.join(short)}, and each class needs at least {leave + 1} (for {sides}); add images of other groups, "
            "or take the class out."
        )
    target = _targets(totals, fraction, leave)
    several = np.flatnonzero(counts.sum(1) > 1)
    alone = [np.flatnonzero((counts.sum(1) == 1) & (counts[:, k] == 1)) for k in range(counts.shape[1])]
    aim = fraction * counts[several].sum(0)
    best, lowest = np.zeros(0, dtype=np.int64), np.inf
    trials = max(20, min(TRIALS, STEPS // len(several))) if len(several) else 1
    for _ in range(trials):
        chosen = _approach(counts, rng.permutation(several), aim, totals)
        need = target - counts[chosen].sum(0)
        for k, of_class in enumerate(alone):
            chosen = np.concatenate([chosen, rng.permutation(of_class)[: max(0, need[k])]])
        cost = _cost(counts[chosen], target, totals, present - leave)
        if cost < lowest:
            best, lowest = chosen, cost
        if cost == 0:
            break
    if lowest >= 10:
        raise DataError(
            f"no division found that has every class on each side ({sides}); the groups are too large or too few: name "
            "smaller groups, or add images of other groups."
        )
    return [units[i] for i in np.sort(best)]


def _targets(totals: np.ndarray, fraction: float, leave: int) -> np.ndarray:
    """How many images of each class: rounded so that the total is right too, at least 1, leaving some behind."""
    exact = fraction * totals
    target = np.floor(exact).astype(np.int64)
    missing = int(np.floor(fraction * totals.sum() + 0.5)) - int(target.sum())
    order = np.argsort(-(exact - target), kind="stable")
    target[order[: max(0, missing)]] += 1
    return np.clip(target, 1, np.maximum(1, totals - leave))


def _approach(counts: np.ndarray, order: np.ndarray, aim: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Takes units in this order while each brings the sum nearer to `aim`."""
    scale = np.append(1 / np.maximum(totals, 1), 1 / totals.sum())
    gap = np.append(aim, aim.sum()) * scale
    chosen = []
    for unit in order:
        step = np.append(counts[unit], counts[unit].sum()) * scale
        if step @ step < 2 * (step @ gap):  # |gap - step| < |gap|
            gap = gap - step
            chosen.append(unit)
    return np.array(chosen, dtype=np.int64)


def _cost(held: np.ndarray, target: np.ndarray, totals: np.ndarray, most: np.ndarray) -> float:
    """How far the drawn units are from the target; 10 for each class that is missing on a side."""
    images, units = held.sum(0), (held > 0).sum(0)
    missing = np.count_nonzero((units < 1) | (units > most))
    shares = np.abs(images - target) / np.maximum(totals, 1)
    return float(shares.sum() + abs(images.sum() - target.sum()) / totals.sum() + 10 * missing)
