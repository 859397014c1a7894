"""Surgery on timm's ViT family: exact where it must be, all or nothing, and reversible."""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

import mrl
from mrl.swap import SETTINGS, SwapConfig
from mrl.swap.core import RegionCore
from mrl.swap.grid import Grid

TINY = {"depth": 3, "embed_dim": 24, "num_heads": 3}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": (32, 80), **TINY}),
    "deit_distilled_free": ("deit3_small_patch16_224", {"img_size": (32, 80), **TINY}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": (28, 70), **TINY}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (28, 70), **TINY}),
    "clip": ("vit_base_patch32_clip_224", {"img_size": (64, 160), **TINY}),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": (32, 80), **TINY}),
    "qk_norm": ("vit_tiny_patch16_224", {"img_size": (32, 80), "qk_norm": True, "scale_attn_norm": True, **TINY}),
    "no_prefix": ("vit_tiny_patch16_224", {"img_size": (32, 80), "class_token": False, "global_pool": "avg", **TINY}),
}


def make(family: str, **more) -> nn.Module:
    name, kwargs = FAMILIES[family]
    model = timm.create_model(name, num_classes=5, **{**kwargs, **more}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(2))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_swap__region_of_one_equals_the_original(family, batch):
    model = make(family)
    x = images(model, batch)
    before = model(x)
    for reduce, source, prefix in itertools.product(("depthwise", "mean"), ("value", "input"), ("exact", "region")):
        config = SwapConfig(reduce=reduce, local_source=source, prefix=prefix)
        handle = mrl.swap_(model, mrl.plan(model, region=1, config=config))
        assert off(model(x), before) < 1e-5
        handle.restore()


def test_swap__swapped_height_and_width_fail_the_exactness_test():
    model = make("dinov2")
    x = images(model)
    handle = mrl.swap_(model, mrl.plan(model, region=(1, 2), config=SETTINGS["paper"]))
    right = model(x)
    handle.fix_grid((5, 2))
    assert off(model(x), right) > 1e-3


@pytest.mark.parametrize("kernel_size", [1, 5, 7])
def test_swap__any_local_kernel_starts_at_the_same_model_and_costs_what_it_should(kernel_size, tmp_path):
    original = make("dinov2")
    model, usual, x = copy.deepcopy(original), copy.deepcopy(original), images(original)
    handle = mrl.swap_(model, mrl.plan(model, region=2, config=SwapConfig(kernel_size=kernel_size)))
    mrl.swap_(usual, mrl.plan(usual, region=2))
    assert off(model(x), usual(x)) < 1e-5  # a delta, whatever surrounds it
    with torch.no_grad():
        for name in handle.names:
            model.get_submodule(name).mrl.local.weight.normal_()
    again = mrl.load(mrl.save(model, tmp_path / "saved"))
    assert torch.equal(again(x), model(x))
    handle.fold_()
    assert off(model(x), again(x)) < 1e-4
    plans = [
        mrl.plan(original, region=2, example_inputs=x, config=SwapConfig(kernel_size=k)).rows[0]
        for k in (kernel_size, 3)
    ]
    mixer = usual.get_submodule(handle.names[0]).mrl
    taps = kernel_size**2 - 9
    height, width = mixer.grid.size(plans[0].tokens_before - mixer.num_prefix_tokens)
    assert 1e6 * (plans[0].params_m_after - plans[1].params_m_after) == pytest.approx(mixer.dim * taps)
    assert 1e9 * (plans[0].gmacs_after - plans[1].gmacs_after) == pytest.approx(mixer.dim * taps * height * width)


@pytest.mark.parametrize("setting", SETTINGS)
def test_swap__ragged_regions_on_a_dynamic_size(setting):
    model = make("dinov2_registers", dynamic_img_size=True)
    handle = mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    for size in ((42, 70), (70, 42), (14, 98)):
        out = model(torch.randn(2, 3, *size))
        assert out.shape == (2, 5)
        assert out.isfinite().all()
    assert handle._grids[0].seen == (1, 7)


@pytest.mark.parametrize("region", [2, 3, (1, 4)])
def test_swap__prefix_rows_equal_the_teachers(region):
    model = make("dinov2_registers")
    attention = model.blocks[0].attn
    x = torch.randn(2, 5 + 10, 24)
    expected = attention(x)[:, :5]
    handle = mrl.swap_(model, mrl.plan(model, region=region))
    handle.fix_grid((2, 5))
    assert off(model.blocks[0].attn(x)[:, :5], expected) < 1e-5


@pytest.mark.parametrize("setting", ["faithful", "cheap"])
def test_swap__region_constant_input_equals_softmax_attention(setting):
    model = make("dinov2_registers")
    attention = model.blocks[0].attn
    patches = (
        torch.randn(2, 2, 3, 24).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :3, :5]
    )  # ragged below and right
    x = torch.cat([torch.randn(2, 5, 24), patches.flatten(1, 2)], 1)
    expected = attention(x)
    handle = mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    handle.fix_grid((3, 5))
    assert off(model.blocks[0].attn(x), expected) < 1e-5


