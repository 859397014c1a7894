import itertools

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import reference
from mrl.blocks import (
    CommonQKVAttention,
    LocalConv,
    RegionalLocalMixer,
    RegionConv,
    RegionNorm,
    attend,
    broadcast_regions,
    region_grid,
    region_mean,
    region_pair,
    valid_counts,
)
from mrl.errors import ConfigError

SIZES = [(4, 6), (5, 6), (5, 7), (1, 1), (2, 3), (7, 4)]


def randomized(module):
    """`module` with parameters and running statistics that hide no mistake."""
    generator = torch.Generator().manual_seed(1)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            value.copy_(0.5 + noise.abs() if name.endswith("running_var") else noise * 0.4)
    return module


def by_cells(height, width, region):
    return reference.regions(height, width, region)


# Primitives


@pytest.mark.parametrize("wrong", [0, -1, (2, 0), 2.0, "2", True, (1, 2, 3), None])
def test_region_pair__refuses(wrong):
    with pytest.raises(ConfigError, match=r"region_size=.* 1 or more"):
        region_pair(wrong)


def test_region_pair__accepts():
    assert region_pair(np.int64(3)) == (3, 3)
    assert region_pair([1, 2]) == (1, 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("region", [(1, 1), (2, 2), (4, 2), (3, 3)])
def test_primitives__equal_loops(size, region):
    height, width = size
    cells = by_cells(height, width, region)
    grid = region_grid(height, width, region)
    assert valid_counts(height, width, region).flatten().tolist() == [len(cell) for cell in cells]
    x = torch.randn(2, height, width, 3, dtype=torch.float64)
    mean = region_mean(x, region)
    assert mean.shape == (2, *grid, 3)
    conv = randomized(RegionConv(3, region, dtype=torch.float64))
    reduced = conv(x)
    full = broadcast_regions(mean, height, width, region)
    assert full.shape == x.shape
    for r, cell in enumerate(cells):
        at = divmod(r, grid[1])
        expected = sum(x[:, i, j] for i, j, _, _ in cell) / len(cell)
        torch.testing.assert_close(mean[:, at[0], at[1]], expected)
        taps = sum(x[:, i, j] * conv.weight[:, 0, a, b] for i, j, a, b in cell) * region[0] * region[1] / len(cell)
        torch.testing.assert_close(reduced[:, at[0], at[1]], taps)
        for i, j, _, _ in cell:
            assert torch.equal(full[:, i, j], mean[:, at[0], at[1]])
    torch.testing.assert_close(conv.init_average_()(x), mean)


def test_attend__key_bias_counts_a_key_twice():
    q, k, v = torch.randn(3, 2, 5, 8).double()
    twice = attend(q, torch.cat([k, k[:, :1]], 1), torch.cat([v, v[:, :1]], 1), 2, 0.3)
    bias = torch.tensor([2.0, 1, 1, 1, 1]).log()
    torch.testing.assert_close(attend(q, k, v, 2, 0.3, key_bias=bias), twice, atol=1e-7, rtol=0)
    full = bias.expand(2, 1, 5, 5)
    torch.testing.assert_close(attend(q, k, v, 2, 0.3, key_bias=full), twice, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("group_size", "kernel_size"), [(1, 1), (1, 3), (2, 3), (4, 5)])
def test_local_conv__delta_is_identity(group_size, kernel_size):
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(LocalConv(4, kernel_size, group_size).init_delta_()(x), x)


@pytest.mark.parametrize(("kwargs", "match"), [({"kernel_size": 2}, "is odd"), ({"group_size": 3}, "1, 2 or 4")])
def test_local_conv__refuses(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        LocalConv(4, **kwargs)


@pytest.mark.parametrize("training", [True, False])
def test_region_norm__equals_batch_norm(training):
    ours, torchs = randomized(RegionNorm(6).double()), nn.BatchNorm2d(6).double()
    torchs.load_state_dict(ours.state_dict())
    ours.train(training), torchs.train(training)
    x = torch.randn(2, 3, 4, 6).double()
    torch.testing.assert_close(ours(x), torchs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


def test_region_norm__single_value_uses_running_statistics():
    norm = randomized(RegionNorm(6)).train()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(1, 1, 1, 6)
    y = norm(x)
    assert torch.equal(y, norm.eval()(x))
    torch.testing.assert_close(norm.state_dict(), before)


def test_region_norm__half_precision_keeps_statistics_wide():
    built, turned = RegionNorm(6, dtype=torch.bfloat16), RegionNorm(6).to(torch.bfloat16)
    for norm in (built, turned):
        assert norm.weight.dtype == torch.bfloat16
        assert norm.running_var.dtype == torch.float32
        x = (1000 + torch.randn(64, 2, 2, 6)).bfloat16()
        assert norm(x).dtype == torch.bfloat16
        torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean((0, 1, 2)))


# The mixer

VARIANTS = [
    {},
    {"local_source": "value"},
    {"reduce": "mean"},
    {"reduce": "mean", "local_source": "value", "local_gain": 0.5},
    {"local_gain": 0.0},
    {"qkv_bias": False, "group_size": 4, "kernel_size": 5, "scale": 0.2},
    {"local": "p4m", "group_size": 2},
]
COMMON = [
    {"qkv": "common"},
    {"qkv": "common", "qkv_bias": False, "reduce": "mean", "local_gain": 0.5},
    {"qkv": "common", "local": "p4m", "group_size": 4},
]


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 3)])
@pytest.mark.parametrize("region", [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize(("prefix", "training"), [(0, False), (2, False), (0, True), (1, True)])
def test_mixer__equals_reference(size, region, prefix, training):
    batch = 1 if size == (1, 3) else 2
    x = torch.randn(batch, *size, 8, dtype=torch.float64)
    tokens = torch.randn(batch, prefix, 8, dtype=torch.float64) if prefix else None
    for variant, composed in [*((v, c) for v in VARIANTS for c in (False, True)), *((v, False) for v in COMMON)]:
        if prefix and variant.get("qkv") == "common":
            continue
        mixer = randomized(RegionalLocalMixer(8, 2, region, **variant).double()).train(training)
        mixer._composes = lambda x, answer=composed: answer
        weights = {name: value.detach().clone().numpy() for name, value in mixer.state_dict().items()}
        told = {key: variant[key] for key in ("local_gain", "local_source", "reduce") if key in variant}
        y, prefix_out, seen = reference.mixer(
            x.numpy(), weights, num_heads=2, region=region, scale=variant.get("scale", 4**-0.5),
            prefix=None if tokens is None else tokens.numpy(), training=training, **told,
        )  # fmt: skip
        ours = mixer(x, tokens)
        ours, ours_prefix = ours if prefix else (ours, None)
        np.testing.assert_allclose(ours.detach().numpy(), y, rtol=1e-9, atol=1e-9, err_msg=str(variant))
        if prefix:
            np.testing.assert_allclose(ours_prefix.detach().numpy(), prefix_out, rtol=1e-9, atol=1e-9)
        after = mixer.state_dict()
        for norm, statistics in seen.items():
            old = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
            for name, before, now in zip(("mean", "var"), old, statistics or old, strict=True):
                np.testing.assert_allclose(after[f"{norm}.running_{name}"], 0.9 * before + 0.1 * now)


def neutral(**kwargs):
    """A mixer whose reduction, norms and local convolution do nothing."""
    mixer = RegionalLocalMixer(12, 3, local_gain=0.0, **kwargs).eval()
    for name, module in mixer.named_modules():
        if name.endswith("_conv"):
            module.init_average_()
        if name.endswith("_norm"):
            module.running_var.fill_(1 - module.eps)
    mixer.local.init_delta_()
    return mixer


@pytest.mark.parametrize("reduce", ["depthwise", "mean"])
def test_mixer__region_1_is_softmax_attention(reduce):
    mixer = neutral(region_size=1, reduce=reduce)
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        for i, part in enumerate((mixer.q_proj, mixer.k_proj, mixer.v_proj)):
            attention.in_proj_weight[12 * i : 12 * i + 12] = part.weight
            attention.in_proj_bias[12 * i : 12 * i + 12] = part.bias
        attention.out_proj.load_state_dict(mixer.proj.state_dict())
    x, prefix = torch.randn(2, 3, 5, 12), torch.randn(2, 2, 12)
    tokens = torch.cat([prefix, x.flatten(1, 2)], 1)
    expected = attention(tokens, tokens, tokens, need_weights=False)[0]
    y, prefix_out = mixer(x, prefix)
    torch.testing.assert_close(torch.cat([prefix_out, y.flatten(1, 2)], 1), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_mixer__mean_equals_average_initialised_depthwise(size):
    depthwise, mean = neutral(region_size=(2, 3)), neutral(region_size=(2, 3), reduce="mean")
    mean.load_state_dict({k: v for k, v in depthwise.state_dict().items() if "_conv" not in k})
    x = torch.randn(2, *size, 12)
    torch.testing.assert_close(mean(x), depthwise(x), atol=1e-6, rtol=1e-5)


CHANGES = {
    "dim": 24, "num_heads": 2, "region_size": 3, "group_size": 2, "kernel_size": 5, "qkv_bias": False, "scale": 3.0,
    "local_gain": 0.5, "local_source": "value", "reduce": "mean", "attn_drop": 0.5, "proj_drop": 0.5,
    "learn_local_gain": "channel", "dtype": torch.float64, "qkv": "common", "local": "p4m",
}  # fmt: skip


@pytest.mark.parametrize("argument", CHANGES)
def test_mixer__every_argument_changes_something(argument):
    def outcome(**kwargs):
        torch.manual_seed(3)
        mixer = RegionalLocalMixer(**{"dim": 48, "num_heads": 3, "region_size": 2, **kwargs})
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in mixer.state_dict().items()}
        randomized(mixer)
        torch.manual_seed(4)
        return shapes, mixer(torch.randn(2, 6, 6, mixer.dim, dtype=mixer.proj.weight.dtype))

    (shapes, y), (changed_shapes, changed_y) = outcome(), outcome(**{argument: CHANGES[argument]})
    assert shapes != changed_shapes or not torch.allclose(y, changed_y)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"dim": 30, "num_heads": 4}, r"30 is not a multiple of 4; use 1, 2, 3, 5, 6, 10, 15 or 30 heads\."),
        ({"region_size": 0}, "region_size=0"),
        ({"qkv": "common", "local_source": "value"}, "no full-resolution values; use local_source='input'"),
        ({"local": "p4m"}, "12 channels are not fields of 8 orientations; use 16 channels"),
        ({"local": "p4"}, "'conv' or 'p4m'"),
        ({"qkv": "joint"}, "'separate' or 'common'"),
        ({"local_source": "output"}, "'input' or 'value'"),
        ({"reduce": "max"}, "'depthwise' or 'mean'"),
        ({"learn_local_gain": "yes"}, "None or 'scalar' or 'channel'"),
        ({"basis_drop": 0.1}, "no basis to drop"),
    ],
)
def test_mixer__refuses(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        RegionalLocalMixer(**{"dim": 12, "num_heads": 3, "region_size": 2, **kwargs})


def test_mixer__basis_drop_changes_training_only():
    torch.manual_seed(0)
    plain, dropping = (RegionalLocalMixer(12, 3, 2, qkv="common", basis_drop=p) for p in (0.0, 0.5))
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 6, 12)
    assert torch.equal(plain.eval()(x), dropping.eval()(x))
    assert not torch.allclose(plain.train()(x), dropping.train()(x))


