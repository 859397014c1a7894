"""How a calibration is told what to do, and what it says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

TRAINED = ("layers", "features")
"""Stages that train, step by step."""


@dataclass(frozen=True)
class CalibrateConfig:
    """How a swapped model is calibrated.

    Args:
        epochs: passes of the stage `layers` over the images; a stage of no updates (this and `min_updates` 0) is left out.
        feature_epochs: passes of the stage `features`.
        min_updates: updates of either stage however few images there are.
        batch_size: images an update.
        lr_new: learning rate of the new parameters in the stage `layers`.
        lr_inherited: learning rate of the inherited q, k, v and output projections in the stage `layers`.
        lr_features: learning rate in the stage `features`; the new parameters take ten times as much.
        scope: what may change beside the mixers: the "blocks" around them (their last Linear in the pass along the stream; all
            of them, norms and MLPs too, in the stage `features`), or nothing, "mixers".
        held_out: share of the images that measures every stage and trains none.
        max_images: images used at most.
        budget: held-out error above which a layer goes back to its original attention in the end; None keeps all.
        augment: mirror and turn batches by quarter turns, for teacher and student alike; for few images.
        bf16: bfloat16 autocast; None is where the hardware has it.
        seed: order of the images and their flips.
    """

    epochs: float = 0.5
    feature_epochs: float = 0.25
    min_updates: int = 60
    batch_size: int = 8
    lr_new: float = 3e-3
    lr_inherited: float = 2e-4
    lr_features: float = 1e-5
    scope: Literal["blocks", "mixers"] = "blocks"
    held_out: float = 0.1
    max_images: int = 2000
    budget: float | None = None
    augment: bool = False
    bf16: bool | None = None
    seed: int = 0

    def updates(self, stage: str, images: int) -> int:
        """Optimizer steps of a stage on so many training images; the closed forms, "stats" and "ridge", take none.

        Example:
            >>> CalibrateConfig(epochs=2).updates("layers", 400), CalibrateConfig().updates("ridge", 400)
            (100, 0)
        """
        if stage not in TRAINED:
            return 0
        epochs = self.epochs if stage == "layers" else self.feature_epochs
        return max(self.min_updates, round(epochs * max(1, images // self.batch_size)))


@dataclass
class StageReport:
    """What one stage did: held-out errors by layer, before and after, and what it cost.

    Errors are those before the pass along the residual stream that ends the last of "ridge" and "layers"; the error of the final
    features before and after that pass is `stream_before` and `stream_after`.
    """

    stage: str
    updates: int
    seconds: float
    error_before: dict[str, float]
    error_after: dict[str, float]
    accepted: list[str]
    stream_before: float | None = None
    stream_after: float | None = None

    @property
    def mean_error_before(self) -> float:
        """Mean over the layers before the stage."""
        return sum(self.error_before.values()) / len(self.error_before)

    @property
    def mean_error_after(self) -> float:
        """Mean over the layers after the stage, rejected layers at their old error."""
        return sum(self.error_after.values()) / len(self.error_after)


@dataclass
class CalibrationReport:
    """All stages of a calibration."""

    stages: list[StageReport] = field(default_factory=list)
    n_images: int = 0
    n_held_out: int = 0
    config: CalibrateConfig = field(default_factory=CalibrateConfig)
    restored: list[str] = field(default_factory=list)

    @property
    def updates(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.updates for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def summary(self) -> str:
        """What was reached, in words: the layers' error, and that of the final features where it was measured.

        Example:
            >>> stage = StageReport("ridge", 0, 1.0, {"a": 0.16}, {"a": 0.04}, ["a"], 0.57, 0.2)
            >>> CalibrationReport([stage]).summary()
            'error of the layers 0.160 -> 0.040, of the final features 0.570 -> 0.200'
        """
        layers = [s for s in self.stages if s.stage != "features"]
        finals = [
            pair for s in self.stages if s.stream_before is not None for pair in (s.stream_before, s.stream_after)
        ]
        finals += [e for s in self.stages if s.stage == "features" for e in (s.mean_error_before, s.mean_error_after)]
        told = []
        if layers:
            told.append(f"of the layers {layers[0].mean_error_before:.3f} -> {layers[-1].mean_error_after:.3f}")
        if finals:
            told.append(f"of the final features {finals[0]:.3f} -> {finals[-1]:.3f}")
        return f"error {', '.join(told)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in a run's `calibration.json`."""
        stages = [
            {**asdict(s), "mean_error_before": s.mean_error_before, "mean_error_after": s.mean_error_after}
            for s in self.stages
        ]
        return {
            "schema": 1,
            "stages": stages,
            "updates": self.updates,
            "seconds": self.seconds,
            "n_images": self.n_images,
            "n_held_out": self.n_held_out,
            "layers": next((s.error_after for s in reversed(self.stages) if s.stage == "layers"), {}),
            "restored": self.restored,
            "config": asdict(self.config),
        }