def test_swap__masks_are_pooled_and_exact_at_region_one():
    model = make("dinov2")
    x = images(model)
    tokens = 1 + 2 * 5
    keep = torch.ones(tokens, dtype=torch.bool)
    keep[-2:] = False
    additive = torch.randn(2, 1, tokens, tokens)
    for mask in (keep.expand(tokens, tokens), additive):
        expected = model.forward_features(x, attn_mask=mask)
        handle = mrl.swap_(model, mrl.plan(model, region=1))
        assert off(model.forward_features(x, attn_mask=mask), expected) < 1e-5
        handle.restore()
    mrl.swap_(model, mrl.plan(model, region=2, config=SwapConfig(bias="error")))
    with pytest.raises(mrl.SwapError, match="bias='pool'"):
        model.forward_features(x, attn_mask=additive)


@pytest.mark.parametrize("setting", SETTINGS)
def test_swap__trains_with_finite_gradients_everywhere(setting):
    model = make("dinov2").train()
    mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    model(images(model, 1)).square().sum().backward()
    missing = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert missing == []


def test_swap__bf16_autocast_errs_at_most_twice_as_much_as_the_original():
    model = make("dinov2")
    x = images(model, 3)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = off(model(x).float(), exact)
    mrl.swap_(model, mrl.plan(model, region=1))
    with torch.autocast("cpu", torch.bfloat16):
        ours = off(model(x).float(), exact)
    assert ours <= 2 * theirs


def test_restore__is_bit_exact_after_training_and_keeps_the_same_objects():
    model = make("dinov2")
    x = images(model)
    before, state = model(x), copy.deepcopy(model.state_dict())
    objects = dict(model.named_modules())
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    assert all(
        dict(model.named_modules())[n] is m
        for n, m in objects.items()
        if not n.startswith("blocks") or n.endswith("qkv")
    )
    with torch.no_grad():
        for mixer in handle.mixers().values():
            for parameter in mixer.parameters():
                parameter.add_(0.1)
    with handle.disabled():
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)
    handle.restore(["blocks.1.attn"])
    assert handle.names == ["blocks.0.attn", "blocks.2.attn"]
    handle.restore()
    assert torch.equal(model(x), before)
    assert dict(model.named_modules()) == objects
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.patch_embed.proj._forward_hooks


def test_restore__refuses_what_it_cannot_do():
    model = make("dinov2")
    handle = mrl.swap_(model, mrl.plan(model))
    with pytest.raises(mrl.SwapError, match="not exchanged"):
        handle.restore(["blocks.9.attn"])
    handle.discard_originals()
    with pytest.raises(mrl.SwapError, match="keep_original"):
        handle.restore()


def test_swap__a_failure_half_way_leaves_no_trace(monkeypatch):
    model = make("dinov2")
    planned = mrl.plan(model, region=2)
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    made = []
    original = RegionCore.__init__

    def fails_at_the_third(self, *args, **kwargs):
        made.append(1)
        if len(made) == 3:
            raise RuntimeError("out of memory")
        original(self, *args, **kwargs)

    monkeypatch.setattr(RegionCore, "__init__", fails_at_the_third)
    with pytest.raises(RuntimeError):
        mrl.swap_(model, planned)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.patch_embed.proj._forward_hooks


def test_plan__changes_nothing_and_selects():
    model = make("dinov2").train()
    state = copy.deepcopy(model.state_dict())
    planned = mrl.plan(
        model, region={"blocks.0.attn": 3, ".*": (1, 2)}, layers=[0, -1], example_inputs=images(model, 1)
    )
    assert planned.names == ["blocks.0.attn", "blocks.2.attn"]
    rows = {r.name: r for r in planned.rows}
    assert rows["blocks.0.attn"].region == (3, 3)
    assert (rows["blocks.2.attn"].tokens_before, rows["blocks.2.attn"].tokens_after) == (11, 1 + 2 * 3)
    assert rows["blocks.1.attn"].action == "skip"
    assert 0 < planned.predicted_latency_ratio < 50
    assert rows["blocks.0.attn"].gmacs_before > 0
    assert "blocks.0.attn" in str(planned)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert mrl.plan(model, target=["0.attn"]).names == ["blocks.0.attn"]
    assert mrl.plan(model, target=r"blocks\.[12]\.attn", exclude=["2.attn"]).names == ["blocks.1.attn"]
    assert mrl.plan(model, target=lambda name, module: name.endswith("1.attn")).names == ["blocks.1.attn"]