def test_mixer__common_basis_has_no_prefix():
    with pytest.raises(ConfigError, match="prefix tokens are on no map"):
        RegionalLocalMixer(12, 3, 2, qkv="common")(torch.randn(2, 4, 4, 12), torch.randn(2, 1, 12))


def test_mixer__refuses_tokens():
    with pytest.raises(ConfigError, match=r"\(2, 9, 12\); give a map"):
        RegionalLocalMixer(12, 3, 2)(torch.randn(2, 9, 12))


@pytest.mark.parametrize(("learn", "shape"), [("scalar", ()), ("channel", (12,))])
def test_mixer__learned_gain_is_a_parameter(learn, shape):
    fixed, learned = (RegionalLocalMixer(12, 3, 2, local_gain=0.0, learn_local_gain=how) for how in (None, learn))
    assert "local_gain" not in fixed.state_dict()
    learned.load_state_dict({**fixed.state_dict(), "local_gain": torch.zeros(shape)})
    x = torch.randn(2, 4, 4, 12)
    y = learned(x)
    torch.testing.assert_close(y, fixed(x))
    y.square().sum().backward()
    assert learned.local_gain.shape == shape
    assert learned.local_gain.grad.abs().min() > 0


def test_mixer__one_region_of_one_image_trains():
    mixer = RegionalLocalMixer(12, 3, 4)
    mixer(torch.randn(1, 4, 4, 12)).sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
