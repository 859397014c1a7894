"""Attention of other families: exact at region 1 on grids that are not square, and reversible."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import mrl
from mrl.errors import ConfigError
from mrl.swap import SETTINGS, SwapConfig
from mrl.swap.adapters import _ADDED, adapters
from mrl.swap.adapters.base import AdapterBase
from mrl.testing import check_adapter
from shaken import shaken
from test_swap import off

TINY = {"depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
TIMM = {
    "eva02": ("timm_rope", "eva02_tiny_patch14_224", {"img_size": (28, 70), **TINY}),
    "eva": ("timm_vit", "eva_large_patch14_196", {"img_size": (28, 70), **TINY}),
    "dinov3": ("timm_rope", "vit_small_patch16_dinov3", {"img_size": (32, 80), **TINY}),
    "perception": ("timm_rope", "vit_pe_core_tiny_patch16_384", {"img_size": (32, 80), **TINY}),
    "rope_mixed": ("timm_rope", "vit_small_patch16_rope_mixed_224", {"img_size": (32, 80), **TINY}),
    "beit": ("timm_beit", "beit_base_patch16_224", {"img_size": (32, 80), **TINY}),
    "beit_shared": (
        "timm_beit",
        "beit_base_patch16_224",
        {"img_size": (32, 80), "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, **TINY},
    ),
}


def make(family):
    _, name, kwargs = TIMM[family]
    return shaken(timm.create_model(name, **kwargs)), torch.randn(3, 3, *kwargs["img_size"])


@pytest.mark.parametrize("family", TIMM)
def test_adapter__keeps_the_contract(family):
    model, images = make(family)
    held = check_adapter(adapters()[TIMM[family][0]], model, images)
    assert held[0] == "finds 3 modules"
    assert len(held) == 5


@pytest.mark.parametrize("family", TIMM)
@pytest.mark.parametrize("setting", SETTINGS)
def test_adapter__region_1_is_exact_with_every_reduction(family, setting):
    model, images = make(family)
    before = model(images)
    config = SwapConfig(reduce=SETTINGS[setting].reduce, prefix=SETTINGS[setting].prefix)
    handle = mrl.swap_(model, mrl.plan(model, region=1, config=config))
    assert off(model(images), before) < 1e-5
    handle.restore()
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("family", TIMM)
def test_adapter__prefix_rows_are_the_teachers(family):
    model, images = make(family)
    seen = {}
    hook = model.blocks[0].attn.register_forward_hook(lambda m, a, o: seen.update(teacher=o))
    model(images)
    hook.remove()
    mrl.swap_(model, mrl.plan(model, region=2, layers=[0]))
    model.blocks[0].attn.register_forward_hook(lambda m, a, o: seen.update(student=o))
    model(images)
    prefix = model.num_prefix_tokens
    assert off(seen["student"][:, :prefix], seen["teacher"][:, :prefix]) < 1e-5
    assert off(seen["student"], seen["teacher"]) > 1e-3


@pytest.mark.parametrize("family", TIMM)
def test_adapter__swapped_sides_fail(family):
    model, images = make(family)
    handle = mrl.swap_(model, mrl.plan(model, region=(1, 2)))
    right = model(images)
    height, width = (side // model.patch_embed.patch_size[0] for side in images.shape[2:])
    handle.fix_grid((width, height))
    assert off(model(images), right) > 1e-3


@pytest.mark.parametrize("family", TIMM)
def test_adapter__bf16_autocast_is_no_worse_than_twice_the_originals(family):
    model, images = make(family)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = off(model(images).float(), exact)
        mrl.swap_(model, mrl.plan(model, region=1))
        ours = off(model(images).float(), exact)
    assert ours <= 2 * theirs


@pytest.mark.parametrize("family", TIMM)
@pytest.mark.parametrize("setting", SETTINGS)
def test_adapter__bf16_autocast_trains(family, setting):
    model, images = make(family)
    handle = mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(images).float().square().mean()
    loss.backward()
    for mixer in handle.mixers().values():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["eva02", "dinov3", "beit"])
def test_adapter__plans_saves_and_calibrates(family, tmp_path):
    model, images = make(family)
    plan = mrl.plan(model, region=2, example_inputs=images)
    assert plan.rows[0].tokens_before == model.num_prefix_tokens + 10
    assert plan.rows[0].tokens_after == model.num_prefix_tokens + 3
    assert plan.predicted_latency_ratio > 0
    handle = mrl.swap_(model, plan)
    small = mrl.swap.CalibrateConfig(min_updates=2, batch_size=2, epochs=0.1, feature_epochs=0.1, bf16=False)
    report = mrl.calibrate(handle, [images, images.flip(0)], config=small)
    assert [stage.stage for stage in report.stages] == ["stats", "ridge", "layers", "features"]
    recipe = {"kind": "timm", "name": TIMM[family][1], "kwargs": TIMM[family][2]}
    mrl.save(model, tmp_path / "m", recipe=recipe)
    assert torch.equal(mrl.load(tmp_path / "m")(images), model.eval()(images))


def test_adapter__beit_without_pooled_bias_is_refused():
    model, images = make("beit")
    with pytest.raises(mrl.SwapError, match="relative position biases"):
        mrl.swap_(model, mrl.plan(model, config=SwapConfig(bias="error")))
    assert model(images).isfinite().all()


# torch.nn and torchvision


def torchvision_vit():
    torch.manual_seed(0)
    return shaken(torchvision.models.VisionTransformer(32, 8, 3, 3, 24, 48, num_classes=5)), torch.randn(3, 3, 32, 32)


class Encoder(nn.Module):
    """A user's own network: patches, an encoder of torch layers, a mean."""

    def __init__(self, batch_first=True, prefix=0, norm_first=False):
        super().__init__()
        self.num_prefix_tokens, self.batch_first = prefix, batch_first
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 24))
        layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=batch_first, norm_first=norm_first, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x, mask=None, padding=None):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask=mask, src_key_padding_mask=padding)
        return self.head(x.mean(1 if self.batch_first else 0))


