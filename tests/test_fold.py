"""The composed training path and the inference form, against the plain path."""

import copy

import pytest
import torch
from torch import nn

from mrl.blocks import CommonQKVAttention, RegionalLocalMixer, fold_
from mrl.blocks import fold as fold_module
from mrl.blocks.compose import compose, region_linear, region_patches
from mrl.errors import ConfigError
from test_blocks import randomized

VARIANTS = {
    "paper": {},
    "no_bias": {"qkv_bias": False},
    "value": {"local_source": "value", "local_gain": 0.5},
    "mean": {"reduce": "mean"},
    "mean_value": {"reduce": "mean", "local_source": "value"},
    "no_source": {"local_gain": 0.0, "learn_local_gain": None},
    "learned": {"local_gain": 0.3, "learn_local_gain": "channel"},
    "p4m": {"local": "p4m", "group_size": 2},
    "common": {"qkv": "common"},
    "common_no_bias": {"qkv": "common", "qkv_bias": False},
    "common_mean_p4m": {"qkv": "common", "reduce": "mean", "local": "p4m"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
sizes = pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 1)])


def make(variant, region=(4, 3), dim=16):
    return randomized(RegionalLocalMixer(dim, 2, region, **variant).double()).eval()


# The inference form


@every_variant
@sizes
@pytest.mark.parametrize("one_gemm_from", [0, 10**9])
def test_fold__changes_nothing(variant, size, one_gemm_from, monkeypatch):
    monkeypatch.setattr(fold_module, "ONE_GEMM_FROM", one_gemm_from)
    mixer, x = make(variant), torch.randn(2, *size, 16).double()
    folded = copy.deepcopy(mixer).fold_()
    torch.testing.assert_close(folded(x), mixer(x), atol=1e-11, rtol=1e-10)
    if variant.get("qkv") != "common":
        prefix = torch.randn(2, 3, 16).double()
        torch.testing.assert_close(folded(x, prefix), mixer(x, prefix), atol=1e-11, rtol=1e-10)


@every_variant
def test_fold__leaves_no_norm_and_no_gradient(variant):
    mixer = make(variant).train()
    assert mixer.fold_() is mixer
    assert not mixer.training
    names = [name for name, _ in mixer.named_modules()]
    assert not any(name.endswith(("_norm", "_proj", "_conv", "basis")) for name in names if name != "proj")
    assert not any(p.requires_grad for p in mixer.folded.parameters())
    with pytest.raises(ConfigError, match="folded already"):
        mixer.fold_()


@pytest.mark.parametrize("kv_stride", [1, 2, 3])
@sizes
def test_fold__common_qkv_attention(kv_stride, size):
    attention = randomized(CommonQKVAttention(16, 2, kv_stride=kv_stride).double()).eval()
    x = torch.randn(2, *size, 16).double()
    y = attention(x)
    torch.testing.assert_close(attention.fold_()(x), y, atol=1e-11, rtol=1e-10)


def test_fold__leaves_the_output_projection_to_whoever_wraps_it():
    mixer = make({})
    mixer.proj = nn.Sequential(mixer.proj, nn.Identity())
    x = torch.randn(1, 5, 6, 16).double()
    y = mixer(x)
    torch.testing.assert_close(mixer.fold_()(x), y, atol=1e-11, rtol=1e-10)
    basis = make({"qkv": "common"})
    basis.basis.proj = nn.Sequential(basis.basis.proj)
    with pytest.raises(ConfigError, match=r"fold_: basis\.proj is a Sequential"):
        basis.fold_()


