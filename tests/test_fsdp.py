"""What is cut into pieces, and what a launch that is set to FSDP refuses; whole fits are in `test_ddp.py`."""

import pytest
import timm
import torch
from torch import nn

from mrl import ranks
from mrl.errors import ConfigError
from mrl.fsdp import blocks_of, cut_, piece, whole
from mrl.models import Classifier
from mrl.optimizer import make_accelerator
from test_fit import make_model


def names(model):
    return [[name for name, _ in group] for group in model.layer_groups()]


@pytest.mark.parametrize("model", ["test_vit", "test_mrl", "test_resnet", "test_convnext"])
def test_blocks_of__are_called_and_have_their_parameters_for_themselves(model):
    net = Classifier(timm.create_model(model), 2).eval()
    found, called = blocks_of(net, names(net)), []
    for block in found:
        block.register_forward_hook(lambda module, args, out: called.append(module))
    with torch.no_grad():
        net(torch.randn(1, 3, *((160, 160) if model == "test_vit" else (32, 32))))
    assert called == found
    assert len(found) >= 2
    parameters = [id(p) for block in found for p in block.parameters()]
    assert len(parameters) == len(set(parameters))


def test_blocks_of__swapped_blocks_too():
    import mrl

    net = make_model("test_vit")
    mrl.swap_(net.backbone, mrl.plan(net.backbone, region=2))
    assert blocks_of(net, names(net)) == list(net.backbone.blocks)


def test_blocks_of__what_is_no_module_of_its_own_is_left_to_the_network():
    net = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1), "c": nn.ModuleList([nn.Linear(1, 1)])})
    layers = [["a.weight"], ["a.bias", "b.weight"], ["b.bias"], ["c.0.weight"], ["c.0.bias"]]
    assert blocks_of(net, layers) == []


def test_alone__nothing_is_cut():
    net = nn.Linear(2, 2)
    assert cut_(net, [["weight"], ["bias"]]) is net
    state = net.state_dict()
    assert all(whole(state)[name] is value for name, value in state.items())
    assert piece(state["bias"], net.bias) is state["bias"]
    assert not ranks.in_pieces()


def test_make_accelerator__fp16_of_a_network_in_pieces_is_refused(monkeypatch):
    monkeypatch.setattr("mrl.optimizer.in_pieces", lambda: True)
    monkeypatch.setattr("mrl.optimizer.pick_precision", lambda *_: "fp16")
    with pytest.raises(ConfigError, match="use bf16 or fp32"):
        make_accelerator("fp16")


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_join_launch__other_engines_are_refused(monkeypatch, name):
    monkeypatch.setattr("mrl.ranks.world", lambda: 2)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match=name):
        ranks.join_launch()