def test_plan__suffixes_do_not_match_longer_numbers():
    model = make("dinov2", depth=11)
    assert mrl.plan(model, target=["blocks.1.attn"]).names == ["blocks.1.attn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "block.0.attn"}, "closest are blocks.0.attn"),
        ({"layers": [3]}, "from -3 to 2"),
        ({"region": 0}, "from 1"),
        ({"region": (2, -1)}, "from 1"),
        ({"region": True}, "from 1"),
        ({"region": {"head": 2}}, "no pattern"),
        ({"target": "("}, "regular expression"),
    ],
)
def test_plan__wrong_arguments_are_one_sentence(arguments, message):
    with pytest.raises(mrl.SwapError, match=message):
        mrl.plan(make("dinov2"), **arguments)


def test_plan__an_exclude_that_excludes_nothing_warns():
    with pytest.warns(UserWarning, match="excluded nothing"):
        mrl.plan(make("dinov2"), exclude=["head"])


def test_plan__refuses_what_has_no_regions():
    with pytest.raises(mrl.SwapError, match="no attention"):
        mrl.plan(timm.create_model("resnet18"))
    with pytest.raises(mrl.SwapError, match="no adapter"):
        mrl.plan(timm.create_model("levit_128s"))
    with pytest.raises(mrl.SwapError, match="patch dropout"):
        mrl.plan(make("dinov2", patch_drop_rate=0.5))
    model = make("dinov2")
    with pytest.raises(mrl.SwapError, match=r"before torch\.compile"):
        mrl.plan(torch.compile(model))
    with pytest.raises(mrl.SwapError, match="wrapped"):
        mrl.plan(nn.DataParallel(model))
    mrl.swap_(model, mrl.plan(model))
    with pytest.raises(mrl.SwapError, match="already swapped"):
        mrl.plan(model)


def test_plan__a_subclass_with_its_own_forward_is_skipped_with_the_reason():
    model = make("dinov2")

    class Mine(type(model.blocks[0].attn)):
        pass

    model.blocks[1].attn.__class__ = Mine
    planned = mrl.plan(model)
    assert planned.names == ["blocks.0.attn", "blocks.2.attn"]
    assert "subclass" in planned.rows[1].reason
    with pytest.raises(mrl.SwapError, match="subclass"):
        mrl.plan(model, target=["1.attn"])


def test_swap__a_plan_of_another_model_is_refused():
    planned = mrl.plan(make("dinov2"))
    with pytest.raises(mrl.SwapError, match="this very model"):
        mrl.swap_(make("dinov2"), planned)


def test_grid__guessing_is_refused_or_said_aloud():
    with pytest.warns(UserWarning, match="taken for 24 x 24"):
        assert Grid().size(576) == (24, 24)
    seen = Grid()
    seen.seen = (16, 36)
    assert seen.size(576) == (16, 36)
    with pytest.raises(mrl.SwapError, match="dropped, packed or added"):
        seen.size(575)
    with pytest.raises(mrl.SwapError, match="fix_grid"):
        Grid().size(575)


def test_grid__checkpointing_with_two_sizes_is_refused():
    model = make("dinov2", dynamic_img_size=True).train()
    mrl.swap_(model, mrl.plan(model))
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 28, 70)).sum().backward()
    with pytest.raises(mrl.SwapError, match="two sizes"):
        model(torch.randn(2, 3, 70, 28))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reduce", "mean"),
        ("local_source", "input"),
        ("local_gain", 1.0),
        ("learn_local_gain", None),
        ("group_size", 24),
        ("kernel_size", 5),
        ("prefix", "region"),
    ],
)
def test_swap_config__every_field_changes_parameters_or_output(field, value):
    outputs = []
    for config in (SwapConfig(), SwapConfig(**{field: value})):
        model = make("dinov2")
        torch.manual_seed(3)
        mrl.swap_(model, mrl.plan(model, region=2, config=config))
        outputs.append((sorted((n, tuple(p.shape)) for n, p in model.named_parameters()), model(images(model))))
    assert outputs[0][0] != outputs[1][0] or not torch.allclose(outputs[0][1], outputs[1][1], atol=1e-6)


def test_swap_config__wrong_values_are_named():
    with pytest.raises(mrl.SwapError, match="use one of 'depthwise', 'mean'"):
        SwapConfig(reduce="max")
    with pytest.raises(mrl.SwapError, match="group_size"):
        SwapConfig(group_size=0)
    for wrong in (0, 2, -3, 3.0, "3", True):
        with pytest.raises(mrl.SwapError, match="the local kernel is odd; use 1, 3, 5 or 7"):
            SwapConfig(kernel_size=wrong)
    with pytest.raises(mrl.SwapError, match="local_gain=nan"):
        SwapConfig(local_gain=float("nan"))
    model = make("dinov2")
    planned = mrl.plan(model, config=SwapConfig(group_size=7))
    with pytest.raises(mrl.SwapError, match="not a multiple"):
        mrl.swap_(model, planned)
