"""The verbs on all folds of a run: each fold is fitted, tested and closed on its own; then their predictions are joined."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from mrl import results, steps
from mrl.compare_folds import FROZEN_FILE
from mrl.errors import ConfigError
from mrl.evaluate import read_predictions, write_predictions
from mrl.executor import Executor, Task
from mrl.run import read_json, refuse_existing, say, write_json
from mrl.workspace import FoldSpace, Workspace, spaces_of

FITS_FILE = "fits.json"
SUMMED = ("seconds", "images_seen", "updates")


def chosen(run: Workspace, fold: str | None) -> list[Workspace]:
    """The run, or its folds, or the one of this name.

    Args:
        run: the run.
        fold: such as "r0f3", or "last"; None is all.

    Raises:
        ConfigError: a fold that is not there.
    """
    spaces = spaces_of(run)
    if fold is None:
        return spaces
    if not run.protocol.folds:
        raise ConfigError(f"--fold {fold}: this run has one hold-out and no folds; leave --fold out.")
    found = [space for space in spaces if space.out.name == fold]
    if not found:
        names = ", ".join(space.out.name for space in spaces[:6])
        raise ConfigError(
            f"--fold {fold}: not a fold of this run; use one of {names}{', ...' if len(spaces) > 6 else ''}."
        )
    return found


def fit_fold(space: Workspace, arm: str, *, overwrite: bool = False) -> None:
    """Fits one arm of a fold, unless it is done; a killed fit goes on where it stopped."""
    record = space.arm(arm) / "fit.json"
    if not overwrite and record.is_file() and (closed(space) or (space.arm(arm) / "model").is_dir()):
        say(f"fold {space.out.name}: {arm} is fitted already (--overwrite fits again)")
        return
    say(f"fold {space.out.name}: {arm}")
    if overwrite:
        for name in ("predictions.csv", "evaluation.json"):
            space.file(name).unlink(missing_ok=True)
    steps.fit_step(space, arm, overwrite=overwrite)


def fit_all(
    run: Workspace,
    spaces: Sequence[Workspace],
    arms: Sequence[str],
    executor: Executor,
    *,
    score: bool = False,
    overwrite: bool = False,
) -> None:
    """Fits arms of folds, or of a run with one hold-out, wherever the executor has room; the files do not depend on it.

    A fold is one task, with all its arms; without folds each arm is one.

    Args:
        run: the run.
        spaces: what to fit, of `chosen`.
        arms: which arms of each.
        executor: where.
        score: test and close each fold when its arms are done.
        overwrite: fit again.
    """
    if not executor.here:
        plan_all(run, arms)
    told = {"out": str(run.out.resolve()), "tracker": run.tracker, "score": score, "overwrite": overwrite}
    parts = [(at, list(arms)) for at in spaces] if run.protocol.folds else [(run, [arm]) for arm in arms]
    if executor.here:
        for at, those in parts:
            _fit_part(at, those, score=score, overwrite=overwrite)
        return
    executor.run(
        [
            Task(
                f"fold {at.out.name}" if run.protocol.folds else those[0],
                "mrl.folds:fit_task",
                {**told, "arms": those, "fold": at.out.name if run.protocol.folds else None},
            )
            for at, those in parts
        ]
    )


def plan_all(run: Workspace, arms: Sequence[str]) -> None:
    """Plans the swaps that are not planned yet: timed once, before workers have the machine busy."""
    for arm in arms:
        if run.arms[arm].swapped and not run.arm_file(arm, "plan.json").is_file():
            run.arm_file(arm, "plan.json").parent.mkdir(parents=True, exist_ok=True)
            steps.plan_step(run, run.new_classifier(arm).eval(), arm)


def fit_task(
    out: str, fold: str | None, arms: Sequence[str], tracker: str, *, score: bool = False, overwrite: bool = False
) -> None:
    """Fits arms of one fold of the run in `out`, in a worker of its own; goes on where a killed worker stopped."""
    run = Workspace(out)
    run.tracker = tracker
    _fit_part(chosen(run, fold)[0], arms, score=score, overwrite=overwrite)


def _fit_part(at: Workspace, arms: Sequence[str], *, score: bool, overwrite: bool) -> None:
    for arm in arms:
        if at.refits:
            fit_fold(at, arm, overwrite=overwrite)
        else:
            steps.fit_step(at, arm, overwrite=overwrite)
    if score and at.refits:
        score_fold(at)


def closed(space: Workspace) -> bool:
    """Whether a fold was tested: nothing of it is fitted or tested again."""
    return space.file("predictions.csv").is_file()


def score_fold(space: Workspace) -> None:
    """Tests the fitted arms of a fold once, and closes it; of its weights only those at the run's `home` stay."""
    if not closed(space):
        results.evaluate_step(space)
    keep = space.out == space.run.home if isinstance(space, FoldSpace) else True
    for arm in space.protocol.arms:
        folder = space.arm(arm)
        for name in ("start.safetensors", "best.safetensors", *(() if keep else ("model", "calibrated"))):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def join(run: Workspace, *, overwrite: bool = False) -> None:
    """Joins what the folds left: `predictions.csv` with repeat and fold, `evaluation.json`, `fits.json`, `calibration.json`.

    Raises:
        ConfigError: a fold that is not tested yet, or files that are there.
    """
    path = refuse_existing(run.file("predictions.csv"), overwrite)
    spaces = spaces_of(run)
    open_ = [space.out.name for space in spaces if not closed(space)]
    if open_:
        raise ConfigError(
            f"{run.out}: {len(open_)} folds are not tested yet ({', '.join(open_[:3])}); run `mrl fit` first."
        )
    for space in spaces:
        score_fold(space)  # a killed run may have left weights behind
    folds = [space for space in spaces if space.fold >= 0]
    if len(folds) < len(spaces):
        frozen = read_predictions(spaces[-1].file("predictions.csv"))
        run.file(FROZEN_FILE).unlink(missing_ok=True)
        write_predictions(run.file(FROZEN_FILE), frozen)
    parts = [read_json(space.file("evaluation.json"))["arms"] for space in folds]
    arms = {arm: _mean_probe([part[arm] for part in parts]) for arm in run.protocol.arms}
    write_json(run.file("evaluation.json"), {**run.stamp(), "arms": arms})
    at = next(i for i, space in enumerate(spaces) if space.out == run.home)
    fits = {arm: _effort([read_json(s.arm(arm) / "fit.json") for s in spaces], at) for arm in run.protocol.arms}
    write_json(run.file(FITS_FILE), {**run.stamp(), "arms": fits})
    for arm in run.protocol.arms:
        files = [space.arm_file(arm, "calibration.json") for space in spaces]
        calibrated = [read_json(file) for file in files if file.is_file()]
        if calibrated:
            sums = {key: sum(document[key] for document in calibrated) for key in ("seconds", "updates")}
            document = {**read_json(files[at]), **sums, "n_calibrations": len(calibrated)}
            write_json(run.arm_file(arm, "calibration.json"), document)
    found = [p for space in folds for p in read_predictions(space.file("predictions.csv"))]
    path.unlink(missing_ok=True)
    write_predictions(path, found)


def _mean_probe(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    probes = [part["linear_probe"] for part in parts]
    mean = None if None in probes else sum(probes) / len(probes)
    below = sum(bool(part["below_linear_probe"]) for part in parts)
    return {"linear_probe": mean, "below_linear_probe": below, "n_fits": len(parts)}


def _effort(records: Sequence[Mapping[str, Any]], at: int) -> dict[str, Any]:
    """One record for all fits of an arm: that of the fit at `home`, with the effort of all, and what each of them kept."""
    at_probe = sum(record["below_linear_probe"] for record in records)
    warnings = []
    if at_probe:
        warnings.append(
            f"in {at_probe} of {len(records)} fits no fine-tuned candidate reached the linear probe on the inner validation "
            "side, so the probe's head was kept"
        )
    return {
        **records[at],
        **{key: sum(record[key] for record in records) for key in SUMMED},
        "n_fits": len(records),
        "best_update": records[at]["inner"]["best_update"],
        "best_updates": [record["inner"]["best_update"] for record in records],
        "below_linear_probe": at_probe > len(records) / 2,
        "warnings": warnings,
    }
