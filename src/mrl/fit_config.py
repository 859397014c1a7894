"""What a fit is told and what it tells: the configuration, and the record that becomes `fit.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrl.errors import ConfigError


@dataclass(frozen=True)
class FitConfig:
    """How an arm is fine-tuned; both arms of a comparison get the same.

    Args:
        epochs: passes over the inner training images; fractions are allowed.
        min_updates: updates that are made however few images there are; early stopping never comes before them.
        batch_size: images an update; the last batches of an epoch are evened out, none is much smaller.
        lr: peak learning rate of the head and the last norm; each layer below learns slower by `layer_decay`.
        layer_decay: factor on the learning rate from one layer to the one below; 1 trains all alike.
        weight_decay: AdamW's, on weights only, not on biases, norms and position embeddings.
        warmup: share of the updates over which the learning rate rises.
        warmup_lr: learning rate from which it rises, as a share of `lr`.
        min_lr: learning rate at the end, as a share of `lr`.
        cooldown: share of the updates, at the end, that stay at `min_lr`.
        ema: decay of the averaged weights that are validated and kept (rising to it at first); 0 is no average.
        clip: largest norm of the gradient; 0 does not clip.
        precision: auto, fp32, bf16 or fp16; auto is bf16 where the hardware has it, fp16 on other GPUs, else fp32.
        class_balance: count each class alike in the loss, instead of each image; null does so unless the metric is the
            plain accuracy, which it would lower.
        label_smoothing: share of each target that is spread over all classes.
        freeze: first blocks that stay as they are, with the embeddings; 0 trains everything, null freezes a third.
        patience: validations without gain on the inner validation side after which it stops; 0 never stops early.
        validations: times an epoch that the inner validation side is scored; each is a candidate.
        augment: none, light or medium changes to the training images; imagenet crops, distorts and erases strongly, for
            networks from scratch.
        use_confidence: weigh each training image by the confidence of its label.
        start: probe begins with a linear probe of the untouched network as its head; scratch with the network as it is
            built, for random weights.
        mixup: alpha of mixup, which blends pairs of images and their labels; 0 is off.
        cutmix: alpha of cutmix, which pastes a part of one image into another; 0 is off.
        batch_norm: hold keeps the running statistics that the network starts with and trains only gain and bias; train
            takes those of each batch; auto holds them where a trained network starts, and trains from scratch.

    Raises:
        ConfigError: a value out of range, with what is allowed.

    Example:
        >>> FitConfig(epochs=1).batch_size
        32
    """

    epochs: float = 2.0
    min_updates: int = 120
    batch_size: int = 32
    lr: float = 1e-5
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    warmup: float = 0.1
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    cooldown: float = 0.0
    ema: float = 0.97
    clip: float = 1.0
    precision: str = "auto"
    class_balance: bool | None = None
    label_smoothing: float = 0.0
    freeze: int | None = None
    patience: int = 0
    validations: int = 2
    augment: str = "light"
    use_confidence: bool = False
    start: str = "probe"
    mixup: float = 0.0
    cutmix: float = 0.0
    batch_norm: str = "auto"

    def __post_init__(self) -> None:
        """Checks every value."""
        limits = {
            "epochs": (self.epochs > 0, "above 0"),
            "min_updates": (self.min_updates >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 2, "2 or more"),
            "lr": (self.lr > 0, "above 0"),
            "layer_decay": (0 < self.layer_decay <= 1, "above 0, at most 1"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "warmup": (0 <= self.warmup < 1, "0 to below 1"),
            "warmup_lr": (0 <= self.warmup_lr <= 1, "0 to 1"),
            "min_lr": (0 <= self.min_lr <= 1, "0 to 1"),
            "cooldown": (self.cooldown >= 0 and self.warmup + self.cooldown < 1, "0 or more, with warmup below 1"),
            "ema": (0 <= self.ema < 1, "0 to below 1"),
            "clip": (self.clip >= 0, "0 or more"),
            "precision": (self.precision in ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 to below 1"),
            "freeze": (self.freeze is None or self.freeze >= 0, "null, 0 or more"),
            "patience": (self.patience >= 0, "0 or more"),
            "validations": (self.validations >= 1, "1 or more"),
            "start": (self.start in ("probe", "scratch"), "probe or scratch"),
            "mixup": (self.mixup >= 0, "0 or more"),
            "cutmix": (self.cutmix >= 0, "0 or more"),
            "batch_norm": (self.batch_norm in ("auto", "hold", "train"), "auto, hold or train"),
            "use_confidence": (
                not (self.use_confidence and (self.mixup or self.cutmix)),
                "false with mixup or cutmix, whose images belong to two labels",
            ),
        }
        for name, (fine, allowed) in limits.items():
            if not fine:
                raise ConfigError(f"FitConfig({name}={getattr(self, name)!r}): use {allowed}.")

    @property
    def holds_norms(self) -> bool:
        """Whether BatchNorm keeps its running statistics while the rest trains.

        A trained network's weights answer for those statistics. The noise of a small batch in their place is what
        fine-tuning then unlearns first: a calibrated swap of DINOv2-S on ELPV (36 norms, batches of 32) started at a
        training loss of 0.88 with it and of 0.31 without.

        Example:
            >>> FitConfig().holds_norms, FitConfig(start="scratch").holds_norms
            (True, False)
        """
        return self.start == "probe" if self.batch_norm == "auto" else self.batch_norm == "hold"


@dataclass(frozen=True)
class FitResult:
    """What came of a fit; the fields of `fit.json`.

    Args:
        arm: name of the arm.
        updates: that were made.
        epochs: passes over the inner training images, as a fraction.
        best_update: of the candidate that was kept; 0 is the starting head.
        best_score: its score on the inner validation side.
        candidates: update, val_score and val_loss of each.
        metric: the score that chose.
        linear_probe_val: score of the starting head, a linear probe; None where it started from scratch.
        below_linear_probe: no fine-tuned candidate reached the starting head on the inner validation side, so that was
            kept; whether what was kept is below it on the test side is for the evaluation to say.
        seconds: of work, interruptions not counted.
        images_seen: training images that went through the model, with repetitions.
        n_train: inner training images.
        n_val: inner validation images.
        trainable_params_m: parameters that were trained, in millions.
        frozen_blocks: first blocks that were not.
        config: of the fit.
        precision: of training and validation; the evaluation is in fp32.
        device: cpu, cuda, ...
        seed: of order, augmentation and dropout.
        stopped_early: by `patience`.
        updates_to_95: first validated update that reached 95 % of the best score; 0 where the starting head did.
        warnings: sentences for the report.
        probe_strength: L2 strength of the starting head; None where there is none.
        meta: plain data of the caller, such as the protocol's hash.
    """

    arm: str
    updates: int
    epochs: float
    best_update: int
    best_score: float
    candidates: list[dict[str, Any]]
    metric: str
    linear_probe_val: float | None
    below_linear_probe: bool
    seconds: float
    images_seen: int
    n_train: int
    n_val: int
    trainable_params_m: float
    frozen_blocks: int
    config: dict[str, Any]
    precision: str
    device: str
    seed: int
    stopped_early: bool
    updates_to_95: int | None
    warnings: list[str] = field(default_factory=list)
    probe_strength: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as `fit.json` has them: `meta` spread among them."""
        fields = dataclasses.asdict(self)
        return {"schema": 1, **fields.pop("meta"), **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FitResult:
        """The record from what `fit.json` holds."""
        names = {f.name for f in dataclasses.fields(cls)} - {"meta"}
        meta = {k: v for k, v in data.items() if k not in names | {"schema"}}
        return cls(**{k: v for k, v in data.items() if k in names}, meta=meta)


def planned_updates(config: FitConfig, n_train: int) -> int:
    """The updates that a fit plans on so many training images: of its epochs, and no fewer than `min_updates`.

    Example:
        >>> planned_updates(FitConfig(epochs=2, batch_size=32, min_updates=10), 320)
        20
    """
    return max(config.min_updates, math.ceil(config.epochs * math.ceil(n_train / config.batch_size)))


def check_same(stored: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError where a file on disk belongs to another fit than the one asked for."""
    if stored != asked:
        names = [k for k in asked if stored.get(k) != asked[k]]
        raise ConfigError(
            f"{path} belongs to a fit with another {' and '.join(names)}; choose another --out, or say --overwrite to "
            "start again."
        )