def test_torch__torchvision_vit_keeps_the_contract():
    model, images = torchvision_vit()
    assert len(check_adapter(adapters()["torch_attention"], model, images)) == 5
    row = mrl.plan(model).rows[0]
    assert (row.prefix_tokens, row.grid_from, row.input) == (1, "hook on conv_proj", "(B, N, C)")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_torch__encoder_layers(batch_first, prefix, norm_first, grad):
    model, images = shaken(Encoder(batch_first, prefix, norm_first)), torch.randn(3, 3, 16, 40)
    with torch.set_grad_enabled(grad):
        before = model(images)
        handle = mrl.swap_(model, mrl.plan(model, region=1))
        handle.fix_grid((2, 5))
        assert off(model(images), before) < 1e-5
        handle.restore()
        assert torch.equal(model(images), before)
        handle = mrl.swap_(model, mrl.plan(model, region=2))
        handle.fix_grid((2, 5))
        assert off(model(images), before) > 1e-4


@pytest.mark.parametrize("kind", ["bool", "float", "padding", "both"])
def test_torch__masks(kind):
    model, images = shaken(Encoder()), torch.randn(3, 3, 16, 40)
    mask = torch.rand(10, 10) < 0.3
    mask.fill_diagonal_(False)
    padding = torch.zeros(3, 10, dtype=torch.bool)
    padding[:, 7:] = True
    mask = torch.randn(10, 10) if kind == "float" else mask if kind in ("bool", "both") else None
    padding = padding if kind in ("padding", "both") else None
    if kind == "both":
        mask[:, 0] = False
    before = model(images, mask, padding)
    handle = mrl.swap_(model, mrl.plan(model, region=1))
    handle.fix_grid((2, 5))
    assert off(model(images, mask, padding), before) < 1e-5


