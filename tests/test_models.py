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
    ("mrl_13_common_qkv", 224, 17_137_448, 3.643),
    ("mrl_hovernet_common_qkv", 256, 29_283_688, 5.613),
    ("mrl_hovernet_common_qkv_p4m", 256, 29_330_992, 5.761),
]
VARIANTS = {
    "separate": {},
    "common": {"qkv": "common"},
    "common_p4m": {"qkv": "common", "local": "p4m"},
    "mean": {"reduce": "mean"},
    "value": {"local_source": "value", "learn_local_gain": "channel"},
}
every_variant = pytest.mark.parametrize("mixer_args", VARIANTS.values(), ids=VARIANTS)


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


@pytest.mark.parametrize("name", ["mrl_13", "mrl_21", "mrl_tiny", "mrl_small", "mrl_hovernet"])
def test_net__common_variants_differ_in_the_mixer_only(name):
    plain, common = (timm.create_model(name + end, device="meta") for end in ("", "_common_qkv"))
    shapes = [{k: v.shape for k, v in m.state_dict().items() if ".mixer." not in k} for m in (plain, common)]
    assert shapes[0] == shapes[1]
    mixers = [[m for m in model.modules() if isinstance(m, RegionalLocalMixer)] for model in (plain, common)]
    assert {m.qkv for m in mixers[1]} == {"common"}
    for ours, theirs in zip(*mixers, strict=True):
        assert (ours.region_size, ours.num_heads, ours.scale) == (theirs.region_size, theirs.num_heads, theirs.scale)
        assert ours.local.weight.shape == theirs.local.weight.shape


def test_net__initial_weights():
    model = timm.create_model("test_mrl")
    for name, parameter in model.named_parameters():
        linear = name.endswith("proj.weight") and parameter.ndim == 2
        if linear and parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
        if name.endswith("bias") and not any(part in name for part in ("local", "patch_embed.proj")):
            assert parameter.abs().max() == 0


@every_variant
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 8)])
def test_net__any_image_size_and_channels(size, mixer_args):
    model = timm.create_model("test_mrl", in_chans=1, num_classes=3, mixer_args=mixer_args)
    x = torch.randn(2, 1, *size)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(x).shape == (2, 3)


@every_variant
def test_net__features_and_head(mixer_args):
    model = timm.create_model("test_mrl", num_classes=3, mixer_args=mixer_args).eval()
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


@every_variant
def test_net__intermediates(mixer_args):
    model = timm.create_model("test_mrl", mixer_args=mixer_args).eval()
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
    only = timm.create_model("test_mrl", features_only=True, mixer_args=mixer_args).eval()
    only.model.load_state_dict(model.stages.state_dict(prefix="stages."))
    for ours, expected in zip(only(x), maps, strict=True):
        torch.testing.assert_close(ours, expected)
    assert only.feature_info.channels() == [16, 32]
    assert only.feature_info.reduction() == [4, 8]
    assert model.prune_intermediate_layers([0]) == [0]
    torch.testing.assert_close(model(x), maps[0])


@every_variant
def test_net__gradient_checkpointing_changes_nothing(mixer_args):
    model = timm.create_model("test_mrl", drop_path_rate=0.0, mixer_args=mixer_args).train()
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@every_variant
def test_net__folds(mixer_args):
    warmed = timm.create_model("test_mrl", mixer_args=mixer_args).train()
    for _ in range(3):
        warmed(torch.randn(4, 3, 32, 32))
    x = torch.randn(2, 3, 45, 30)
    y = warmed.eval()(x)
    folded = warmed.fold_()
    assert folded is warmed
    torch.testing.assert_close(folded(x), y, atol=1e-6, rtol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    with pytest.raises(ConfigError, match="folded already"):
        folded.fold_()


@pytest.mark.parametrize("name", ["mrl_13", "mrl_hovernet_common_qkv_p4m"])
def test_net__timm_configuration(name):
    model = timm.create_model(name, num_classes=0, features_only=True, out_indices=(0, 2), device="meta")
    assert model.feature_info.channels() == ([64, 384] if name == "mrl_13" else [96, 384])
    assert model.feature_info.reduction() == [4, 16]
    cfg = timm.get_pretrained_cfg(name).to_dict()
    whole = timm.create_model(name, device="meta")
    stem, head = whole.get_submodule(cfg["first_conv"]), whole.get_submodule(cfg["classifier"])
    assert (stem.in_channels, head.out_features) == (3, cfg["num_classes"])
    size = cfg["input_size"][-1]
    assert tuple(whole.forward_features(torch.empty(1, 3, size, size, device="meta")).shape[2:]) == cfg["pool_size"]


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
        head, common, rest = key.rpartition("basis.")
        if common and rest[0] in "qkv":
            key = head + "regional_atten.conv_proj_" + rest.replace("_conv", ".conv").replace("_norm", ".bn")
        elif common:
            renames = {"conv": "conv", "norm": "bn", "proj": "linear_indim"}
            part, last = rest.split(".")
            key = f"{head}basis_set_regional.{renames[part]}.{last}"
            value = value[:, :, None, None] if (part, last) == ("proj", "weight") else value
        else:
            for n in "qkv":
                key = key.replace(f"{n}_proj.", f"proj_{n}.").replace(f"{n}_conv.", f"conv_proj_{n}.conv.")
                key = key.replace(f"{n}_norm.", f"conv_proj_{n}.bn.")
        renamed[key.replace("local.", "mix_locally.")] = value
    return renamed


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("qkv", ["separate", "common"])
def test_convert_original__any_network(wrapper, num_classes, qkv):
    spec = {"embed_dims": (8, 8, 16, 16, 32), "depths": (1, 11, 1, 1, 2), "num_heads": (1, 2, 2, 4, 4)}
    model = MRLNet(**spec, region_size=(8, 4, 3, 2, 1), num_classes=num_classes, mixer_args={"qkv": qkv})
    theirs = {wrapper + key: value for key, value in original(model).items()}
    ours = convert_original(theirs)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in ours.items())


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(
    ("qkv", "bias"), [("separate", "proj_q.bias"), ("common", "basis_set_regional.linear_indim.bias")]
)
def test_convert_original__any_mixer(qkv_bias, qkv, bias):
    mixer, other = (RegionalLocalMixer(8, 2, 3, qkv_bias=qkv_bias, qkv=qkv) for _ in range(2))
    theirs = original(mixer)
    assert (bias in theirs) == qkv_bias
    theirs = {k: v.reshape(1) if k.endswith("num_batches_tracked") else v for k, v in theirs.items()}
    other.load_state_dict(convert_original(theirs))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in mixer.state_dict().items())


