"""Learning curves of a run of folds: the same procedure on nested parts of the training side, tested on the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mrl import folds
from mrl.data import SplitRow
from mrl.data.subsets import SHARES, nested_subsets
from mrl.errors import ConfigError
from mrl.evaluate import read_predictions
from mrl.executor import Executor, Task
from mrl.fit_config import FitConfig, planned_updates
from mrl.run import plain, read_json, refuse_existing, say, write_json
from mrl.scores import score_all
from mrl.stats import nadeau_bengio
from mrl.steps import INNER
from mrl.swap.calibrate import FEWEST
from mrl.workspace import FoldSpace, Workspace, spaces_of

CURVE_FILE = "curve.json"
FOLDER = "curve"
HERE = Executor()
SCOPE = (
    "Every point is the whole procedure (calibration, choice on an inner validation side, fit) on a part of each training side "
    "of the first repeat, with as many updates as the whole side gets, tested on the same images as the whole. Parts are "
    "nested, so the points of a curve are not independent of each other. Intervals are the corrected resampled t's over the folds, "
    "point by point: no correction for looking at several sizes. Nothing here decides."
)


class SubsetSpace(FoldSpace):
    """A part of a fold's training side with that fold's test side, in `folds/r<repeat>f<fold>/curve/<percent>`.

    Args:
        fold: the fold.
        share: of its training side, in whole percents.

    Example:
        >>> SubsetSpace(FoldSpace(Workspace("runs/mine"), 0, 3), 0.4).out.as_posix()
        'runs/mine/folds/r0f3/curve/040'
    """

    def __init__(self, fold: FoldSpace, share: float) -> None:
        super().__init__(fold.run, fold.repeat, fold.fold)
        self.whole, self.share = fold, share
        self.out = fold.out / FOLDER / f"{round(100 * share):03d}"

    @property
    def name(self) -> str:
        """Such as r0f3/curve/040."""
        return f"{self.whole.name}/{FOLDER}/{self.out.name}"

    @cached_property
    def rows(self) -> list[SplitRow]:
        """The fold's split without what this part leaves out."""
        run = self.run
        parts = nested_subsets(self.whole.rows, run.units, shares=(self.share,), seed=run.protocol.seed)
        return parts[self.share]

    def budget(self, *sides: str, arm: str) -> FitConfig:
        """The arm's budget with the updates that the whole of these sides would get."""
        config = super().budget(*sides, arm=arm)
        return replace(config, min_updates=planned_updates(config, sum(row.split in sides for row in self.whole.rows)))


def curve_spaces(run: Workspace, shares: Sequence[float] = SHARES) -> list[FoldSpace]:
    """What a learning curve has to fit besides the run: the parts of each fold of the first repeat, small ones first.

    A share that leaves some fold too few training images to calibrate with is left out.

    Raises:
        ConfigError: a run without folds, or wrong shares: not rising, not above 0 and at most 1, or no whole percents.
    """
    if not run.protocol.folds:
        raise ConfigError(f"{run.out}: a learning curve needs folds; run `mrl poc` with --preset standard or full.")
    if not shares or list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] > 1:
        raise ConfigError(f"--shares {list(shares)}: give rising numbers above 0 and at most 1.")
    parts = [share for share in shares if round(share, 2) != share]
    if parts:
        raise ConfigError(f"--shares {parts}: a part is named by its whole percents; give shares such as 0.12 or 0.3.")
    first = [space for space in spaces_of(run) if isinstance(space, FoldSpace) and space.repeat == 0 <= space.fold]
    sizes = [[SubsetSpace(space, share) for space in first] for share in shares if share < 1]
    return [part for parts in sizes if all(map(_enough, parts)) for part in parts]


def _enough(space: FoldSpace) -> bool:
    return sum(row.split == "train" for row in space.rows) >= FEWEST


def fit_point(space: FoldSpace) -> None:
    """Fits all arms on one part of one fold, tests them once, and drops their weights; a killed one goes on."""
    for arm in space.protocol.arms:
        folds.fit_fold(space, arm)
    folds.score_fold(space)


def space_named(run: Workspace, name: str | None) -> Workspace:
    """The run, one of its folds, or a part of one, by its `name`.

    Raises:
        ConfigError: none of this name.
    """
    fold, _, part = (name or "").partition(f"/{FOLDER}/")
    found = folds.chosen(run, fold or None)[0]
    return SubsetSpace(found, int(part) / 100) if part else found


def point_task(out: str, name: str, tracker: str) -> None:
    """`fit_point` in a worker of its own; goes on where a killed worker stopped."""
    run = Workspace(out)
    run.tracker = tracker
    fit_point(space_named(run, name))