def test_torch__without_a_grid_it_guesses_aloud_or_refuses():
    model = shaken(Encoder())
    mrl.swap_(model, mrl.plan(model, region=1))
    with pytest.warns(UserWarning, match="taken for 2 x 2"):
        model(torch.randn(1, 3, 16, 16))
    with pytest.raises(mrl.SwapError, match="10 patch tokens and no grid"):
        model(torch.randn(1, 3, 16, 40))


def test_torch__cross_attention_is_refused():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 3, 48, batch_first=True), 1)
    plan = mrl.plan(decoder)
    assert [row.action for row in plan.rows] == ["swap", "skip"]
    assert "cross-attention" in plan.rows[1].reason
    other = nn.MultiheadAttention(24, 3, kdim=12, vdim=12)
    with pytest.raises(mrl.SwapError, match="another width"):
        mrl.plan(nn.Sequential(other))
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(24, 3, batch_first=True)})
    mrl.swap_(net, mrl.plan(net))
    with pytest.raises(mrl.SwapError, match="other keys than queries"):
        net["attn"](torch.randn(1, 4, 24), torch.randn(1, 9, 24), torch.randn(1, 9, 24))


# Hand-over


def test_mix__goes_from_the_original_to_the_mixer():
    model, images = make("dinov3")
    before = model(images)
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    after = model(images)
    handle.mix(0.0)
    assert off(model(images), before) < 1e-6
    handle.mix(0.5)
    half = model(images)
    assert off(half, before) > 1e-4
    assert off(half, after) > 1e-4
    half.square().mean().backward()
    assert all(p.grad.isfinite().all() for m in handle.mixers().values() for p in m.parameters() if p.requires_grad)
    handle.mix(1.0)
    assert torch.equal(model(images), after)
    handle.mix(0.3)
    handle.restore(handle.names[:1])
    handle.restore()
    assert torch.equal(model(images), before)
    for wrong in (-0.1, 1.1):
        with pytest.raises(mrl.SwapError, match="use 0"):
            handle.mix(wrong)


def test_mix__of_one_layer_is_the_weighted_answer():
    model, images = make("eva02")
    seen = []
    attention = copy.deepcopy(model.blocks[0].attn)
    handle = mrl.swap_(model, mrl.plan(model, region=2, layers=[0]))
    mixer = model.blocks[0].attn
    mixer.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    model(images)
    ((args, kwargs),) = seen
    ours, theirs = mixer(*args, **kwargs), attention(*args, **kwargs)
    handle.mix(0.25)
    torch.testing.assert_close(mixer(*args, **kwargs), 0.75 * theirs + 0.25 * ours)


def test_mix__needs_the_originals():
    model, _ = torchvision_vit()
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    handle.mix(0.5)
    handle.discard_originals()
    with pytest.raises(mrl.SwapError, match="originals were not kept"):
        handle.mix(0.5)


# A user's own adapter


class Doubled(AdapterBase):
    name = "doubled"

    def site(self, model, name, module):
        return None

    def build(self, site, region, config, grid):
        raise NotImplementedError


def test_register_adapter__is_asked_first_and_checked():
    mrl.register_adapter(Doubled())
    try:
        assert next(iter(adapters())) == "doubled"
        with pytest.raises(ConfigError, match="the name doubled is taken"):
            mrl.register_adapter(Doubled())
        model, images = torchvision_vit()
        with pytest.raises(mrl.SwapError, match="doubled takes no module of VisionTransformer"):
            check_adapter(adapters()["doubled"], model, images)
    finally:
        _ADDED.clear()
    with pytest.raises(ConfigError, match="object has no name"):
        mrl.register_adapter(object())


def test_check_adapter__finds_a_wrong_scale(monkeypatch):
    model, images = torchvision_vit()
    adapter = adapters()["torch_attention"]
    build = type(adapter).build

    def wrong(self, *args):
        mixer = build(self, *args)
        mixer.mrl.scale *= 1.1
        return mixer

    monkeypatch.setattr(type(adapter), "build", wrong)
    with pytest.raises(mrl.SwapError, match=r"at region=1 the model differs from the original by .* on a batch of 1"):
        check_adapter(adapter, model, images)
