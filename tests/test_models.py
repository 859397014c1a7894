import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import mrl.models
from mrl.blocks import RegionalLocalMixer
from mrl.errors import ConfigError
from mrl.models import MRLNet, convert_original

PUBLISHED = [
    ("mrl_13", 224, 20_171_496, 4.642),
    ("mrl_21", 224, 31_907_688, 7.464),
    ("mrl_tiny", 224, 30_529_192, 4.682),
    ("mrl_small", 224, 52_713_832, 9.036),
    ("mrl_hovernet", 256, 34_092_712, 7.032),
]


def gmacs(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(("name", "size", "params", "published"), PUBLISHED)
def test_net__published_size(name, size, params, published):
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    measured = gmacs(model, torch.empty(1, 3, size, size, device="meta"))
    assert measured == pytest.approx(published, rel=0.005)


def test_net__published_drop_path():
    model = timm.create_model("mrl_13", device="meta")
    rates = [[getattr(block.drop_path1, "drop_prob", 0.0) for block in stage.blocks] for stage in model.stages]
    assert rates[:2] == [[0.0], [0.0, 0.0]]
    assert rates[2] == pytest.approx([0.1 * i / 9 for i in range(10)])
    assert [block.drop_path2.drop_prob for block in model.stages[2].blocks[1:]] == rates[2][1:]


def test_net__published_scale():
    model = timm.create_model("mrl_tiny", device="meta")
    scales = {m.dim: m.scale for m in model.modules() if isinstance(m, RegionalLocalMixer)}
    assert scales == {dim: dim**-0.5 for dim in (96, 192, 384, 768)}


def test_net__initial_weights():
    model = timm.create_model("test_mrl")
    for name, parameter in model.named_parameters():
        linear = name.endswith("proj.weight") and parameter.ndim == 2
        if linear and parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
        if name.endswith("bias") and not any(part in name for part in ("local", "patch_embed.proj")):
            assert parameter.abs().max() == 0


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 8)])
def test_net__any_image_size_and_channels(size):
    model = timm.create_model("test_mrl", in_chans=1, num_classes=3)
    x = torch.randn(2, 1, *size)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(x).shape == (2, 3)


def test_net__features_and_head():
    model = timm.create_model("test_mrl", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, 32, 4, 4)
    assert features.is_contiguous(memory_format=torch.channels_last)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.get_classifier().weight.shape == (3, 32)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.num_classes == 5
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


def test_net__intermediates():
    model = timm.create_model("test_mrl").eval()
    x = torch.randn(2, 3, 32, 32)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8), (2, 32, 4, 4)]
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(normed[0].permute(0, 3, 1, 2), final)
    first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first[0], maps[0])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
    only = timm.create_model("test_mrl", features_only=True).eval()
    only.load_state_dict(
        {k.replace("stages.", "stages_"): v for k, v in model.stages.state_dict(prefix="stages.").items()}
    )
    for ours, expected in zip(only(x), maps, strict=True):
        torch.testing.assert_close(ours, expected)
    assert only.feature_info.channels() == [16, 32]
    assert only.feature_info.reduction() == [4, 8]
    assert model.prune_intermediate_layers([0]) == [0]
    torch.testing.assert_close(model(x), maps[0])


def test_net__gradient_checkpointing_changes_nothing():
    model = timm.create_model("test_mrl", drop_path_rate=0.0).train()
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_net__groups_run_from_input_to_head():
    model = timm.create_model("test_mrl")
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert [len(names) > 0 for names in groups.values()] == [True] * 5
    order = {name: i for i, names in groups.items() for name in names} if isinstance(groups, dict) else groups
    assert order["stages.0.patch_embed.proj.weight"] == 0
    assert order["stages.0.blocks.0.mlp.fc1.weight"] == 1
    assert order["stages.1.patch_embed.proj.weight"] == order["stages.1.blocks.0.norm1.weight"] == 2
    assert order["stages.1.blocks.1.norm1.weight"] == order["norm.weight"] == 3
    assert order["head.fc.weight"] == 4


def test_net__bf16_autocast_and_model():
    model, x = timm.create_model("test_mrl").eval(), torch.randn(2, 3, 32, 32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - exact).abs().max() < 0.05 * exact.abs().max()
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def original(model):
    """Our state dict with the authors' names: the inverse of the converter, written apart from it."""
    renamed = {}
    for key, value in model.state_dict().items():
        key = key.replace("stages.", "stage", 1).replace(".mixer.", ".attn.").replace("head.fc.", "head.")
        for n in "qkv":
            key = key.replace(f"{n}_proj.", f"proj_{n}.").replace(f"{n}_conv.", f"conv_proj_{n}.conv.")
            key = key.replace(f"{n}_norm.", f"conv_proj_{n}.bn.")
        renamed[key.replace("local.", "mix_locally.")] = value
    return renamed


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("num_classes", [0, 4])
def test_convert_original__any_network(wrapper, num_classes):
    spec = {"embed_dims": (8, 8, 16, 16, 32), "depths": (1, 11, 1, 1, 2), "num_heads": (1, 2, 2, 4, 4)}
    model = MRLNet(**spec, region_size=(8, 4, 3, 2, 1), num_classes=num_classes)
    theirs = {wrapper + key: value for key, value in original(model).items()}
    ours = convert_original(theirs)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in ours.items())


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_convert_original__any_mixer(qkv_bias):
    mixer = RegionalLocalMixer(8, 2, 3, qkv_bias=qkv_bias)
    theirs = original(mixer)
    assert ("proj_q.bias" in theirs) == qkv_bias
    theirs = {k: v.reshape(1) if k.endswith("num_batches_tracked") else v for k, v in theirs.items()}
    RegionalLocalMixer(8, 2, 3, qkv_bias=qkv_bias).load_state_dict(convert_original(theirs))


def test_convert_original__refuses_what_it_does_not_know():
    known = {"proj_q.weight": torch.ones(2, 2)}
    with pytest.raises(ConfigError, match=r"1 of 2 names .* surprise\.weight"):
        convert_original({**known, "surprise.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match="empty"):
        convert_original({})


def test_models__are_registered_once():
    assert {name for name, *_ in PUBLISHED} | {"test_mrl"} == set(timm.list_models(module="net"))
    assert mrl.models.MRLNet is MRLNet