def test_fold__saves_and_loads():
    mixer, other = make({}), make({"local_gain": 1.0})
    other.fold_()
    other.load_state_dict(mixer.fold_().state_dict())
    x = torch.randn(1, 5, 6, 16).double()
    assert torch.equal(other(x), mixer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold__keeps_the_number_format(dtype):
    mixer = RegionalLocalMixer(16, 2, 2).to(dtype).eval()
    x = torch.randn(1, 4, 6, 16, dtype=dtype)
    y = mixer(x)
    folded = mixer.fold_()
    assert {p.dtype for p in folded.parameters()} == {dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(folded(x), y, atol=tolerance, rtol=tolerance)


# Cut to a rank


def truncated(mixer, rank):
    """The mixer whose depthwise kernels are cut by hand."""
    cut = copy.deepcopy(mixer)
    for name in "qkv":
        kernel = getattr(cut, f"{name}_conv").weight
        u, s, v = torch.linalg.svd(kernel.detach().flatten(1), full_matrices=False)
        kernel.data.copy_(((u[:, :rank] * s[:rank]) @ v[:rank]).view_as(kernel))
    return cut


@sizes
@pytest.mark.parametrize("rank", [1, 5, 12, 40])
@pytest.mark.parametrize("variant", [{}, {"qkv_bias": False}, {"local_source": "value"}])
def test_fold__rank_is_the_truncated_kernel(size, rank, variant):
    mixer, x = make(variant), torch.randn(2, *size, 16).double()
    expected = truncated(mixer, rank)(x)
    torch.testing.assert_close(copy.deepcopy(mixer).fold_(rank)(x), expected, atol=1e-11, rtol=1e-10)
    if rank >= 12:
        torch.testing.assert_close(expected, mixer(x), atol=1e-11, rtol=1e-10)


def test_fold__rank_costs_its_share(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    def projections(module, x):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        return counter.get_total_flops() / 2

    monkeypatch.setattr(fold_module, "ONE_GEMM_FROM", 0)
    x = torch.randn(1, 16, 16, 32)
    mixer = RegionalLocalMixer(32, 2, 4, local_gain=0.0).eval()
    rest = projections(copy.deepcopy(mixer).fold_(), x) - 3 * 256 * 32 * 32
    pooling = 3 * 4 * 256 * 32
    cut = projections(copy.deepcopy(mixer).fold_(4), x)
    assert cut == pytest.approx(rest + 3 * 256 * 32 * 32 * 4 / 16 + pooling)


def test_fold__rank_is_checked_on_a_batch():
    torch.manual_seed(0)
    mixer = RegionalLocalMixer(48, 3, 4, local_gain=0.0).eval()
    x = torch.randn(2, 16, 16, 48)
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    with pytest.raises(ConfigError, match=r"changes by 0\.\d+ of its size .* above tolerance=0.01; use a higher rank"):
        mixer.fold_(8, batch=x)
    assert mixer.folded is None
    assert all(torch.equal(v, mixer.state_dict()[k]) for k, v in before.items())
    for name in "qkv":
        conv = getattr(mixer, f"{name}_conv").init_average_()
        conv.weight.data.mul_(1 + 0.05 * torch.randn_like(conv.weight))
    y = mixer(x)
    folded = mixer.fold_(8, batch=x)
    error = ((folded(x) - y).norm() / y.norm()).item()
    assert folded.fold_error == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.01


def test_fold__model_reports_each_mixer_and_is_all_or_nothing():
    torch.manual_seed(0)
    first, second = RegionalLocalMixer(8, 2, 2), RegionalLocalMixer(8, 2, 3, local_gain=0.0)
    model = nn.Sequential(first, nn.LayerNorm(8), second).train()
    x = torch.randn(2, 6, 6, 8)
    with pytest.raises(ConfigError, match="the output of 2 changes by"):
        fold_(model, 1, batch=x, tolerance=1e-3)
    assert model.training
    assert first.training
    assert first.folded is None
    fold_(model, 1, batch=x, tolerance=10.0)
    assert 0 < second.fold_error < 10
    assert not model.training


@pytest.mark.parametrize(
    ("module", "rank", "match"),
    [
        (nn.Linear(2, 2), None, "Linear contains no MRL mixer"),
        (RegionalLocalMixer(8, 2, 2), 0, "at least rank 1"),
        (RegionalLocalMixer(8, 2, 2, reduce="mean"), 2, "no depthwise reduction to cut"),
        (RegionalLocalMixer(8, 2, 2, qkv="common"), 2, "no depthwise reduction to cut"),
    ],
)
def test_fold__refuses(module, rank, match):
    with pytest.raises(ConfigError, match=match):
        fold_(module, rank)


# The composed path of training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["paper", "no_bias", "value", "learned", "p4m"])
@sizes
@pytest.mark.parametrize("prefix", [0, 2])
def test_composed__equals_plain(training, variant, size, prefix):
    plain = randomized(RegionalLocalMixer(16, 2, (4, 3), **VARIANTS[variant]).double()).train(training)
    composed = copy.deepcopy(plain)
    plain._composes, composed._composes = lambda x: False, lambda x: True
    results = []
    for mixer in (plain, composed):
        generator = torch.Generator().manual_seed(5)
        x, p = (
            torch.randn(shape, generator=generator).double().requires_grad_() for shape in ((2, *size, 16), (2, 2, 16))
        )
        out = mixer(x, p) if prefix else (mixer(x),)
        sum((o * torch.arange(o.numel()).view_as(o).cos()).sum() for o in out).backward()
        gradients = {name: parameter.grad for name, parameter in mixer.named_parameters()}
        results.append([list(out), x.grad, p.grad, gradients, dict(mixer.named_buffers())])
    torch.testing.assert_close(*results, atol=1e-11, rtol=1e-9)


def test_composed__is_chosen_by_size_and_for_plain_layers_only():
    mixer, large, small = RegionalLocalMixer(16, 2, 4), torch.randn(2, 16, 16, 16), torch.randn(2, 8, 8, 16)
    assert mixer._composes(large)
    assert not mixer._composes(small)
    with torch.no_grad():
        assert not mixer._composes(large)
    mixer.q_proj = nn.utils.parametrizations.weight_norm(mixer.q_proj)
    assert not mixer._composes(large)
    with pytest.raises(ConfigError, match="q_proj is a ParametrizedLinear, whose weight is not all it does"):
        mixer.fold_()
    mixer.q_proj = nn.Linear(16, 16)
    assert mixer._composes(large)
    hook = mixer.k_conv.register_forward_hook(lambda *args: None)
    assert not mixer._composes(large)
    hook.remove()
    assert mixer._composes(large)
    mixer.k_proj = nn.Sequential(nn.Linear(16, 16))
    assert not mixer._composes(large)


def test_region_linear__gradients():
    x, weight = torch.randn(2, 4, 6, 3).double().requires_grad_(), torch.randn(5, 18).double().requires_grad_()
    assert torch.autograd.gradcheck(region_linear, (x, weight, (2, 3)))
    assert torch.autograd.gradgradcheck(region_linear, (x, weight, (2, 3)))
    frozen = region_linear(x, weight.detach(), (2, 3))
    torch.testing.assert_close(frozen, nn.functional.linear(region_patches(x, (2, 3)), weight))


def test_compose__is_project_then_reduce():
    weight, taps, x = torch.randn(3, 5).double(), torch.randn(3, 1, 2, 2).double(), torch.randn(1, 4, 4, 5).double()
    full = nn.functional.linear(x, weight).permute(0, 3, 1, 2)
    expected = nn.functional.conv2d(full, taps, stride=2, groups=3).permute(0, 2, 3, 1)
    torch.testing.assert_close(region_linear(x, compose(weight, taps), (2, 2)), expected)


def test_composed__bf16_autocast_trains():
    mixer, x = RegionalLocalMixer(16, 2, 2), torch.randn(2, 16, 17, 16)
    mixer._composes = lambda x: True
    exact = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in mixer.parameters())


def saved_bytes(function, parameters):
    """Bytes that autograd keeps for the backward pass: each storage once, parameters left out."""
    own, seen = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()  # noqa: F841
    return sum(seen.values())


def test_mixer__keeps_little_for_backward():
    from literal import Mixer

    literal, ours = Mixer(192, 3, 4, 1), RegionalLocalMixer(192, 3, 4, scale=192**-0.5)
    x = torch.randn(8, 56, 56, 192, requires_grad=True)
    reference = saved_bytes(lambda: literal(x.flatten(1, 2), 56), literal.parameters())
    assert saved_bytes(lambda: ours(x), ours.parameters()) <= 0.62 * reference
    ours.set_grad_checkpointing()
    assert saved_bytes(lambda: ours(x), ours.parameters()) <= 0.4 * reference


@pytest.mark.parametrize("variant", ["paper", "value", "no_source", "learned", "common", "p4m"])
def test_mixer__grad_checkpointing_changes_nothing(variant):
    mixer = randomized(RegionalLocalMixer(16, 2, 2, **VARIANTS[variant], proj_drop=0.2)).train()
    results = []
    for enable in (False, True):
        mixer.set_grad_checkpointing(enable)
        mixer.zero_grad()
        torch.manual_seed(0)
        x = torch.randn(2, 6, 6, 16, requires_grad=True)
        y = mixer(x)
        y.square().sum().backward()
        results.append((y, x.grad, [p.grad for p in mixer.parameters()]))
    torch.testing.assert_close(*results)


# Compilation


@pytest.mark.parametrize("variant", ["paper", "value", "mean", "common", "p4m"])
@pytest.mark.parametrize("mode", ["train", "eval", "folded"])
def test_mixer__compiles_without_a_graph_break(variant, mode):
    torch.compiler.reset()
    mixer = randomized(RegionalLocalMixer(16, 2, 2, **VARIANTS[variant])).train(mode == "train")
    mixer = mixer.fold_() if mode == "folded" else mixer
    compiled = torch.compile(copy.deepcopy(mixer), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 17, 16)
    with torch.set_grad_enabled(mode == "train"):
        ours, expected = compiled(x), mixer(x)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    if mode == "train":
        ours.square().sum().backward()
        expected.square().sum().backward()
        for (name, a), b in zip(compiled.named_parameters(), mixer.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3, msg=name)
