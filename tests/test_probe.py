"""The linear probe against scikit-learn itself, and on the sides that break naive ones."""

import warnings

import numpy as np
import pytest
import torch

from mrl.errors import DataError
from mrl.probe import STRENGTHS, linear_probe


def clouds(n, num_classes, features=12, seed=0, spread=1.5):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, features, generator=torch.Generator().manual_seed(99)) * spread
    y = torch.arange(n) % num_classes
    return centres[y] + torch.randn(n, features, generator=g), y


@pytest.mark.parametrize("num_classes", [2, 4])
def test_linear_probe__equals_a_pipeline(num_classes):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = clouds(80, num_classes)
    x = x * torch.logspace(-2, 2, 12) + 5
    x_val, y_val = clouds(40, num_classes, seed=1)
    x_val = x_val * torch.logspace(-2, 2, 12) + 5
    probe = linear_probe(x, y, x_val, y_val, num_classes=num_classes, strengths=(0.03,))
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (0.03 * 80), tol=1e-8, max_iter=5000))
    expected = reference.fit(x.double().numpy(), y.numpy()).predict_proba(x_val.double().numpy())
    found = (x_val @ probe.weight.T + probe.bias).double().softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=5e-3)  # lbfgs stops at tol 1e-3; measured 1.6e-3


def test_linear_probe__strength_has_the_lowest_validation_loss():
    x, y = clouds(30, 3, spread=0.4)
    x_val, y_val = clouds(300, 3, spread=0.4, seed=1)
    probe = linear_probe(x, y, x_val, y_val, num_classes=3)
    assert probe.losses.keys() == set(STRENGTHS)
    assert probe.losses[probe.strength] == min(probe.losses.values())
    loss = torch.nn.functional.cross_entropy((x_val @ probe.weight.T + probe.bias).double(), y_val)
    assert loss.item() == pytest.approx(probe.losses[probe.strength])


def test_linear_probe__same_every_time_and_without_global_randomness():
    x, y = clouds(40, 3)
    torch.manual_seed(1)
    np.random.seed(1)
    one = linear_probe(x, y, x, y, num_classes=3)
    torch.manual_seed(2)
    np.random.seed(2)
    other = linear_probe(x, y, x, y, num_classes=3)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize(("n", "num_classes", "features"), [(2, 2, 5), (6, 3, 200), (60, 50, 30), (101, 100, 8)])
def test_linear_probe__few_images_many_classes(n, num_classes, features):
    x, y = clouds(n, num_classes, features, spread=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = linear_probe(x, y, x, y, num_classes=num_classes)
    assert probe.weight.shape == (num_classes, features)
    assert probe.weight.isfinite().all()
    assert ((x @ probe.weight.T + probe.bias).argmax(1) == y).float().mean() > 0.9


def test_linear_probe__class_without_an_image_never_wins():
    x, y = clouds(60, 3)
    kept = y != 1
    probe = linear_probe(x[kept], y[kept], x, y, num_classes=5)
    wild = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * 50
    for side in (x, wild):
        assert set((side @ probe.weight.T + probe.bias).argmax(1).tolist()) == {0, 2}


def test_linear_probe__constant_features():
    x, y = clouds(40, 2)
    x[:, 3] = 7.0
    x[:, 4] = 0.0
    probe = linear_probe(x, y, x, y, num_classes=2)
    changed = x.clone()
    changed[:, 3:5] += 1e-3
    change = ((x - changed) @ probe.weight.T).abs().max()
    assert change < 1e-3


def test_linear_probe__weights_count_as_repetitions():
    x, y = clouds(40, 2, spread=0.5)
    weights = torch.ones(40)
    weights[:20] = 3.0
    repeated = torch.cat([x, x[:20], x[:20]]), torch.cat([y, y[:20], y[:20]])
    mean, std = x.mean(0), x.std(0, unbiased=False)
    probe = linear_probe(x, y, x, y, num_classes=2, weights_train=weights, weights_val=weights, strengths=(0.1,))
    plain = linear_probe(x, y, x, y, num_classes=2, strengths=(0.1,))
    assert not torch.allclose(probe.weight, plain.weight)
    assert probe.losses != plain.losses
    from sklearn.linear_model import LogisticRegression

    scaled = [((part - mean) / std).double().numpy() for part in (repeated[0], x)]
    reference = LogisticRegression(C=1 / (0.1 * 40), tol=1e-8, max_iter=5000).fit(scaled[0], repeated[1].numpy())
    found = (x @ probe.weight.T + probe.bias).double().softmax(1).numpy()
    np.testing.assert_allclose(found, reference.predict_proba(scaled[1]), atol=5e-3)  # measured 1e-3


def test_linear_probe__one_class():
    x, y = clouds(10, 2)
    with pytest.raises(DataError, match="fewer than 2 classes; give more images"):
        linear_probe(x, torch.zeros_like(y), x, y, num_classes=2)
