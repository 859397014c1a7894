"""The verbs after training: predictions, comparison, cost, export and report, each from the files before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mrl.compare import compare
from mrl.decision import decision_of
from mrl.errors import ConfigError
from mrl.evaluate import evaluate_arm, write_evaluation, write_predictions
from mrl.export import export_model
from mrl.measure import measure_arms
from mrl.report import report
from mrl.run import read_json, refuse_existing, say, write_json
from mrl.workspace import ARMS, Workspace

PARITY_IMAGES = 256
MEASURE_SECONDS = 45.0  # that `mrl measure` takes, about
OTHER_SIZES = (224, 448, 896)  # pixels, measured beside the protocol's


def evaluate_step(space: Workspace, *, overwrite: bool = False) -> None:
    """Scores both fitted arms once on the test side; writes `predictions.csv` and `evaluation.json`."""
    path = refuse_existing(space.file("predictions.csv"), overwrite)
    images = space.image_set("test")
    found, parts = [], {}
    for arm in space.protocol.arms:
        say(f"predicting {len(images)} test images with {arm}")
        predictions, parts[arm] = evaluate_arm(space.fitted(arm), space.arm(arm), images, metric=space.protocol.metric)
        found.append(predictions)
        for warning in parts[arm]["warnings"]:
            say(warning)
    write_evaluation(space.file("evaluation.json"), parts, space.stamp())
    write_predictions(path, found)


def compare_step(space: Workspace, *, overwrite: bool = False) -> dict[str, Any]:
    """Compares the stored predictions; writes `comparison.json`."""
    found = compare(space.out, overwrite=overwrite)
    for arm, score in found["arms"].items():
        say(f"{arm}: {space.protocol.metric} {_percent(score)}")
    difference = found["difference"]
    points = ", ".join(f"{100 * difference[k]:+.1f}" for k in ("low", "high"))
    say(f"mrl - baseline: {100 * difference['estimate']:+.1f} points ({points}): {found['verdict']}")
    return found


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['estimate']:.1f} % ({100 * score['low']:.1f} to {100 * score['high']:.1f}), n = {score['n']}"


def measure_step(space: Workspace, *, overwrite: bool = False) -> dict[str, Any]:
    """Measures both fitted arms side by side; writes `measure.json`."""
    path = refuse_existing(space.file("measure.json"), overwrite)
    protocol = space.protocol
    test = space.image_set("test")
    models = {arm: space.fitted(arm) for arm in protocol.arms}
    images = torch.stack([test[i]["image"] for i in range(min(len(test), 32))])
    found = measure_arms(
        models,
        image_size=tuple(protocol.image_size),
        images=images,
        seed=protocol.seed,
        other_sizes=OTHER_SIZES,
        time_budget_s=MEASURE_SECONDS,
        files=[s.path for s in test.samples[:64]],
        preprocess=space.preprocess,
    )
    write_json(path, {**space.stamp(), **found})
    ratio = found["latency_ratio"]
    say(
        f"latency mrl / baseline: x{ratio['estimate']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}): {found['verdict']}"
    )
    return found


def decide_step(space: Workspace) -> dict[str, Any]:
    """The decision, from what is stored."""
    return decision_of(read_json(space.file("comparison.json")), read_json(space.file("measure.json")), space.protocol)


def export_step(space: Workspace, *, arm: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Exports the arm that was decided for, or `arm`, proved equal on real test images; writes `model.onnx` and `export.json`."""
    path = refuse_existing(space.file("model.onnx"), overwrite)
    if arm is None:
        arm = "mrl" if decide_step(space)["decision"] == "go" else "baseline"
    elif arm not in ARMS:
        raise ConfigError(f"--arm {arm}: unknown; use {' or '.join(ARMS)}.")
    protocol = space.protocol
    test = space.image_set("test")
    images = [test[i]["image"] for i in _spread(len(test), PARITY_IMAGES)]
    meta = {
        "arm": arm,
        "protocol_sha256": protocol.sha256(),
        "seed": protocol.seed,
        "model": protocol.model,
        "weights": protocol.weights,
        "data_terms": space.source.terms,
    }
    found = export_model(
        space.fitted(arm),
        path,
        preprocess=space.preprocess,
        classes=space.source.classes,
        images=images,
        meta=meta,
        overwrite=overwrite,
    )
    write_json(space.file("export.json"), found)
    parity = found["parity"]
    say(
        f"exported {arm} to {path}: equal on {parity['n_images']} test images (largest difference {parity['max_abs_diff']:.1e})."
    )
    return found


def _spread(n: int, most: int) -> list[int]:
    """At most `most` indices, evenly over n."""
    return [i * n // min(n, most) for i in range(min(n, most))]


def report_step(space: Workspace, *, lang: str = "en", price_per_hour: float | None = None, currency: str = "") -> Path:
    """Writes `report.json` and `report.html` and prints the decision."""
    path = report(space.out, lang=lang, price_per_hour=price_per_hour, currency=currency, overwrite=True)
    found = read_json(space.file("report.json"))
    say(f"decision: {found['decision'].upper()}")
    for reason in found["reasons"]:
        say(f"  {reason}")
    return path