def test_mixer__gradients_are_right(size):
    mixer = randomized(RegionalLocalMixer(4, 2, (2, 3), local_source="value", learn_local_gain="channel").double())
    inputs = torch.randn(2, *size, 4).double().requires_grad_(), torch.randn(2, 1, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(mixer.eval(), inputs)


def test_mixer__bf16_autocast_is_near_and_finite():
    mixer = RegionalLocalMixer(12, 3, 2)
    x, prefix = torch.randn(2, 5, 7, 12), torch.randn(2, 1, 12)
    exact = mixer(x, prefix)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, prefix_out = mixer(x, prefix)
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    (y.float().sum() + prefix_out.float().sum()).backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
def test_region_conv__learns_in_bf16_through_float32(size):
    conv, x = RegionConv(12, (2, 3)), torch.randn(2, *size, 12, requires_grad=True)
    exact = conv(x)
    grads = torch.autograd.grad(exact.square().sum(), (x, conv.weight))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        y_half = conv(x.bfloat16())
    assert y.dtype == y_half.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=1e-6)  # float32, rounded once, ragged regions twice
    torch.testing.assert_close(y_half.float(), exact, rtol=0.02, atol=0.02)
    half = torch.autograd.grad(y.float().square().sum(), (x, conv.weight))
    for ours, true in zip(half, grads, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, true, rtol=0.02, atol=0.02 * float(true.abs().max()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv(x), y, rtol=0.02, atol=0.02)  # no backward: the kernel of bfloat16


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_mixer__bf16_model_runs(size):
    mixer = RegionalLocalMixer(12, 3, 2, dtype=torch.bfloat16, learn_local_gain="scalar")
    x, prefix = torch.randn(2, *size, 12).bfloat16(), torch.randn(2, 1, 12).bfloat16()
    assert {t.dtype for t in mixer(x, prefix)} == {torch.bfloat16}


def test_mixer__survives_conversion_to_sync_batch_norm():
    mixer = randomized(RegionalLocalMixer(4, 2, 2))
    x = torch.randn(2, 8, 4, 4)  # Hr = C: the axes could be confused
    expected = mixer.eval()(x)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(mixer).eval()(x), expected)