def curve_step(
    run: Workspace, *, shares: Sequence[float] = SHARES, executor: Executor = HERE, overwrite: bool = False
) -> dict[str, Any]:
    """Fits what a learning curve lacks and writes `curve.json`.

    Args:
        run: a run of folds whose first repeat is fitted and tested.
        shares: of the training side; 1 is the run's own fits.
        executor: where the fits run; a part of a fold, with all its arms, is one task.
        overwrite: replace a curve that is there; fits that are done are not made again.

    Returns:
        The file's content: `left_out`, the shares that are too small; `sizes`, one a share, with mean scores, differences to the first arm and their intervals, the
        generalisation gap (training minus inner validation score of the candidate that was kept), and `rows`, one a fold and share.

    Raises:
        ConfigError: a run without folds, folds that are not tested yet, shares too small, or a curve that is there.
    """
    path = refuse_existing(run.file(CURVE_FILE), overwrite)
    points = curve_spaces(run, shares)
    left_out = sorted({share for share in shares if share < 1} - {space.share for space in points})
    if left_out == list(shares):
        raise ConfigError(
            f"--shares {left_out}: a part would have fewer than {FEWEST} training images; give larger ones."
        )
    if left_out:
        say(f"learning curve without {left_out}: a part would have fewer than {FEWEST} training images.")
    whole = [s for s in spaces_of(run) if isinstance(s, FoldSpace) and s.repeat == 0 <= s.fold]
    shut = [space.out.name for space in whole if not folds.closed(space)]
    if shut:
        raise ConfigError(
            f"{run.out}: {len(shut)} folds are not tested yet ({', '.join(shut[:3])}); run `mrl fit` and `mrl evaluate` first."
        )
    open_ = [space for space in points if not folds.closed(space)]
    if executor.here:
        for i, space in enumerate(open_, len(points) - len(open_) + 1):
            say(f"learning curve {i}/{len(points)}: {space.out.name} % of fold {space.whole.name}")
            fit_point(space)
    else:
        told = {"out": str(run.out.resolve()), "tracker": run.tracker}
        executor.run(
            [Task(f"curve {space.name}", "mrl.curve:point_task", {**told, "name": space.name}) for space in open_]
        )
    for space in points:
        folds.score_fold(space)  # a killed run may have left weights behind
    rows = [point_of(space) for space in points]
    if 1.0 in shares:
        rows += [point_of(space) for space in whole]
    found = {**run.stamp(), "left_out": left_out, **summed(rows, arms=run.protocol.arms, metric=run.protocol.metric, k=run.protocol.folds["k"], alpha=run.protocol.alpha)}  # fmt: skip
    write_json(path, found)
    return found


def point_of(space: FoldSpace) -> dict[str, Any]:
    """What the fits of one fold and share gave: images, updates, and of each arm its test scores and its gap."""
    metric = space.protocol.metric
    arms: dict[str, dict[str, Any]] = {}
    for found in read_predictions(space.file("predictions.csv")):
        record = read_json(space.arm(found.arm) / "fit.json")
        scores = score_all(found.target_indices, found.probabilities)
        arms[found.arm] = {
            "score": scores[metric],
            "scores": scores,
            "updates": record["inner"]["updates"],
            "best_update": record["inner"]["best_update"],
            "updates_to_95": record["updates_to_95"],
            "gap": _gap(space.arm(found.arm) / INNER / "metrics.jsonl", record["inner"]["best_update"]),
            "seconds": record["seconds"],
        }
    n_train = sum(row.split in ("train", "val") for row in space.rows)
    share = space.share if isinstance(space, SubsetSpace) else 1.0
    return {"repeat": space.repeat, "fold": space.fold, "share": share, "n_train": n_train, "arms": arms}


def _gap(path: Path, update: int) -> float | None:
    """Training minus inner validation score of a candidate, as its log has them."""
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line["event"] == "validation" and line["update"] == update]
    if not kept or kept[-1]["train_score"] is None:
        return None
    return kept[-1]["train_score"] - kept[-1]["val_score"]


def summed(
    rows: Sequence[Mapping[str, Any]], *, arms: Sequence[str], metric: str, k: int, alpha: float = 0.05
) -> dict[str, Any]:
    """The content of a learning curve from its points; a pure function.

    Args:
        rows: of `point_of`: repeat, fold, share, n_train, and of each arm score, gap and updates.
        arms: names; differences are to the first.
        metric: what `score` is.
        k: folds that the images were divided into.
        alpha: of the intervals.

    Example:
        >>> rows = [
        ...     {"repeat": 0, "fold": f, "share": s, "n_train": 40, "arms": {
        ...         arm: {"score": 0.8 + 0.01 * f * (arm == "b"), "gap": 0.1, "updates": 9} for arm in "ab"}}
        ...     for s in (0.5, 1.0) for f in range(5)
        ... ]
        >>> found = summed(rows, arms=["a", "b"], metric="accuracy", k=5)
        >>> [round(size["differences"]["b"]["estimate"], 3) for size in found["sizes"]], found["n_folds"]
        ([0.02, 0.02], 5)
    """
    sizes = []
    for share in sorted({row["share"] for row in rows}):
        at = [row for row in rows if row["share"] == share]
        values = {arm: [row["arms"][arm]["score"] for row in at] for arm in arms}
        gaps = {arm: [row["arms"][arm]["gap"] for row in at if row["arms"][arm]["gap"] is not None] for arm in arms}
        differences = {arm: _interval(np.subtract(values[arm], values[arms[0]]), k, alpha) for arm in arms[1:]}
        sizes.append(
            {
                "share": share,
                "n_train": float(np.mean([row["n_train"] for row in at])),
                "updates": sorted({row["arms"][arm]["updates"] for row in at for arm in arms}),
                "arms": {
                    arm: {
                        **_interval(values[arm], k, alpha),
                        "gap": float(np.mean(gaps[arm])) if gaps[arm] else None,
                        "n_gaps": len(gaps[arm]),
                    }
                    for arm in arms
                },
                "differences": differences,
            }
        )
    n_folds = len({(row["repeat"], row["fold"]) for row in rows})
    return plain(
        {
            "metric": metric,
            "alpha": alpha,
            "k": k,
            "n_folds": n_folds,
            "scope": SCOPE,
            "sizes": sizes,
            "rows": list(rows),
        }
    )


def _interval(values: Sequence[float] | np.ndarray, k: int, alpha: float) -> dict[str, float]:
    if len(values) % k:  # not all folds: no correction that fits
        return {"estimate": float(np.mean(values)), "low": float("nan"), "high": float("nan")}
    found = nadeau_bengio(np.asarray(values, dtype=float), k, alpha)
    return {"estimate": found.estimate, "low": found.low, "high": found.high}
