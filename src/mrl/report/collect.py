"""Reads a finished run folder and puts its numbers side by side; computes none of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError
from mrl.run import plain, read_csv, read_json
from mrl.tuned import tuned_warnings

ARMS = ("baseline", "mrl")
_LATENCY = ("latency_ms_median", "latency_ms_p95", "latency_ms_p99", "throughput_img_s")
_CURVE = ("metric", "alpha", "k", "n_folds", "left_out", "scope", "sizes")
_COST = ("params_m", "gmacs", "peak_memory_mb", "file_mb")
_FIT = (
    "updates",
    "epochs",
    "best_update",
    "updates_to_95",
    "linear_probe_val",
    "below_linear_probe",
    "stopped_early",
    "images_seen",
    "trainable_params_m",
    "precision",
    "device",
    "n_fits",
)


@dataclass(frozen=True)
class RunFiles:
    """The files of a run as they lie in its folder; what is not there is None or empty, and named in `missing`."""

    out: Path
    protocol: Mapping[str, Any]
    protocol_text: str
    audit: Mapping[str, Any]
    split: Sequence[Mapping[str, str]]
    comparison: Mapping[str, Any]
    measure: Mapping[str, Any]
    fits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    export: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    tune: Mapping[str, Any] | None = None
    curve: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()
    more: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # plan and calibration of swapped arms beside mrl
    featured: str = "mrl"  # the arm that stands in the place of mrl (`report.seen`)
    own_calibration: Mapping[str, Any] | None = None  # of mrl itself, whichever arm is featured

    @property
    def home(self) -> str:
        """The folder inside the run where the arms lie that are measured and exported; "" is the run itself."""
        return home_of(self.protocol)

    def decisive(self) -> Mapping[str, Any]:
        """The row of `measure.json` that the decision rests on, or an empty one."""
        rows = self.measure.get("rows") or []
        return next((row for row in rows if row.get("decides")), {})


def read_run(out: str | Path) -> RunFiles:
    """Reads all files of a run.

    Args:
        out: the run folder.

    Raises:
        ConfigError: a file without which there is no decision is not there, with the verb that writes it.
    """
    out = Path(out)
    if not out.is_dir():
        raise ConfigError(f"{out}: not a run folder; `mrl poc --out {out}` makes one.")
    needed = {
        "protocol.yaml": "mrl poc",
        "audit.json": "mrl audit",
        "split.csv": "mrl split",
        "comparison.json": "mrl compare",
        "measure.json": "mrl measure",
    }
    for name, verb in needed.items():
        if not (out / name).is_file():
            raise ConfigError(f"{out / name}: not found, and the report needs it; run `{verb} --out {out}` first.")
    text = (out / "protocol.yaml").read_text(encoding="utf-8")
    protocol = _yaml(text, out / "protocol.yaml")
    fits, curves, lacking = _fits(out, protocol)
    others = {name: _optional(out / f"{name}.json") for name in ("plan", "calibration", "export", "evaluation")}
    missing = [f"{name}.json" for name, value in others.items() if value is None]
    missing += lacking
    more = {
        arm: {name: _optional(out / "arms" / arm / f"{name}.json") for name in ("plan", "calibration")}
        for arm in protocol.get("arm_settings") or {}
    }
    missing += [name for name in ("predictions.csv",) if not (out / name).is_file()]
    return RunFiles(
        out=out,
        protocol=protocol,
        protocol_text=text,
        audit=read_json(out / "audit.json"),
        split=read_csv(out / "split.csv"),
        comparison=read_json(out / "comparison.json"),
        measure=read_json(out / "measure.json"),
        fits={arm: value or {} for arm, value in fits.items()},
        metrics=curves,
        missing=tuple(missing),
        more=more,
        own_calibration=others["calibration"],
        tune=_optional(out / "tune" / "tune.json"),  # no run needs one, so it is never missing
        curve=_optional(out / "curve.json"),  # nor does any need this
        **others,
    )


def home_of(protocol: Mapping[str, Any]) -> str:
    """Where in a run the arms lie that are measured and exported, with a slash at the end; "" is the run itself.

    Example:
        >>> home_of({}), home_of({"folds": {"k": 5, "repeats": 2, "n_frozen": 0}})
        ('', 'folds/r0f0/')
    """
    folds = protocol.get("folds")
    if not folds:
        return ""
    return "folds/last/" if folds.get("n_frozen") else "folds/r0f0/"


def _fits(out: Path, protocol: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The record and the curve of each arm's fit, or of all its fits and of one of them; and which files are not there."""
    home, missing, arms = home_of(protocol), [], protocol.get("arms") or ARMS
    if home:
        together = (_optional(out / "fits.json") or {}).get("arms") or {}
        fits: dict[str, Any] = {arm: together.get(arm) for arm in arms}
        missing += ["fits.json"] if None in fits.values() else []
        inner = "inner/"
    else:
        fits, inner = {arm: _optional(out / "arms" / arm / "fit.json") for arm in arms}, ""
        missing += [f"arms/{arm}/fit.json" for arm, value in fits.items() if value is None]
    curves = {arm: _lines(out / f"{home}arms/{arm}/{inner}metrics.jsonl") for arm in arms}
    missing += [f"arms/{arm}/metrics.jsonl" for arm, value in curves.items() if not value]
    return fits, curves, missing