@pytest.mark.parametrize(("size", "variant"), [((5, 7), {}), ((6, 4), {"reduce": "mean", "local_gain": 0.0})])
def test_mixer__exports_with_dynamic_batch(size, variant, tmp_path):
    mixer = randomized(RegionalLocalMixer(12, 3, 2, **variant)).eval()
    x, prefix = torch.randn(3, *size, 12), torch.randn(3, 1, 12)
    batch = torch.export.Dim.DYNAMIC
    exported = torch.export.export(mixer, (x[:2], prefix[:2]), dynamic_shapes=({0: batch}, {0: batch}))
    for ours, expected in zip(exported.module()(x, prefix), mixer(x, prefix), strict=True):
        torch.testing.assert_close(ours, expected)
    path = tmp_path / "mixer.onnx"
    torch.onnx.export(
        mixer, (x[:2], prefix[:2]), path, dynamo=True, dynamic_shapes=({0: batch}, {0: batch}), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for size_of_batch in (1, 3):
        feed = dict(zip(names, (x[:size_of_batch].numpy(), prefix[:size_of_batch].numpy()), strict=True))
        for ours, expected in zip(session.run(None, feed), mixer(x, prefix), strict=True):
            np.testing.assert_allclose(ours, expected[:size_of_batch].detach(), atol=1e-5)


def test_mixer__keeps_maps_contiguous():
    x = torch.randn(2, 8, 8, 16)
    for variant, training in itertools.product(({}, {"reduce": "mean"}), (False, True)):
        assert RegionalLocalMixer(16, 2, 2, **variant).train(training)(x).is_contiguous()


# Attention with a common basis and no regions

COMMON_CHANGES = {
    "dim": 24, "num_heads": 2, "kv_stride": 2, "qkv_bias": False, "scale": 3.0, "basis_drop": 0.5, "attn_drop": 0.5,
    "proj_drop": 0.5, "dtype": torch.float64,
}  # fmt: skip


@pytest.mark.parametrize("argument", COMMON_CHANGES)
def test_common_attention__every_argument_changes_something(argument):
    def outcome(**kwargs):
        attention = CommonQKVAttention(**{"dim": 12, "num_heads": 3, **kwargs})
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in attention.state_dict().items()}
        randomized(attention)
        torch.manual_seed(4)
        return shapes, attention(torch.randn(2, 5, 6, attention.dim, dtype=attention.proj.weight.dtype))

    (shapes, y), (changed_shapes, changed_y) = outcome(), outcome(**{argument: COMMON_CHANGES[argument]})
    assert shapes != changed_shapes or not torch.allclose(y, changed_y)


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (7, 5)])
@pytest.mark.parametrize("kv_stride", [1, 2, 3])
def test_common_attention__equals_torch_modules(size, kv_stride):
    ours = randomized(CommonQKVAttention(8, 2, kv_stride=kv_stride).double()).eval()
    x = torch.randn(2, *size, 8).double()

    def conv(x, name, stride=1):
        weight = ours.get_parameter(f"basis.{name}.weight")
        return nn.functional.conv2d(x, weight, stride=stride, padding=1, groups=8)

    def norm(x, name):
        norm = nn.BatchNorm2d(8).double().eval()
        norm.load_state_dict(ours.get_submodule(f"basis.{name}").state_dict())
        return norm(x)

    basis = ours.basis.proj(norm(conv(x.permute(0, 3, 1, 2), "conv"), "norm").permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    q, k, v = (norm(conv(basis, f"{n}_conv", 1 if n == "q" else kv_stride), f"{n}_norm").flatten(2).mT for n in "qkv")
    q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v))
    share = (q @ k.mT * 8**-0.5).softmax(-1)
    expected = ours.proj((share @ v).transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"num_heads": 5}, "12 is not a multiple of 5"), ({"num_heads": 3, "kv_stride": 0}, "kv_stride=0.*1 or more")],
)
def test_common_attention__refuses(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        CommonQKVAttention(12, **kwargs)
    with pytest.raises(ConfigError, match="give a map"):
        CommonQKVAttention(12, 3)(torch.randn(2, 9, 12))
