"""Whether `mrl.plan` predicts the end-to-end time of a swapped model: `python benchmarks/prediction.py`.

The plan times one original and one swapped block of each shape; here the whole model is timed, swapped and not, in turn. The
file goes to `benchmarks/results/<device>/prediction.json`.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import mrl
from bench import RESULTS, device_slug
from mrl.run import environment, say, write_json
from mrl.stats import ratio_of_medians
from mrl.swap import SETTINGS, SwapConfig
from mrl.timing import interleave, warm_up

CHEAPEST = SwapConfig(reduce="mean", prefix="region", local_source="input")
ARMS = {"paper": SETTINGS["paper"], "cheapest": CHEAPEST}


def compare(size: int, setting: str, blocks: int) -> dict[str, Any]:
    """One row: predicted and measured time of a ViT-S/16 after / before, batch 1, float32."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=size, num_classes=2).eval()
    images = torch.randn(1, 3, size, size)
    plan = mrl.plan(model, region=2, example_inputs=images, config=ARMS[setting])
    predicted = plan.predicted_latency_ratio
    swapped = copy.deepcopy(model)
    mrl.swap_(swapped, mrl.plan(swapped, region=2, config=ARMS[setting]))

    def call(net: nn.Module) -> Any:
        return lambda index: torch.inference_mode()(net)(images)

    calls = {"before": call(model), "after": call(swapped)}
    for each in calls.values():
        warm_up(each, seconds=0.5)
    times = interleave(calls, blocks=blocks, calls_per_block=2)
    ratio = ratio_of_medians(np.asarray(times["before"]), np.asarray(times["after"]), seed=0)
    found = ratio.estimate
    say(f"{size} px, {setting}: predicted {predicted:.3f}, measured {found:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
    measured = {"estimate": found, "low": ratio.low, "high": ratio.high}
    return {
        "image_size": size,
        "setting": setting,
        "predicted_latency_ratio": predicted,
        "measured_latency_ratio": measured,
        "relative_gap": predicted / found - 1,
    }


def main() -> None:
    """Command line: image sizes and rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[448, 768])
    parser.add_argument("--blocks", type=int, default=12)
    args = parser.parse_args()
    rows = [compare(size, setting, args.blocks) for size in args.sizes for setting in ARMS]
    path = RESULTS / device_slug("cpu") / "prediction.json"
    about = {"schema": 1, "model": "vit_small_patch16_224", "batch": 1, "precision": "fp32", "region": 2}
    write_json(path, {**about, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