def collect_report(out: str | Path) -> dict[str, Any]:
    """The content of `report.json`: every number of the report that a program would want, and the decision.

    Scores are fractions; `difference` is MRL minus baseline, `latency_ratio` MRL divided by baseline (below 1 is
    faster); what was not measured is None. The decision comes from `mrl.compare.decision_of`; nothing is computed here.

    Args:
        out: a run folder with at least `protocol.yaml`, `audit.json`, `split.csv`, `comparison.json`, `measure.json`.

    Raises:
        ConfigError: one of them is not there.

    Example:
        >>> import tempfile
        >>> try:
        ...     collect_report(tempfile.mkdtemp())
        ... except ConfigError as error:
        ...     print("run `mrl poc" in str(error))
        True
    """
    return assemble(read_run(out))


def assemble(run: RunFiles) -> dict[str, Any]:
    """`report.json` from files that were read already."""
    from mrl.compare import decision_of
    from mrl.protocol import load_protocol, was_changed

    decided = decision_of(run.comparison, run.measure, load_protocol(run.out))
    comparison, measure = run.comparison, run.measure
    environment = measure.get("environment") or comparison.get("environment") or {}
    sha256 = run.protocol.get("sha256") or comparison.get("protocol_sha256")
    return plain(
        {
            "schema": 1,
            "decision": decided["decision"],
            "reasons": list(decided["reasons"]),
            "reason_keys": list(decided.get("reason_keys") or []),
            "verdict": {"quality": comparison["verdict"], "cost": measure.get("verdict")},
            "metric": comparison["metric"],
            "margin": comparison["margin"],
            "alpha": comparison["alpha"],
            "arms": {arm: _arm(run, arm) for arm in run.protocol.get("arms") or ARMS},
            "difference": comparison["difference"],
            "latency_ratio": measure.get("latency_ratio") or {"estimate": None, "low": None, "high": None},
            "exported_arm": (run.export or {}).get("arm"),
            "mde": run.protocol.get("mde"),
            "more_images": comparison.get("more_images"),
            "disagreement": comparison.get("disagreement"),
            **{key: comparison[key] for key in ("folds", "test", "bayes", "frozen") if comparison.get(key)},
            **({"curve": {key: run.curve[key] for key in _CURVE if key in run.curve}} if run.curve else {}),
            "calibration": _calibration(run),
            "skipped": list(run.audit.get("skipped") or []),
            "bad_files": list(run.audit.get("bad") or []),
            "warnings": warnings_of(run),
            "missing": list(run.missing),
            "protocol_sha256": sha256,
            "protocol_changed": ["protocol.yaml"] * was_changed(run.out) + other_protocols(run),
            "environment": environment,
            **_many(run, decided),
        }
    )


