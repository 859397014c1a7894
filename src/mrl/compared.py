"""What every comparison of a run reads and writes: its predictions, the images they must be of, and `comparison.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError, DataError
from mrl.pairs import join_groups
from mrl.protocol import Protocol, load_protocol, was_changed
from mrl.run import environment, read_csv, read_json, refuse_existing, write_json

PRIMARY = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")


@dataclass(frozen=True)
class Compared:
    """The files of a run that a comparison needs."""

    out: Path
    protocol: Protocol
    rows: list[dict[str, str]]
    split: list[dict[str, str]]
    evaluation: Mapping[str, Any]

    def images(self, *, test: bool) -> dict[str, dict[str, str]]:
        """Image -> its row of the split: of the test side, or of all others."""
        return {row["image"]: row for row in self.split if (row["split"] == "test") is test}

    @property
    def probes(self) -> dict[str, float | None]:
        """The linear probe's test score of every arm."""
        arms = self.evaluation.get("arms", {})
        return {arm: (arms.get(arm) or {}).get("linear_probe") for arm in self.protocol.arms}

    @property
    def told(self) -> dict[str, Any]:
        """What the protocol says of every comparison."""
        protocol = self.protocol
        return {"metric": protocol.metric, "margin": protocol.margin, "alpha": protocol.alpha, "seed": protocol.seed}

    def write(self, result: dict[str, Any]) -> dict[str, Any]:
        """Writes `comparison.json`, with a warning where the protocol is not the one that was written."""
        protocol = self.protocol
        if was_changed(self.out):
            result["warnings"].append(
                "protocol.yaml was changed after it was written; this comparison follows the change."
            )
        if self.evaluation.get("protocol_sha256", protocol.sha256()) != protocol.sha256():
            result["warnings"].append("The predictions were made under another protocol than the one in this folder.")
        result = {**result, "protocol_sha256": protocol.sha256(), "environment": environment()}
        write_json(self.out / "comparison.json", result)
        return result


def read_compared(out: str | Path, *, overwrite: bool = False) -> Compared:
    """Reads what a comparison needs.

    Raises:
        ConfigError: a file is not there, or comparison.json is.
    """
    out = Path(out)
    refuse_existing(out / "comparison.json", overwrite)
    protocol = load_protocol(out)
    evaluation = read_json(out / "evaluation.json") if (out / "evaluation.json").is_file() else {}
    return Compared(out, protocol, read_csv(out / "predictions.csv"), read_csv(out / "split.csv"), evaluation)


def check_metric(metric: str) -> None:
    """Raises ConfigError for a metric that cannot be the primary one."""
    if metric not in PRIMARY:
        raise ConfigError(f"compare: primary metric {metric!r}; use one of {', '.join(PRIMARY)}.")


def check_same_images(rows: Sequence[Mapping[str, str]], test: Mapping[str, Mapping[str, str]]) -> None:
    """Raises DataError unless the predictions are of exactly these images, with their labels."""
    predicted = {row["image"] for row in rows}
    if predicted != test.keys():
        missing, extra = sorted(test.keys() - predicted), sorted(predicted - test.keys())
        raise DataError(
            f"predictions.csv lacks {len(missing)} images of the test side {missing[:3]} and has {len(extra)} others "
            f"{extra[:3]}; run `mrl evaluate --overwrite`."
        )
    unlike = sorted({row["image"] for row in rows if row["target"] != test[row["image"]]["label"]})
    if unlike:
        raise DataError(
            f"predictions.csv has other targets than split.csv for {len(unlike)} images {unlike[:3]}; "
            "run `mrl evaluate --overwrite`."
        )


def groups_of(out: Path, test: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    """The unit of each image that shares a group, a file or pixels with another: image -> number of its unit.

    Args:
        out: the run folder, with `audit.json`.
        test: image -> its row of `split.csv`.
    """
    links: dict[tuple[str, str], list[str]] = {}
    for image, row in test.items():
        for key in ("group", "sha256"):
            if row.get(key):
                links.setdefault((key, row[key]), []).append(image)
    audit = read_json(out / "audit.json") if (out / "audit.json").is_file() else {}
    copies = [[image for image in same if image in test] for same in audit.get("exact_duplicates", [])]
    return join_groups([*links.values(), *copies])
