"""The rules of a comparison, written and hashed before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mrl.errors import ConfigError
from mrl.run import plain, sha256_text, writing

PROTOCOL_FILE = "protocol.yaml"
SCHEMA = 1
RULE = (
    "go = superior and not slower, or (equivalent or non-inferior) and faster; no-go = inferior, or slower without being "
    "superior; inconclusive otherwise"
)


@dataclass(frozen=True)
class Protocol:
    """Everything that was decided before training; its hash is in every later file.

    Args:
        data: source, test, fingerprint, n, n_test, classes, class_counts, on_bad, bit_depth.
        model: timm name, folder of `mrl.save`, or `package.module:factory`.
        weights: where the weights come from, with a SHA-256 for files; None is random.
        weights_unseen: the user's word that weights of their own have not seen the images.
        image_size: (H, W) in pixels.
        region: positions a region spans.
        swap: faithful, cheap, paper or auto.
        layers: indices of the blocks to swap; None is all.
        preset: how the data is split.
        seeds: of the split and the training.
        arms: names of the arms, the baseline first; each other one is compared with it.
        metric: the primary metric, a fraction.
        margin: the largest loss of the metric that still counts as equivalent, a fraction.
        alpha: of the two-sided intervals.
        power: of the minimum detectable effect.
        test_fraction: share of the images on the test side.
        val_fraction: share of the training side that chooses the best candidate.
        budget: the fit's configuration, the same for both arms.
        calibration: the configuration of `mrl.calibrate`, which only the swapped arm has.
        latency: backend, batch and image size that decide on cost.
        decision: the rule in words and `max_slowdown`.
        mde: the minimum detectable effect of this many test images; `n_effective` where they are as good as fewer
            independent ones, because of groups, copies, or classes that count alike.
        folds: of repeated k-fold: k, repeats, n_frozen (images of the frozen test set) and the primary test; empty for one
            hold-out, and then not a part of the file or of its hash.
        arm_settings: of every arm beside baseline and mrl: model, weights, swap, region, layers, budget; where there are
            none, not a part of the file or of its hash.
        tuned: settings from `mrl tune`, each arm's own, and how many test images took part in their choice; empty without, and
            then not a part either. `budget` and `calibration` are then those of the baseline and the swapped arm.
        task: what is learned.
        schema: version of this file's layout.

    Example:
        >>> p = Protocol(data={"n": 4}, model="test_vit")
        >>> p.sha256() == Protocol(data={"n": 4}, model="test_vit").sha256()
        True
    """

    data: dict[str, Any]
    model: str
    weights: str | None = None
    weights_sha256: str | None = None
    weights_unseen: bool = False
    image_size: tuple[int, int] = (224, 224)
    region: int = 2
    swap: str = "auto"
    layers: list[int] | None = None
    preset: str = "quick"
    seeds: list[int] = field(default_factory=lambda: [0])
    arms: list[str] = field(default_factory=lambda: ["baseline", "mrl"])
    metric: str = "accuracy"
    margin: float = 0.03
    alpha: float = 0.05
    power: float = 0.8
    test_fraction: float = 0.25
    val_fraction: float = 0.15
    budget: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=lambda: {"backend": "onnxruntime", "batch": 1})
    decision: dict[str, Any] = field(default_factory=lambda: {"rule": RULE, "max_slowdown": 1.0})
    mde: dict[str, Any] = field(default_factory=dict)
    folds: dict[str, Any] = field(default_factory=dict)
    arm_settings: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    task: str = "classification"
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, without the hash."""
        fields = dataclasses.asdict(self)
        return plain({k: v for k, v in fields.items() if k not in ("folds", "arm_settings", "tuned") or v})

    def sha256(self) -> str:
        """The hash of the fields, independent of their order."""
        return sha256_text(json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True))

    def budget_of(self, arm: str) -> dict[str, Any]:
        """The fit's configuration of an arm: the one of all, or what `mrl tune` chose for this one.

        Example:
            >>> Protocol({}, "test_vit", budget={"lr": 1}, tuned={"arms": {"mrl": {"fit": {"lr": 2}}}}).budget_of("mrl")
            {'lr': 2}
        """
        return self.tuned.get("arms", {}).get(arm, {}).get("fit", self.budget)

    @property
    def max_slowdown(self) -> float:
        """How much slower a superior arm may be and still go."""
        return float(self.decision.get("max_slowdown", 1.0))

    @property
    def n_comparisons(self) -> int:
        """Arms that are compared with the baseline."""
        return len(self.arms) - 1

    @property
    def seed(self) -> int:
        """The seed of the split and of the training of this preset."""
        return self.seeds[0]


def write_protocol(out: Path | str, protocol: Protocol) -> Path:
    """Writes `protocol.yaml` with its hash, whole or not at all.

    Example:
        >>> import tempfile
        >>> out = tempfile.mkdtemp()
        >>> _ = write_protocol(out, Protocol(data={"n": 4}, model="test_vit"))
        >>> load_protocol(out).model
        'test_vit'
    """
    path = Path(out) / PROTOCOL_FILE
    document = {"sha256": protocol.sha256(), **protocol.to_dict()}
    with writing(path) as part:
        part.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def load_protocol(out: Path | str) -> Protocol:
    """Reads a run's protocol as it stands now; `was_changed` tells whether it still is what was written.

    Args:
        out: the run folder.

    Raises:
        ConfigError: it is not there, or not readable.
    """
    return _read(out)[0]


def was_changed(out: Path | str) -> bool:
    """Whether a run's protocol was edited after it was written (its hash no longer fits)."""
    protocol, stored = _read(out)
    return protocol.sha256() != stored


def _read(out: Path | str) -> tuple[Protocol, str]:
    path = Path(out) / PROTOCOL_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: no protocol yet; run `mrl split` or `mrl poc` with --model and --data first.")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        stored = document.pop("sha256")
        return Protocol(**{**document, "image_size": tuple(document["image_size"])}), stored
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a protocol that this version can read ({error}); use a new --out.") from error
