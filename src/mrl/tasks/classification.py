"""One label an image: the starting head, the loss, the decoding and the metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mrl.errors import ConfigError
from mrl.probe import STRENGTHS, Probe, linear_probe
from mrl.scores import accuracy, auroc, balanced_accuracy, macro_f1

_OF_ANSWERS = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1}

PRIMARY = (*_OF_ANSWERS, "auroc")
"""The scores that can choose a candidate: larger is better."""


@dataclass(frozen=True)
class Classification:
    """The task of giving each image one of K classes.

    Args:
        num_classes: K.
        class_weights: weight of each class in the loss, or None for 1; see `class_weights`.
        label_smoothing: share of each target spread over all classes; 0 is none.
        use_confidence: multiply each image's loss by the batch's "weight" (the confidence of its label).
        metric: the score that a fit maximises, one of `PRIMARY`.

    Raises:
        ConfigError: an unknown metric.

    Example:
        >>> task = Classification(2)
        >>> batch = {"label": torch.tensor([0, 1]), "weight": torch.ones(2)}
        >>> round(task.loss(torch.zeros(2, 2), batch).item(), 4)
        0.6931
    """

    num_classes: int
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    use_confidence: bool = False
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        if self.metric not in PRIMARY:
            raise ConfigError(f"metric {self.metric!r}: choose one of {', '.join(PRIMARY)}.")

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor], total: Tensor | None = None) -> Tensor:
        """The weighted mean cross-entropy, sum(w * loss) / sum(w) with w = class weight * confidence.

        Where the batch has "target", shares of all classes that sum to 1, those take the place of the label.

        Args:
            logits: of the network.
            batch: "label" and "weight", and "target" where it is mixed.
            total: sum(w) of the whole batch where this is one process's share of it, so that the losses of all shares add
                up to the loss of the whole batch; None is that of this batch.

        Shape:
            logits (B, K), batch["label"] (B,), batch["weight"] (B,), batch["target"] (B, K) -> ().
        """
        labels = batch.get("target", batch["label"])
        losses = nn.functional.cross_entropy(
            logits.float(), labels, reduction="none", label_smoothing=self.label_smoothing
        )
        weights = self.weights(batch).to(losses)
        whole = weights.sum() if total is None else total
        return (weights * losses).sum() / whole.clamp(min=1e-12)

    def weights(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What each image of a batch counts in the loss: class weight * confidence, (B,) float32."""
        labels = batch["label"]
        weights = torch.ones(len(labels), device=labels.device)
        if self.class_weights is not None:
            of_class = torch.tensor(self.class_weights, device=labels.device)
            weights = batch["target"] @ of_class if "target" in batch else of_class[labels]
        return weights * batch["weight"].to(weights) if self.use_confidence else weights

    def decode(self, logits: Tensor) -> Tensor:
        """Probabilities (B, K) in float64 from logits (B, K)."""
        return logits.double().softmax(-1)

    def score(self, logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[float, float]:
        """(score, loss) of a whole side: the primary metric, and the loss with class weights but without smoothing.

        Shape:
            logits (N, K), batch["label"] (N,), batch["weight"] (N,).
        """
        target, probabilities = batch["label"].numpy(), self.decode(logits).numpy()
        of_answers = _OF_ANSWERS.get(self.metric)
        value = auroc(target, probabilities) if of_answers is None else of_answers(target, probabilities.argmax(1))
        plain = dataclasses.replace(self, label_smoothing=0.0)
        return (-math.inf if math.isnan(value) else value), float(plain.loss(logits, batch))

    def start(
        self,
        model: nn.Module,
        train: Mapping[str, Tensor],
        val: Mapping[str, Tensor],
        strengths: tuple[float, ...] = STRENGTHS,
    ) -> Probe:
        """Sets the model's head to the linear probe on its features, and returns the probe.

        Args:
            model: has `set_head(weight, bias)`.
            train: "features" (N, F), "label" and "weight" (N,) of the inner training side.
            val: the same of the inner validation side, which chooses the L2 strength.
            strengths: among these; one that was chosen before leaves no choice.
        """
        probe = linear_probe(
            train["features"],
            train["label"],
            val["features"],
            val["label"],
            num_classes=self.num_classes,
            weights_train=self.weights(train),
            weights_val=self.weights(val),
            strengths=strengths,
        )
        model.set_head(probe.weight, probe.bias)
        return probe


def class_weights(labels: Sequence[int], num_classes: int) -> tuple[float, ...]:
    """Weights N / (K * n_k) that make each class count alike; the mean weight of the images is 1.

    Args:
        labels: of the training images.
        num_classes: classes, of which K have an image; one without has weight 1, which nothing uses.

    Example:
        >>> [round(w, 3) for w in class_weights([0, 0, 0, 1], 3)]
        [0.667, 2.0, 1.0]
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)
    present = int((counts > 0).sum())
    return tuple(len(labels) / (present * int(n)) if n else 1.0 for n in counts)