def _many(run: RunFiles, decided: Mapping[str, Any]) -> dict[str, Any]:
    """With more than two arms: the arm that the decision is about, and every arm's comparison; else nothing."""
    from mrl.decision import latency_of

    if not run.comparison.get("comparisons"):
        return {}
    found = []
    for one in run.comparison["comparisons"]:
        ratio, cost = latency_of(run.measure, one["arm"])
        kept = {key: value for key, value in one.items() if key not in ("secondary", "flips", "verdict")}
        verdict = {"quality": one["verdict"], "cost": cost}
        found.append({**kept, "verdict": verdict, "latency_ratio": ratio, "decision": decided["decisions"][one["arm"]]})
    return {"arm": decided["arm"], "comparisons": found, "multiplicity": run.comparison["multiplicity"]}


def _arm(run: RunFiles, arm: str) -> dict[str, Any]:
    scored = (run.comparison.get("arms") or {}).get(arm) or {}
    timed = (run.decisive().get("arms") or {}).get(arm) or {}
    cost = (run.measure.get("arms") or {}).get(arm) or {}
    fit = run.fits.get(arm) or {}
    probe = scored.get("linear_probe")
    if probe is None:
        probe = (((run.evaluation or {}).get("arms") or {}).get(arm) or {}).get("linear_probe")
    return {
        **{key: scored.get(key) for key in ("estimate", "low", "high", "n", "interval_method")},
        "metrics": scored.get("metrics") or {},
        "intervals": scored.get("intervals") or {},
        "linear_probe": probe,
        **{key: timed.get(key) for key in _LATENCY},
        **{key: cost.get(key) for key in _COST},
        "million_images_hours": (run.measure.get("million_images_hours") or {}).get(arm),
        "fit_seconds": fit.get("seconds"),
        "best_val_score": fit.get("best_score"),
        **{key: fit.get(key) for key in _FIT},
    }


def _calibration(run: RunFiles) -> dict[str, Any] | None:
    if run.calibration is None:
        return None
    return {key: run.calibration.get(key) for key in ("setting", "updates", "seconds", "n_images", "restored")}


def warnings_of(run: RunFiles) -> list[str]:
    """Every warning of the run, once, in the order of the steps.

    Example:
        >>> files = dict(protocol={}, protocol_text="", split=[], measure={})
        >>> warnings_of(RunFiles(Path(), audit={"warnings": ["no groups"]}, comparison={"warnings": ["no groups"]}, **files))
        ['no groups']
    """
    found = [*tuned_warnings(run.protocol.get("tuned") or {}), *(run.audit.get("warnings") or [])]
    found += [f"{arm}: {text}" for arm, fit in run.fits.items() for text in (fit or {}).get("warnings") or []]
    found += list((run.calibration or {}).get("warnings") or [])
    found += list(run.comparison.get("warnings") or []) + list(run.measure.get("warnings") or [])
    return list(dict.fromkeys(found))


def other_protocols(run: RunFiles) -> list[str]:
    """The files that were written under another protocol than the one in the folder.

    Example:
        >>> files = dict(protocol_text="", audit={}, split=[], measure={})
        >>> other_protocols(RunFiles(Path(), {"sha256": "a"}, comparison={"protocol_sha256": "b"}, **files))
        ['comparison.json']
    """
    own = run.protocol.get("sha256")
    files: dict[str, Mapping[str, Any] | None] = {
        "comparison.json": run.comparison,
        "measure.json": run.measure,
        "plan.json": run.plan,
        "calibration.json": run.calibration,
        "export.json": run.export,
        "evaluation.json": run.evaluation,
        "curve.json": run.curve,
        **{f"arms/{arm}/fit.json": fit for arm, fit in run.fits.items()},
    }
    return [name for name, data in files.items() if data and data.get("protocol_sha256") not in (None, own)]


def _optional(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    loaded = yaml.safe_load(text)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: not a mapping; restore the file as `mrl poc` wrote it.")
    return loaded
