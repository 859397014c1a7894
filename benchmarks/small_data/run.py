"""Data efficiency of MRL against its attention alone and its convolution alone, trained from scratch on ELPV.

The images are dealt into 5 stratified folds. In every fold, 10, 20, 40, 70 and 100 % of the training side (nested; 15 % of each part
validate) train each network with the same number of updates, and the fold's own images test the candidate that
validation chose. Peak learning rates: each network takes the best of three on the inner validation side of fold 0. `python
benchmarks/small_data/run.py` goes on where it was stopped; every fit is a line of `<device>.jsonl` beside this file, and
`<device>.json` is their sum.

`--images` takes a folder of class folders with the images already at the size of the benchmark, so that they can travel.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
from networks import ABOUT, NETWORKS, network  # noqa: E402

from bench import device_slug  # noqa: E402
from mrl.curve import summed  # noqa: E402
from mrl.data import (  # noqa: E402
    ImageCache,
    ImageSet,
    Preprocess,
    SplitRow,
    audit_source,
    load_source,
    make_folds,
    split_of,
    split_units,
)
from mrl.data.subsets import SHARES, nested_subsets  # noqa: E402
from mrl.evaluate import predict_probabilities  # noqa: E402
from mrl.fit import FitConfig, fit  # noqa: E402
from mrl.macs import count  # noqa: E402
from mrl.models import Classifier  # noqa: E402
from mrl.run import environment, progress, say, write_json  # noqa: E402
from mrl.scores import score_all  # noqa: E402
from mrl.stats import nadeau_bengio  # noqa: E402

SIZE, SEED, K, BATCH, VALIDATIONS = 112, 0, 5, 64, 20
RATES = (3e-4, 7e-4, 1.5e-3)
METRIC = "accuracy"
_SEEN: dict[str, Any] = {}


def prepared(images: str) -> dict[str, Any]:
    """Source, folds and one cache of the images, once a process."""
    if images not in _SEEN:
        source = load_source(images)
        audit = audit_source(source)
        _SEEN[images] = {
            "source": source,
            "folds": make_folds(audit, preset="standard", seed=SEED),
            "units": split_units(audit),
            "samples": {sample.image: sample for sample in audit.kept},
            "cache": ImageCache(),
        }
    return _SEEN[images]


def sides(images: str, fold: int, share: float) -> dict[str, list[SplitRow]]:
    """The split of one fold with a part of its training side."""
    found = prepared(images)
    rows = split_of(found["folds"], 0, fold, units=found["units"])
    part = nested_subsets(rows, found["units"], shares=(share,), seed=SEED)[share]
    return {side: [row for row in part if row.split == side] for side in ("train", "val", "test")}


def one_fit(job: dict[str, Any]) -> dict[str, Any]:
    """Trains and tests one network on one part of one fold; a job is a plain dictionary so that it can travel."""
    torch.set_num_threads(job["threads"])
    found, parts = prepared(job["images"]), sides(job["images"], job["fold"], job["share"])
    prepare = Preprocess((SIZE, SIZE))

    def image_set(side: str) -> ImageSet:
        samples = [found["samples"][row.image] for row in parts[side]]
        return ImageSet(samples, found["source"].classes, prepare, seed=SEED + job["fold"], cache=found["cache"])

    seed = SEED + 1 + job["fold"]
    torch.manual_seed(seed)
    model = Classifier(network(job["network"]), len(found["source"].classes))
    train, val = image_set("train"), image_set("val")
    config = FitConfig(  # `min_updates` is what counts: as many updates and candidates whatever the part
        epochs=1, min_updates=job["updates"], batch_size=BATCH, lr=job["lr"], layer_decay=1.0, freeze=0, warmup=0.1, augment="light",
        start="scratch", validations=VALIDATIONS,
    )  # fmt: skip
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        record = fit(model, train, val, config, folder, seed=seed, arm=job["network"], metric=METRIC)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        kept = next(x for x in lines if x["event"] == "validation" and x["update"] == record.best_update)
        scores = {}
        if not job["choosing"]:
            test = image_set("test")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            p = predict_probabilities(model, test, device=device)
            scores = score_all(np.array(test.labels), p)
    gap = None if kept["train_score"] is None else kept["train_score"] - kept["val_score"]
    told = {key: job[key] for key in ("network", "fold", "share", "lr", "choosing")}
    return {
        **told,
        "n_train": len(train) + len(val),
        "n_test": len(parts["test"]),
        "score": scores.get(METRIC),
        "scores": scores,
        "val_score": record.best_score,
        "gap": gap,
        "updates": record.updates,
        "best_update": record.best_update,
        "updates_to_95": record.updates_to_95,
        "curve": [[c["update"], round(c["val_score"], 4)] for c in record.candidates],
        "precision": record.precision,
        "seconds": round(time.monotonic() - started, 1),
    }


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a fit is known by."""
    return row["network"], row["fold"], row["share"], row["lr"], row["choosing"]