def test_convert_original__refuses_what_it_does_not_know():
    known = {"proj_q.weight": torch.ones(2, 2)}
    with pytest.raises(ConfigError, match=r"1 of 2 names .* surprise\.weight"):
        convert_original({**known, "surprise.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match="empty"):
        convert_original({})


def test_models__are_registered_once():
    five = {"mrl_13", "mrl_21", "mrl_tiny", "mrl_small", "mrl_hovernet"}
    ours = five | {f"{name}_common_qkv" for name in five} | {"mrl_hovernet_common_qkv_p4m", "test_mrl"}
    assert set(timm.list_models(module="net")) == ours
    assert {name for name, *_ in PUBLISHED} < ours
    assert mrl.models.MRLNet is MRLNet


def test_net__leaves_out_what_it_does_not_know_with_a_warning():
    with pytest.warns(UserWarning, match="MRLNet: output_stride=16 left out"):
        model = timm.create_model("test_mrl", output_stride=16)
    assert model.feature_info[-1]["reduction"] == 8


@every_variant
def test_net__exports_with_dynamic_batch(mixer_args):
    model = timm.create_model("test_mrl", num_classes=3, mixer_args=mixer_args).eval()
    x = torch.randn(3, 3, 40, 33)
    for form in ("plain", "folded"):
        if form == "folded":
            model.fold_()
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        for size in (1, 3):
            torch.testing.assert_close(program.module()(x[:size]), model(x[:size]), atol=1e-5, rtol=1e-5)


def test_net__mixer_args_keep_the_variants_own():
    model = timm.create_model("mrl_13_common_qkv", mixer_args={"reduce": "mean"}, device="meta")
    mixers = [m for m in model.modules() if isinstance(m, RegionalLocalMixer)]
    assert {(m.qkv, m.reduce) for m in mixers} == {("common", "mean")}


@pytest.mark.slow
@every_variant
def test_net__compiles_without_a_graph_break(mixer_args):
    torch.compiler.reset()
    model = timm.create_model("test_mrl", num_classes=3, drop_path_rate=0.0, mixer_args=mixer_args)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        model.train(training)
        x = torch.randn(2, 3, 32, 40)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


NET = {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "region_size": 2, "num_classes": 3}
CHANGES = {
    "embed_dims": (16, 48), "depths": (1, 2), "num_heads": (2, 2), "region_size": (2, 1), "group_size": 2,
    "mlp_ratio": 2.0, "num_classes": 5, "in_chans": 1, "global_pool": "max", "drop_rate": 0.9, "drop_path_rate": (0.9, 0.9),
    "mixer_args": {"local_gain": 0.5}, "dtype": torch.float64,
}  # fmt: skip


@pytest.mark.parametrize("argument", CHANGES)
def test_net__every_argument_changes_something(argument):
    def outcome(**kwargs):
        settings = {**NET, "depths": (2, 2) if argument == "drop_path_rate" else NET["depths"], **kwargs}
        torch.manual_seed(3)
        net = MRLNet(**settings).train()
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in net.state_dict().items()}
        torch.manual_seed(4)
        x = torch.randn(4, net.in_chans, 32, 32, dtype=net.norm.weight.dtype)
        return shapes, net(x)

    (shapes, y), (changed_shapes, changed_y) = outcome(), outcome(**{argument: CHANGES[argument]})
    assert shapes != changed_shapes or not torch.allclose(y, changed_y)


@pytest.mark.parametrize("grad", [True, False])
def test_quick_gelu__equals_timms(grad):
    from timm.layers import QuickGELU

    from mrl.models.layers import QuickGELU as Ours

    x = torch.linspace(-8, 8, 101).double().requires_grad_()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(Ours()(x), QuickGELU()(x), rtol=1e-12, atol=1e-14)
    if grad:
        assert torch.autograd.gradcheck(Ours(), x)
