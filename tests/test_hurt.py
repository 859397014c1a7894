"""A refused precision names the layers that hurt, and the right ones."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

import mrl
from mrl.data import Preprocess
from mrl.deploy import hurt
from mrl.deploy.hurt import layers_that_hurt
from mrl.errors import ConfigError, ParityError
from mrl.export import Lossy, export_model
from test_formats import CLASSES, network, photos


def planted(name="stages.1.blocks.0.mlp.fc2", factor=3e4):
    """A network whose named layer reads one input of a huge range that means nothing: 8 bits have no room for the others."""
    model = network()
    layer = model.get_submodule(name)
    before = model.get_submodule(name.replace("fc2", "fc1"))
    with torch.no_grad():
        before.weight[0] *= 0
        before.bias[0] = factor  # after the activation: a constant of this size
        layer.weight *= 40  # so that the branch counts at all beside the residual
        layer.weight[:, 0] = 0
    return model


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_layers_that_hurt__finds_the_planted_one_and_alters_nothing(precision):
    name = "stages.1.blocks.0.mlp.fc2"
    model = planted(
        factor=3e4 if precision == "int8" else 1e5
    )  # above 65,504: infinite in fp16, and 0 times that is no number
    state = copy.deepcopy(model.state_dict())
    found = layers_that_hurt(model, photos(16), precision)
    names = [each.layer for each in found]
    assert sorted(names) == sorted(n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    assert [each.change for each in found] == sorted((each.change for each in found), reverse=True)
    if precision == "int8":
        assert names[0] == name
        assert found[0].change > 5 * found[1].change
    elif precision == "fp16":
        assert (names[0], found[0].change) == (name, 1.0)
    else:
        assert found[0].change < 0.1  # bf16 has the range
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert name not in [each.layer for each in layers_that_hurt(model, photos(16), precision, skip=[name])]


@pytest.mark.slow
def test_layers_that_hurt__rounds_what_the_file_rounds(tmp_path):
    """All layers in one group: the change is of the size of NNCF's int8, which it stands for."""
    from mrl.deploy.formats import write_format
    from mrl.deploy.runtimes import open_runtime

    pytest.importorskip("nncf")
    model, images = network("vit_tiny_patch16_224", size=(32, 48)), photos(64)
    path = write_format(model, tmp_path / "m.xml", (32, 48), precision="int8", calibration=list(images))
    with torch.no_grad():
        expected = torch.softmax(model(images), -1).numpy()
    real = float(np.abs(open_runtime(path)(images) - expected).sum(1).mean() / 2)
    whole = layers_that_hurt(nn.Sequential(model), images, "int8", seconds=1e-9)
    assert [each.layer for each in whole] == ["0"]
    assert real / 4 < whole[0].change < 4 * real


def test_layers_that_hurt__a_short_time_takes_blocks():
    model = network()
    few = [each.layer for each in layers_that_hurt(model, photos(8), "int8", seconds=1e-9)]
    assert few == sorted(set(few), key=few.index)
    assert set(few) <= {n for n, _ in model.named_children()}
    names = ["a.b.c", "a.b.d", "a.e", "f"]
    assert list(hurt._groups(names, 4)) == names
    assert hurt._groups(names, 3) == {"a.b": ["a.b.c", "a.b.d"], "a.e": ["a.e"], "f": ["f"]}
    assert hurt._groups(names, 1) == {"a": ["a.b.c", "a.b.d", "a.e"], "f": ["f"]}
    assert hurt._groups([], 4) == {}


def test_layers_that_hurt__folded_mixers_are_layers_too():
    model = timm.create_model("test_mrl", num_classes=3).eval().fold_()
    names = [each.layer for each in layers_that_hurt(model, photos(8), "int8")]
    assert any(name.endswith("mixer.folded") for name in names)
    assert not any(".q_proj" in name for name in names)


def test_layers_that_hurt__positions_and_tokens_are_no_layers():
    model = network("test_vit")
    mrl.swap_(model, mrl.plan(model, region=2))
    names = [each.layer for each in layers_that_hurt(model, photos(8), "int8")]
    assert "" not in names
    assert "blocks.0.mlp.fc1" in names


def test_layers_that_hurt__float32_rounds_nothing():
    with pytest.raises(ConfigError, match="use int8, fp16 or bf16"):
        layers_that_hurt(network(), photos(8), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_export_model__int8_without_accuracy_control_names_the_layer_too(format, tmp_path):
    """No validation side, so NNCF gives nothing back and names nothing: the refusal still knows."""
    pytest.importorskip("nncf")
    model, images = planted(), photos(640, seed=3)
    with torch.no_grad():
        target = torch.softmax(model(images), -1).argmax(1).numpy()
    lossy = Lossy("int8", 0.005, targets=target, calibration=list(images[:64]))
    given = {"preprocess": Preprocess((32, 48)), "classes": CLASSES, "images": images}
    with pytest.raises(
        ParityError, match=r"int8 drops accuracy .*layers that hurt: stages\.1\.blocks\.0\.mlp\.fc2 "
    ) as told:
        export_model(model, tmp_path / ("m.xml" if format == "openvino" else "m.onnx"), lossy=lossy, **given)
    facts = told.value.facts
    assert facts["hurt"][0]["layer"] == "stages.1.blocks.0.mlp.fc2"
    assert facts["flips"] > 0
    assert facts["drop"]["high"] > 0.005
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_model__fp16_that_overflows_names_the_layer(tmp_path):
    given = {"preprocess": Preprocess((32, 48)), "classes": CLASSES, "images": photos(600)}
    with pytest.raises(
        ParityError, match=r"not finite.*layers that hurt: stages\.1\.blocks\.0\.mlp\.fc2 100 %.*; nothing"
    ):
        export_model(planted(factor=1e5), tmp_path / "m.onnx", lossy=Lossy("fp16"), **given)
    assert list(tmp_path.iterdir()) == []
