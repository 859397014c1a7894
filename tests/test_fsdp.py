"""What is cut into pieces, and what a launch that is set to FSDP refuses; whole fits are in `test_ddp.py`."""

import contextlib
import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from mrl import launched, ranks
from mrl.ddp import check_batch, check_pieces, spread
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
    assert cut_(net, [["weight"], ["bias"]], torch.device("cpu")) is net
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


def test_check_pieces__what_fully_shard_refuses_is_a_sentence():
    net = nn.Conv2d(3, 4, 3)
    check_pieces(net, "mrl")
    with pytest.raises(ConfigError, match="mrl: FSDP cannot cut weight, which is not contiguous"):
        check_pieces(net.to(memory_format=torch.channels_last), "mrl")
    net.gain = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="gain, which has no dimension"):
        check_pieces(net.to(memory_format=torch.contiguous_format), "mrl")


def test_spread__batch_norms_come_back_with_what_was_learned(monkeypatch):
    """Joined ones are put back, frozen ones too, also where the network was moved meanwhile, as `Loop._cut` does."""
    monkeypatch.setattr("mrl.ddp.world", lambda: 2)
    monkeypatch.setattr("mrl.ddp.in_pieces", lambda: True)
    monkeypatch.setattr("mrl.ddp.equal_", lambda tensors: None)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4).requires_grad_(False))
    own = [net[1], net[2]]
    found, undo = spread(net, torch.device("cuda"), "mrl")
    assert found is net
    assert {type(m) for m in net[1:]} == {nn.SyncBatchNorm}
    net._apply(lambda tensor: tensor.clone())  # what moving does: other buffers
    learned = {name: torch.rand_like(v) if v.is_floating_point() else v + 3 for name, v in net.state_dict().items()}
    undo()
    net.load_state_dict(learned)
    assert [net[1], net[2]] == own
    assert all(torch.equal(net.state_dict()[name], value) for name, value in learned.items())


def test_check_batch__fewer_validation_images_than_processes():
    check_batch("mrl", 8, 4, pairs=False, judging=4)
    with pytest.raises(ConfigError, match="4 processes cannot share 3 validation images"):
        check_batch("mrl", 8, 4, pairs=False, judging=3)


def test_gives_up__where_the_others_do_not_answer():
    code = "import time; from mrl.ranks import gives_up\nwith gives_up('The disk is full.', 0.2): time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "The disk is full. The other processes are still waiting; this one ends them." in done.stderr


def test_assist__an_error_of_its_own_waits_for_the_first_process_only_so_long(monkeypatch):
    told, inside = iter([{"tracker": "none", "fold": None, "arm": "mrl"}, None]), []

    @contextlib.contextmanager
    def patient(why):
        inside.append(why)
        yield

    def wrong(*args):
        raise ConfigError("b.png cannot be read.")

    monkeypatch.setattr(launched, "share", lambda: next(told))
    monkeypatch.setattr(launched, "gives_up", patient)
    monkeypatch.setattr(launched, "space_named", lambda run, fold: run)
    monkeypatch.setattr(launched.steps, "train_step", wrong)
    launched.assist("runs/none")
    assert inside == ["b.png cannot be read."]


def test_join_launch__one_process_keeps_the_switch_from_accelerate_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    ranks.join_launch()
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert not ranks.in_pieces()
