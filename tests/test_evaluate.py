"""Stored predictions, and the scores of an arm's best candidate and of its linear probe."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from mrl.data import ImageSet, make_augment
from mrl.errors import ConfigError
from mrl.evaluate import (
    Predictions,
    evaluate_arm,
    predict_probabilities,
    read_predictions,
    write_evaluation,
    write_predictions,
)
from mrl.fit import fit
from mrl.scores import score_all
from test_fit import SHAPE, SMALL, make_model, make_samples


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [ImageSet(make_samples(folder, n, seed), ("a", "b"), SHAPE) for n, seed in ((26, 1), (15, 2), (21, 3))]


def some(arm="baseline", n=3, **kwargs):
    random = np.random.default_rng(len(arm))
    p = random.dirichlet([1, 1], n)
    return Predictions(arm, tuple(f"{i}.png" for i in range(n)), ("a", "b", "b")[:n], ("a", "b"), p, **kwargs)


def same(one, other):
    fields = [f.name for f in dataclasses.fields(one) if f.name != "probabilities"]
    return all(getattr(one, f) == getattr(other, f) for f in fields) and np.array_equal(
        one.probabilities, other.probabilities
    )


def test_predict_probabilities__softmax_in_order(sides):
    model = make_model(drop_path_rate=0.5).train()
    found = predict_probabilities(model, sides[2], batch_size=4)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(sides[2][i]["image"][None]) for i in range(21)])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, logits.double().softmax(1).numpy(), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-12)


def test_predict_probabilities__fp32_inside_autocast(sides):
    model = make_model()
    plain = predict_probabilities(model, sides[2])
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(predict_probabilities(model, sides[2]), plain)


def test_predict_probabilities__augmented_images(sides):
    images = ImageSet(sides[2].samples, sides[2].classes, SHAPE, make_augment("light"))
    with pytest.raises(ConfigError, match="augmented; give an ImageSet with augment=None"):
        predict_probabilities(make_model(), images)


def test_predictions__round_trip_with_all_digits(tmp_path):
    path = tmp_path / "predictions.csv"
    arms = [some("baseline", seed=4), some("mrl", seed=4)]
    write_predictions(path, arms)
    back = read_predictions(path)
    assert all(same(a, b) for a, b in zip(arms, back, strict=True))
    assert path.read_text().splitlines()[0] == "image,target,arm,repeat,fold,seed,p_a,p_b"


def test_write_predictions__arm_by_arm(tmp_path):
    path = tmp_path / "predictions.csv"
    write_predictions(path, [some("mrl")])
    write_predictions(path, [some("baseline")])
    write_predictions(path, [some("baseline", fold=1)])
    again = dataclasses.replace(some("mrl"), probabilities=np.full((3, 2), 0.5))
    write_predictions(path, [again])
    back = read_predictions(path)
    assert [(p.arm, p.fold) for p in back] == [("baseline", 0), ("mrl", 0), ("baseline", 1)]
    assert same(back[1], again)


def test_write_predictions__other_classes(tmp_path):
    write_predictions(tmp_path / "p.csv", [some("mrl")])
    other = dataclasses.replace(some("baseline"), classes=("a", "c"))
    with pytest.raises(ConfigError, match=r"the classes a, c of baseline are not a, b; use a new --out"):
        write_predictions(tmp_path / "p.csv", [other])


def test_write_predictions__class_names_with_commas(tmp_path):
    odd = Predictions("mrl", ("x,y.png",), ('in, "out"',), ("a\nb", 'in, "out"'), np.array([[0.1, 0.9]]))
    write_predictions(tmp_path / "p.csv", [odd])
    assert same(read_predictions(tmp_path / "p.csv")[0], odd)


def test_predictions__sizes_that_do_not_fit():
    with pytest.raises(ConfigError, match="do not belong together"):
        dataclasses.replace(some(), targets=("a",))


def test_read_predictions__not_ours(tmp_path):
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="not a predictions file"):
        read_predictions(tmp_path / "p.csv")


@pytest.fixture(scope="module")
def fitted(sides, tmp_path_factory):
    out = tmp_path_factory.mktemp("arm")
    model = make_model()
    config = dataclasses.replace(SMALL, epochs=5, lr=3e-3, augment="none", ema=0.0)
    fit(model, *sides[:2], config, out, arm="mrl", seed=7)
    return model, out


def test_evaluate_arm__best_and_probe(sides, fitted):
    model, out = fitted
    record = json.loads((out / "fit.json").read_text())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found, part = evaluate_arm(model, out, sides[2], metric="accuracy", batch_size=8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (found.arm, found.seed, found.classes) == ("mrl", 7, ("a", "b"))
    assert found.images == tuple(s.image for s in sides[2].samples)
    assert part["metrics"] == score_all(found.target_indices, found.probabilities)
    if record["best_update"] == 0:
        assert part["linear_probe"] == part["metrics"]["accuracy"]
    assert part["below_linear_probe"] == (part["metrics"]["accuracy"] < part["linear_probe"])


def test_evaluate_arm__says_when_below_its_probe(sides, fitted, tmp_path):
    """A best candidate whose head answers everything wrongly, beside the start it came from."""
    model, out = fitted
    record = json.loads((out / "fit.json").read_text())
    (tmp_path / "fit.json").write_text(json.dumps({**record, "best_update": 3}))
    start = make_model()
    start.load_state_dict(model.state_dict())
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    bad = make_model()
    bad.load_state_dict(model.state_dict())
    bad.set_head(torch.zeros_like(bad.head.weight), torch.tensor([-1.0, 1.0]))
    _, part = evaluate_arm(bad, tmp_path, sides[2], metric="accuracy")
    reference = (predict_probabilities(start, sides[2]).argmax(1) == np.array(sides[2].labels)).mean()
    assert part["linear_probe"] == pytest.approx(reference)
    assert part["metrics"]["accuracy"] == pytest.approx(7 / 21)
    assert part["below_linear_probe"]
    assert "ended below its linear probe on the test side (accuracy 0.3333 against" in part["warnings"][0]


def test_write_evaluation__stamp_and_arms(tmp_path):
    path = tmp_path / "evaluation.json"
    write_evaluation(path, {"mrl": {"linear_probe": 0.5}}, {"protocol_sha256": "abc"})
    write_evaluation(path, {"mrl": {"linear_probe": 0.75}, "baseline": {}}, {"protocol_sha256": "abc"})
    data = json.loads(path.read_text())
    assert data["schema"] == 1
    assert data["protocol_sha256"] == "abc"
    assert data["arms"] == {"mrl": {"linear_probe": 0.75}, "baseline": {}}


def test_predict_probabilities__any_timm_model(sides):
    net = timm.create_model("test_resnet", num_classes=2).eval()
    assert predict_probabilities(net, sides[2]).shape == (21, 2)
