import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from mrl.errors import ConfigError
from mrl.models import Classifier


class Plain(nn.Module):
    """A user's network that knows nothing of timm."""

    def __init__(self, out=7):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.blocks = nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(30)))
        self.mid = nn.Linear(6, 5)
        self.out = nn.Linear(5, out)

    def forward(self, x):
        return self.out(self.mid(self.blocks(self.stem(x)).mean((2, 3))).relu())


class Wrapped(nn.Module):
    def __init__(self, net, after):
        super().__init__()
        self.net, self.after = net, after

    def forward(self, x):
        return self.after(self.net(x))


X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
VIT = {"img_size": 32}


def test_classifier__vit_reads_cls_and_mean_patch():
    backbone = timm.create_model("test_vit", **VIT).eval()
    model = Classifier(backbone, 3, classes=["a", "b", "c"]).eval()
    tokens = backbone.forward_features(X)
    torch.testing.assert_close(model.features(X), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
    torch.testing.assert_close(model(X), model.head(model.features(X)))
    assert model.class_names == ("a", "b", "c")
    assert isinstance(backbone.head, nn.Identity)


def test_classifier__registers_are_neither_cls_nor_patches():
    backbone = timm.create_model("test_vit", reg_tokens=2, **VIT).eval()
    tokens = backbone.forward_features(X)
    expected = torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1)
    torch.testing.assert_close(Classifier(backbone, 2).features(X), expected)


def test_classifier__without_cls_reads_the_mean_and_its_norm():
    backbone = timm.create_model("test_vit", class_token=False, global_pool="avg", fc_norm=True, **VIT).eval()
    nn.init.normal_(backbone.fc_norm.weight)
    model = Classifier(backbone, 2)
    torch.testing.assert_close(model.features(X), backbone.fc_norm(backbone.forward_features(X).mean(1)))


@pytest.mark.parametrize("name", ["test_mrl", "test_resnet", "test_convnext", "test_efficientnet"])
def test_classifier__timm_convnets_read_pooled_features(name):
    backbone = timm.create_model(name, num_classes=5).eval()
    model = Classifier(backbone, 2).eval()
    pooled = backbone.forward_head(backbone.forward_features(X), pre_logits=True)
    torch.testing.assert_close(model.features(X), pooled)
    assert model(X).shape == (2, 2)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_classifier__every_tiny_vit(name):
    model = Classifier(timm.create_model(name, **VIT), 2)
    assert model(X).shape == (2, 2)


def test_classifier__other_modules_lose_their_last_linear_layer():
    backbone = Plain().eval()
    before = backbone(X)
    head = backbone.out
    model = Classifier(backbone, 2)
    assert isinstance(backbone.out, nn.Identity)
    torch.testing.assert_close(head(model.features(X)), before)


def test_classifier__output_without_a_linear_layer_is_the_features():
    backbone = Wrapped(Plain(), nn.Tanh()).eval()
    before = backbone(X)
    torch.testing.assert_close(Classifier(backbone, 2).features(X), before)


def test_classifier__refuses():
    with pytest.raises(ConfigError, match=r"returns \(2, 6, 56, 56\), not features"):
        Classifier(nn.Conv2d(3, 6, 4, stride=4), 2)
    with pytest.raises(ConfigError, match="2\\) with 1 names"):
        Classifier(Plain(), 2, classes=["only"])
    with pytest.raises(ConfigError, match="num_classes=0"):
        Classifier(Plain(), 0)


def test_classifier__building_leaves_random_state_and_mode():
    backbone = Plain().train()
    state = torch.random.get_rng_state()
    Classifier(backbone, 2)
    assert backbone.training
    torch.random.set_rng_state(state)
    expected = nn.init.trunc_normal_(nn.Linear(5, 2).weight, std=0.02)
    torch.random.set_rng_state(state)
    assert torch.equal(Classifier(backbone, 2).head.weight, expected)


def test_set_head__copies_and_checks():
    model = Classifier(Plain(), 2)
    model.set_head(torch.ones(2, 5).double(), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(model(X), model.features(X).sum(1, keepdim=True) + torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigError, match=r"this head is \(2, 5\)"):
        model.set_head(torch.ones(3, 5), torch.ones(3))


@pytest.mark.parametrize("name", ["test_vit", "test_mrl", "test_resnet", "test_convnext", None])
def test_layer_groups__name_every_parameter_once(name):
    model = Classifier(timm.create_model(name) if name else Plain(), 2)
    groups = model.layer_groups()
    parameters = dict(model.named_parameters())
    named = [pair for group in groups for pair in group]
    assert sorted(n for n, _ in named) == sorted(parameters)
    assert all(parameters[n] is p for n, p in named)
    assert all(groups)
    assert {"head.weight", "head.bias"} <= {n for n, _ in groups[-1]}


def test_layer_groups__vit_is_embeddings_blocks_norm_and_head():
    model = Classifier(timm.create_model("test_vit", **VIT), 2)
    names = [{name for name, _ in group} for group in model.layer_groups()]
    assert len(names) == len(model.backbone.blocks) + 2
    assert {"backbone.pos_embed", "backbone.patch_embed.proj.weight"} <= names[0]
    assert all(n.startswith("backbone.blocks.2.") for n in names[3])
    assert names[-1] == {"backbone.norm.weight", "backbone.norm.bias", "head.weight", "head.bias"}


def test_layer_groups__other_modules_are_grouped_in_order():
    groups = Classifier(Wrapped(Plain(), nn.Identity()), 2).layer_groups()
    assert len(groups) == 13
    assert groups[0][0][0] == "backbone.net.stem.weight"
    assert groups[-2][-1][0].startswith("backbone.net.out") or groups[-2][-1][0].startswith("backbone.net.mid")


@pytest.mark.parametrize("name", ["test_vit", "test_mrl"])
def test_classifier__exports_with_dynamic_batch(name, tmp_path):
    backbone = timm.create_model(name, **(VIT if name == "test_vit" else {}))
    model = Classifier(backbone, 2).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (X,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (X[:1], torch.cat([X, X.flip(0)])):
        ours = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(ours, model(x).detach(), atol=1e-5)