def done(path: Path, told: dict[str, Any]) -> list[dict[str, Any]]:
    """The fits of an earlier call with the same settings; an unfinished last line is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if all(row.get(key) == value for key, value in told.items())]


def run_jobs(
    jobs: Sequence[dict[str, Any]], path: Path, told: dict[str, Any], workers: int, title: str
) -> Iterator[dict]:
    """The rows of these jobs, in any order: those that are there, then those that are missing, each kept at once."""
    there = {key_of(row): row for row in done(path, told)}
    yield from (there[key_of(job)] for job in jobs if key_of(job) in there)
    missing = [job for job in jobs if key_of(job) not in there]
    if not missing:
        return
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress(title, len(missing)))
        if workers == 0:
            fresh: Iterator[dict] = map(one_fit, missing)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")))
            fresh = (future.result() for future in as_completed([pool.submit(one_fit, job) for job in missing]))
        for found in fresh:
            row = {**found, **told}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            advance(1, f"{row['network']} {row['share']:.0%}")
            yield row


def whole(rows: Sequence[dict[str, Any]], rates: dict[str, float], folds: int) -> list[dict[str, Any]]:
    """The tested fits of all calls at the chosen rates, of shares whose fits are all there."""
    fits = {
        key_of(row): row
        for row in rows
        if not row["choosing"] and row["lr"] == rates[row["network"]] and row["fold"] < folds
    }
    counts = Counter(row["share"] for row in fits.values())
    return [row for row in fits.values() if counts[row["share"]] == folds * len(NETWORKS)]


def convergence(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each network and share: the median update at which a fit first had 95 % of its best validation score."""
    found: dict[str, Any] = {}
    for name in NETWORKS:
        for share in sorted({row["share"] for row in rows}):
            at = [row["updates_to_95"] for row in rows if row["network"] == name and row["share"] == share]
            found.setdefault(name, {})[f"{share:g}"] = {"median": float(np.median(at)), "of": sorted(at)}
    return found


def as_points(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a fold and share, with the networks as arms."""
    points: dict[tuple[float, int], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["share"], row["fold"])):
        point = points.setdefault(
            (row["share"], row["fold"]),
            {"repeat": 0, "fold": row["fold"], "share": row["share"], "n_train": row["n_train"], "arms": {}},
        )
        kept = ("score", "scores", "val_score", "gap", "updates", "best_update", "updates_to_95", "curve", "seconds")
        point["arms"][row["network"]] = {key: row[key] for key in kept}
    return list(points.values())


def aurocs(rows: Sequence[dict[str, Any]], alpha: float = 0.05) -> dict[str, Any]:
    """The mean AUROC at every share with its corrected interval."""
    found: dict[str, Any] = {}
    for name in NETWORKS:
        for share in sorted({row["share"] for row in rows}):
            values = [row["scores"]["auroc"] for row in rows if row["network"] == name and row["share"] == share]
            if len(values) % K == 0:
                got = nadeau_bengio(values, K, alpha)
                found.setdefault(name, {})[f"{share:g}"] = {"estimate": got.estimate, "low": got.low, "high": got.high}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="elpv", help="elpv, or a folder of class folders at the benchmark's size")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 works in this one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folds", type=int, default=K, help="the first so many of the 5")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=sorted(SHARES, reverse=True), help="to fit in this call"
    )
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(argv)
    slug = device_slug("cuda" if torch.cuda.is_available() else "cpu")
    lines, told = args.out / f"{slug}.jsonl", {"update_budget": args.updates}
    common = {"images": args.images, "updates": args.updates, "threads": args.threads}
    started = time.monotonic()
    choosing = [
        {**common, "network": name, "fold": 0, "share": 1.0, "lr": lr, "choosing": True}
        for name in NETWORKS
        for lr in RATES
    ]
    tried = list(run_jobs(choosing, lines, told, args.workers, "learning rates"))
    rates = {
        name: max((r for r in tried if r["network"] == name), key=lambda r: (r["val_score"], -r["lr"]))["lr"]
        for name in NETWORKS
    }
    say(f"learning rates: {rates}")
    jobs = [
        {**common, "network": name, "fold": fold, "share": share, "lr": rates[name], "choosing": False}
        for share in args.shares
        for fold in range(args.folds)
        for name in NETWORKS
    ]
    for _ in run_jobs(jobs, lines, told, args.workers, "fits"):
        pass
    rows = whole(done(lines, told), rates, args.folds)
    cost = {}
    for name in NETWORKS:
        counted = count(network(name), SIZE)
        cost[name] = {"params_m": counted.params_m, "gmacs": counted.gmacs}
    path = write_json(
        args.out / f"{slug}.json",
        {
            "schema": 1,
            "environment": environment(),
            "seconds": round(time.monotonic() - started, 1),
            "settings": {
                "image_size": SIZE, "updates": args.updates, "batch_size": BATCH, "rates_tried": list(RATES), "rates": rates, "seed": SEED,
                "k": K, "folds": args.folds, "augment": "light", "precision": rows[0]["precision"],
                "images": "elpv" if args.images == "elpv" else f"elpv, resized to {SIZE} px and rounded to 8 bits beforehand",
            },
            "about": ABOUT,
            "cost": cost,
            "choosing": sorted(({k: r[k] for k in ("network", "lr", "val_score", "curve")} for r in tried), key=lambda r: (r["network"], r["lr"])),
            "accuracy": summed(as_points(rows), arms=NETWORKS, metric=METRIC, k=K),
            "auroc": aurocs(rows),
            "updates_to_95": convergence(rows),
        },
    )  # fmt: skip
    say(f"wrote {path.name} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
