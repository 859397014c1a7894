"""The second half of the fake run of `run_folder.py`: cost, fits, swap plan, calibration, export."""

import json
import math

import numpy as np

from mrl.run import write_json

ENVIRONMENT = {
    "mrl": "0.1.0",
    "python": "3.11.9",
    "os": "Linux x86_64",
    "cpu": "Example CPU at 2.5 GHz",
    "gpu": None,
    "threads": 2,
    "libraries": {"torch": "2.15.0", "timm": "1.0.31", "onnxruntime": "1.24.0"},
}
RATIOS = {"go": {112: 0.72, 224: 0.61, 448: 0.42, 896: 0.30}, "no-go": {112: 1.18, 224: 1.05, 448: 0.81, 896: 0.62}}
RATIOS["inconclusive"] = {112: 1.004, 224: 0.97, 448: 0.83, 896: 0.65}


def _timed(rng, median):
    samples = median * np.exp(np.abs(rng.normal(0, 0.05, 300))) * 0.98
    samples[::60] *= 1.6
    p = {q: float(np.quantile(samples, q)) for q in (0.5, 0.95, 0.99)}
    return {
        "latency_ms_median": p[0.5],
        "latency_ms_p95": p[0.95],
        "latency_ms_p99": p[0.99],
        "throughput_img_s": 1000 / p[0.5],
        "samples_ms": samples.tolist(),
    }


def measure(decision, sha):
    rng = np.random.default_rng(7)
    rows = []
    for backend, factor in (("onnxruntime", 1.0), ("eager", 1.25)):
        for size, ratio in RATIOS[decision].items():
            if size == 896 and backend == "eager":
                continue
            base = 9.0 * factor * (size / 112) ** 2.3
            around = {"estimate": ratio, "low": ratio * 0.975, "high": ratio * 1.026}
            rows.append(
                {
                    "backend": backend,
                    "precision": "fp32",
                    "batch": 1,
                    "image_size": size,
                    "threads": 2,
                    "n_blocks": 40,
                    "arms": {"baseline": _timed(rng, base), "mrl": _timed(rng, base * ratio)},
                    "ratio": around,
                    "verdict": "faster" if around["high"] < 1 else "slower" if around["low"] > 1 else "not resolvable",
                    "decides": backend == "onnxruntime" and size == 112,
                    "note": "only 5 blocks, to save time" if size > 112 else None,
                }
            )
    first = rows[0]
    hours = {
        arm: {
            "estimate": t["latency_ms_median"] / 3.6,
            "low": t["latency_ms_median"] / 3.7,
            "high": t["latency_ms_median"] / 3.5,
        }
        for arm, t in first["arms"].items()
    }
    return {
        "schema": 1,
        "rows": rows,
        "arms": {
            "baseline": {"params_m": 21.6, "gmacs": 1.456, "peak_memory_mb": 412.0, "file_mb": 86.5},
            "mrl": {"params_m": 21.9, "gmacs": 1.062, "peak_memory_mb": 398.0, "file_mb": 87.6},
        },
        "verdict": first["verdict"],
        "latency_ratio": first["ratio"],
        "million_images_hours": hours,
        "end_to_end": None,
        "image_sizes_not_measured": [
            {
                "image_size": 896,
                "reason": "one image takes 3.1 s in all; 5 blocks need 16 s, and the time budget allows 14 s",
            }
        ],
        "seconds": 64.0,
        "protocol_sha256": sha,
        "environment": ENVIRONMENT,
    }


def fits(out, comparison, sha):
    for k, arm in enumerate(("baseline", "mrl")):
        rng = np.random.default_rng(20 + k)
        final = comparison["arms"][arm]["estimate"] + 0.01
        events, scores = [], []
        for update in range(0, 241, 2):
            loss = 0.25 + (0.75 + 0.2 * k) * math.exp(-update / 60) + float(rng.normal(0, 0.04))
            if update:
                events.append(
                    {
                        "event": "train",
                        "update": update,
                        "epoch": update / 60,
                        "loss": loss,
                        "lr": 1e-5,
                        "seconds": update * 0.8,
                    }
                )
            if update % 20 == 0:
                score = final - (0.12 + 0.05 * k) * math.exp(-update / 50) + float(rng.normal(0, 0.006))
                scores.append({"update": update, "val_score": score, "val_loss": 0.5 - score / 4})
        best = max(scores, key=lambda s: s["val_score"])
        for i, s in enumerate(scores):
            events.append(
                {"event": "validation", **s, "train_score": None, "candidate": i, "best": s is best, "seconds": 1.0}
            )
        folder = out / "arms" / arm
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(e) + "\n" for e in sorted(events, key=lambda e: e["update"]))
        )
        write_json(
            folder / "fit.json",
            {
                "schema": 1,
                "arm": arm,
                "updates": 240,
                "epochs": 4,
                "best_update": best["update"],
                "best_score": best["val_score"],
                "candidates": scores,
                "linear_probe_val": final - 0.03,
                "below_linear_probe": False,
                "seconds": 281.4 + 22 * k,
                "images_seen": 7680,
                "n_train": 360,
                "n_val": 80,
                "trainable_params_m": 14.4,
                "config": {},
                "precision": "bf16",
                "device": "cpu",
                "seed": 0,
                "stopped_early": False,
                "updates_to_95": 60 + 20 * k,
                "warnings": [],
                "protocol_sha256": sha,
                "environment": ENVIRONMENT,
            },
        )


def surgery(out, sha):
    common = {"schema": 1, "protocol_sha256": sha, "environment": ENVIRONMENT}
    rows = [_plan_row(i) for i in range(12)]
    plan = {"rows": rows, "setting": "cheap", "config": {}, "predicted_latency_ratio": 0.83, "image_size": [112, 112]}
    write_json(out / "plan.json", {**common, **plan})
    names = [row["name"] for row in rows if row["action"] == "swap"]
    stages = [
        {
            "stage": stage,
            "updates": n,
            "seconds": seconds,
            "accepted": names[:k],
            "error_after": dict.fromkeys(names, after),
            "mean_error_before": before,
            "mean_error_after": after,
        }
        for stage, n, seconds, k, before, after in (
            ("stats", 0, 2.1, 11, 0.61, 0.44),
            ("layers", 320, 41.7, 10, 0.44, 0.12),
        )
    ]
    calibration = {"setting": "cheap", "stages": stages, "updates": 320, "seconds": 43.8, "n_images": 360, "layers": {}}
    write_json(out / "calibration.json", {**common, **calibration, "restored": []})
    faster = json.loads((out / "measure.json").read_text(encoding="utf-8"))["verdict"] == "faster"
    export = {"arm": "mrl" if faster else "baseline", "file": "model.onnx", "sha256": "cd" * 32, "opset": 18}
    parity = {"n_images": 32, "max_abs_diff": 3e-6, "tolerance": 1e-4, "same_decisions": True, "batches": [1, 8]}
    write_json(out / "export.json", {**common, **export, "parity": parity, "preprocess": {}, "classes": []})


def _plan_row(i):
    return {
        "name": f"blocks.{i}.attn",
        "class": "Attention",
        "adapter": "timm",
        "input": "NLC",
        "prefix_tokens": 1,
        "grid_from": "patch_embed",
        "extras": [],
        "region": [2, 2],
        "tokens_before": 65,
        "tokens_after": 17,
        "params_m_before": 0.591,
        "params_m_after": 0.605,
        "gmacs_before": 0.0409,
        "gmacs_after": 0.0287,
        "predicted_latency_ratio": 0.78,
        "action": "swap" if i < 11 else "skip",
        "reason": "" if i < 11 else "not selected",
    }
