"""A run of several arms seen through one of them: the pages that compare two arms show the baseline and the arm decided for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mrl.decision import latency_of
from mrl.report.collect import RunFiles

NO_CALIBRATION = {"setting": None, "updates": 0, "seconds": 0.0, "n_images": 0, "restored": []}


def seen(run: RunFiles, data: Mapping[str, Any]) -> tuple[RunFiles, dict[str, Any]]:
    """The files and `report.json` with the arm decided for in the place of `mrl`; of a run of two arms as they are.

    `all_arms` in the second keeps every arm's numbers under its own name.

    Example:
        >>> from pathlib import Path
        >>> run = RunFiles(Path(), {}, "", {}, [], {}, {})
        >>> seen(run, {"arms": {}})[0] is run
        True
    """
    if not data.get("comparisons"):
        return run, dict(data)
    arm, base = data["arm"], "baseline"
    comparison, measure = run.comparison, run.measure
    one = next(found for found in comparison["comparisons"] if found["arm"] == arm)
    ratio, cost = latency_of(measure, arm)
    none = {"estimate": None, "low": None, "high": None}
    files = run.more.get(arm) or {"plan": run.plan, "calibration": run.calibration}
    swapped = arm == "mrl" or run.protocol["arm_settings"][arm]["swap"] != "none"
    calibration = files["calibration"] if swapped else NO_CALIBRATION
    missing = tuple(name for name in run.missing if name not in ("plan.json", "calibration.json"))
    if swapped:
        missing += tuple(f"{name}.json" for name in ("plan", "calibration") if files[name] is None)
    alike = replace(
        run,
        featured=arm,
        comparison={**comparison, **one, "arms": _two(comparison["arms"], arm), "folds": _folds(comparison, arm)},
        measure={
            **measure,
            "rows": [_row(row, arm) for row in measure.get("rows") or []],
            "arms": _two(measure.get("arms") or {}, arm),
            "million_images_hours": _two(measure.get("million_images_hours") or {}, arm),
            "end_to_end": _whole(measure.get("end_to_end"), arm),
        },
        fits=_two(run.fits, arm),
        metrics=_two(run.metrics, arm),
        plan=files["plan"] if swapped else None,
        calibration=calibration,
        missing=tuple(name.replace(f"arms/{arm}/", "arms/mrl/") for name in missing),
    )
    kept = {key: one.get(key) for key in ("difference", "more_images", "disagreement", "test", "bayes", "frozen")}
    told = {
        **data,
        **kept,
        "all_arms": data["arms"],
        "arms": {base: data["arms"][base], "mrl": data["arms"][arm]},
        "verdict": {"quality": one["verdict"], "cost": cost},
        "latency_ratio": ratio or none,
        "calibration": None if calibration is None else {key: calibration.get(key) for key in NO_CALIBRATION},
        "missing": list(alike.missing),
    }
    return alike, told


def _two(by_arm: Mapping[str, Any], arm: str) -> dict[str, Any]:
    return {as_: by_arm[name] for as_, name in (("baseline", "baseline"), ("mrl", arm)) if name in by_arm}


def _row(row: Mapping[str, Any], arm: str) -> dict[str, Any]:
    from mrl.stats import Interval, latency_verdict

    ratio = (row.get("ratios") or {}).get(arm)
    verdict = latency_verdict(Interval(**ratio, method="")) if ratio else None
    return {**row, "arms": _two(row.get("arms") or {}, arm), "ratio": ratio, "verdict": verdict}


def _whole(found: Mapping[str, Any] | None, arm: str) -> dict[str, Any] | None:
    return None if not found else {**found, "arms": _two(found.get("arms") or {}, arm)}


def _folds(comparison: Mapping[str, Any], arm: str) -> dict[str, Any] | None:
    found = comparison.get("folds")
    if not found:
        return None
    rows = [{**row, "mrl": row[arm], "difference": row[arm] - row["baseline"]} for row in found["rows"]]
    return {**found, "rows": rows}
