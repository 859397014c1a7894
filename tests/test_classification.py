"""The task of classification: loss, weights, score, start."""

import numpy as np
import pytest
import timm
import torch

from mrl.errors import ConfigError
from mrl.models import Classifier
from mrl.tasks import PRIMARY, Classification, class_weights


def batch_of(labels, weights=None):
    weights = torch.ones(len(labels)) if weights is None else torch.tensor(weights)
    return {"label": torch.tensor(labels), "weight": weights}


def test_loss__is_the_mean_cross_entropy():
    logits, batch = torch.randn(5, 3), batch_of([0, 1, 2, 2, 1])
    expected = torch.nn.functional.cross_entropy(logits, batch["label"])
    torch.testing.assert_close(Classification(3).loss(logits, batch), expected)


def test_loss__class_weights_and_smoothing_as_torch_has_them():
    logits, batch, weights = torch.randn(5, 3), batch_of([0, 1, 2, 2, 1]), (0.5, 1.0, 2.0)
    expected = torch.nn.functional.cross_entropy(logits, batch["label"], weight=torch.tensor(weights))
    torch.testing.assert_close(Classification(3, weights).loss(logits, batch), expected)
    smooth = torch.nn.functional.cross_entropy(logits, batch["label"], label_smoothing=0.1)
    torch.testing.assert_close(Classification(3, label_smoothing=0.1).loss(logits, batch), smooth)


def test_loss__confidence_of_0_leaves_an_image_out():
    logits = torch.randn(4, 2)
    sure = batch_of([0, 1, 1, 0], [1.0, 1.0, 0.0, 0.0])
    task = Classification(2, use_confidence=True)
    expected = torch.nn.functional.cross_entropy(logits[:2], sure["label"][:2])
    torch.testing.assert_close(task.loss(logits, sure), expected)
    nobody = batch_of([0, 1, 1, 0], [0.0] * 4)
    assert task.loss(logits, nobody).item() == 0.0


def test_loss__bf16_logits_are_taken_to_fp32():
    loss = Classification(2).loss(torch.randn(3, 2).bfloat16(), batch_of([0, 1, 1]))
    assert loss.dtype == torch.float32


def test_class_weights__every_class_counts_alike():
    labels = [0] * 30 + [1] * 10 + [3] * 2
    weights = class_weights(labels, 4)
    per_class = [weights[k] * labels.count(k) for k in (0, 1, 3)]
    np.testing.assert_allclose(per_class, len(labels) / 3)
    assert weights[2] == 1.0
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=np.array(labels))
    np.testing.assert_allclose([weights[k] for k in (0, 1, 3)], expected)


@pytest.mark.parametrize("metric", PRIMARY)
def test_score__against_scikit_learn(metric):
    from sklearn import metrics

    torch.manual_seed(0)
    logits, labels = torch.randn(40, 3), (torch.arange(40) ** 2 % 3).tolist() + []
    labels[0] = 2
    p = logits.double().softmax(1).numpy()
    expected = {
        "accuracy": lambda: metrics.accuracy_score(labels, p.argmax(1)),
        "balanced_accuracy": lambda: metrics.balanced_accuracy_score(labels, p.argmax(1)),
        "macro_f1": lambda: metrics.f1_score(labels, p.argmax(1), average="macro"),
        "auroc": lambda: metrics.roc_auc_score(labels, p, multi_class="ovr"),
    }
    score, loss = Classification(3, metric=metric, label_smoothing=0.5).score(logits, batch_of(labels))
    assert score == pytest.approx(expected[metric]())
    assert loss == pytest.approx(metrics.log_loss(labels, p), rel=1e-6)


def test_score__undefined_is_the_worst():
    score, _ = Classification(2, metric="auroc").score(torch.randn(3, 2), batch_of([1, 1, 1]))
    assert score == float("-inf")


def test_decode__float64_probabilities():
    p = Classification(2).decode(torch.tensor([[0.0, 100.0]], dtype=torch.float32))
    assert p.dtype == torch.float64
    assert 0 < p[0, 0] < 1e-40


def test_start__head_is_the_probe():
    model = Classifier(timm.create_model("test_vit", img_size=32, num_classes=0), 2)
    features = torch.randn(30, model.head.in_features)
    side = {"features": features, **batch_of([i % 2 for i in range(30)])}
    features[:, 0] += 4 * side["label"]
    probe = Classification(2).start(model, side, side)
    assert torch.equal(model.head.weight, probe.weight)
    assert (model.head(features).argmax(1) == side["label"]).all()


def test_start__weights_reach_the_probe():
    model = Classifier(timm.create_model("test_vit", img_size=32, num_classes=0), 2)
    side = {"features": torch.randn(30, model.head.in_features), **batch_of([0] * 24 + [1] * 6, [1.0, 0.2] * 15)}
    tasks = [Classification(2), Classification(2, (0.6, 2.5)), Classification(2, use_confidence=True)]
    biases = [task.start(model, side, side).bias for task in tasks]
    assert not torch.allclose(biases[0], biases[1])
    assert not torch.allclose(biases[0], biases[2])


def test_classification__unknown_metric():
    with pytest.raises(ConfigError, match="metric 'f2': choose one of accuracy, balanced_accuracy, macro_f1, auroc"):
        Classification(2, metric="f2")
