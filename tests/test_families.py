"""Attention of transformers, pyramids and windows: exact where it must be, reversible, saved, refused with a reason."""

import subprocess
import sys

import pytest
import timm
import torch
import torchvision
import transformers as hf
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

import hf_models
import mrl
from hf_models import GLOBAL, Named
from mrl.swap import SETTINGS, SwapConfig
from mrl.swap.adapters import adapters
from mrl.testing import _tensor, check_adapter
from shaken import shaken
from test_swap import off

SWIN = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "num_classes": 3, "img_size": 32}


def torchvision_swin(second=False):
    kinds = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if second else {}
    return SwinTransformer([4, 4], 12, [2], [2], [8, 8], num_classes=3, **kinds)


def hf_swin():
    return Named(hf.SwinModel(hf.SwinConfig(image_size=32, window_size=8, embed_dim=12, depths=[2], num_heads=[2])))


PYRAMIDS = {
    "timm_pvt_v2": ("pyramid", 8, (64, 96), lambda: timm.create_model("pvt_v2_b0", num_classes=3)),
    "timm_pvt_v2_linear": ("pyramid", 16, (64, 96), lambda: timm.create_model("pvt_v2_b2_li", num_classes=3)),
    "timm_twins": ("pyramid", 9, (64, 96), lambda: timm.create_model("twins_svt_small", num_classes=3)),
}
WINDOWS = {
    "timm": ("windows", 2, (32, 32), lambda: timm.create_model("swin_tiny_patch4_window7_224", window_size=8, **SWIN)),
    "timm_v2": ("windows", 2, (32, 32), lambda: timm.create_model("swinv2_tiny_window8_256", window_size=8, **SWIN)),
    "timm_v2_other_window": (
        "windows",
        2,
        (32, 32),
        lambda: timm.create_model("swinv2_tiny_window8_256", window_size=8, pretrained_window_sizes=(6,), **SWIN),
    ),
    "torchvision": ("windows", 2, (32, 32), torchvision_swin),
    "torchvision_v2": ("windows", 2, (32, 32), lambda: torchvision_swin(True)),
    "transformers": ("windows", 2, (32, 32), hf_swin),
}
ALL = {**GLOBAL, **PYRAMIDS, **WINDOWS}
WHOLE = ("windows", 12, (224, 224), lambda: timm.create_model("swin_tiny_patch4_window7_224"))  # its recipe is inferred


def make(name):
    _, _, size, build = WHOLE if name == "timm_default" else ALL[name]
    torch.manual_seed(0)
    model = build()
    return shaken(Named(model) if name in GLOBAL else model, 0.1), torch.randn(3, 3, *size)


def out(model, images):
    return _tensor(model(images))


@pytest.mark.parametrize("name", ALL)
def test_family__keeps_the_contract(name):
    model, images = make(name)
    adapter, modules = ALL[name][:2]
    held = check_adapter(adapters()[adapter], model, images)
    assert held[0] == f"finds {modules} modules"
    assert len(held) == 5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("setting", ["cheap", "paper"])
def test_family__region_1_is_exact_with_every_reduction(name, setting):
    model, images = make(name)
    before = out(model, images)
    config = SwapConfig(reduce=SETTINGS[setting].reduce, prefix=SETTINGS[setting].prefix)
    handle = mrl.swap_(model, mrl.plan(model, region=1, config=config))
    assert off(out(model, images), before) < 1e-5
    handle.restore()
    assert torch.equal(out(model, images), before)


@pytest.mark.parametrize("name", ALL)
def test_family__every_module_by_itself(name):
    """On random tokens, whatever little a network of random weights shows of them at its end."""
    model, _ = make(name)
    with torch.no_grad():
        for region in (1, 2):
            plan = mrl.plan(model, region=region)
            calls = {}
            for path, site in plan.sites.items():
                adapter = adapters()[site.adapter]
                grid = (8, 8) if name in WINDOWS else adapter.probe_grid(site, (2, 2))
                args, kwargs = adapter.call(site, adapter.probe_input(site, grid, 2), grid)
                calls[path] = (grid, args, kwargs, _tensor(adapter.original(site)(*args, **kwargs)))
            handle = mrl.swap_(model, plan)
            for path, (grid, args, kwargs, before) in calls.items():
                handle.fix_grid(grid)
                gap = off(_tensor(model.get_submodule(path)(*args, **kwargs)), before)
                assert gap > 1e-3 if region == 2 else gap < 1e-5, path
            handle.restore()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_family__the_teachers_view_and_the_hand_over(name):
    model, images = make(name)
    before = out(model, images)
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    after = out(model, images)
    assert not torch.equal(after, before)
    with handle.disabled():
        assert torch.equal(out(model, images), before)
    handle.mix(0.0)
    assert off(out(model, images), before) < 1e-5
    handle.mix(1.0)
    assert torch.equal(out(model, images), after)


@pytest.mark.parametrize("name", [n for n in ALL if n not in WINDOWS])
def test_family__a_region_constant_input_equals_softmax_attention(name):
    """Every adapter by itself: on tokens that are constant within 2 x 2 regions, pooling loses nothing."""
    model, _ = make(name)
    plan = mrl.plan(model, region=2, layers=[0])
    (path,) = plan.names
    site = plan.sites[path]
    adapter = adapters()[site.adapter]
    if adapter.name == "pyramid" and "cvt" in name:
        pytest.skip("CvT makes its queries with a 3 x 3 convolution, which sees over the edge of a region")
    grid = tuple(2 * n for n in adapter.probe_grid(site, (2, 2)))
    x = adapter.probe_input(site, grid, 2)
    prefix = site.num_prefix_tokens
    patches = x[:, prefix:].unflatten(1, grid)[:, ::2, ::2]
    patches = patches.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    args, kwargs = adapter.call(site, torch.cat([x[:, :prefix], patches], 1), grid)
    before = _tensor(site.module(*args, **kwargs))
    handle = mrl.swap_(model, plan)
    handle.fix_grid(grid)
    after = _tensor(model.get_submodule(path)(*args, **kwargs))
    assert off(after, before) < 1e-5


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "siglip", "segformer", "pvt", "cvt", "detr", "rt_detr", *WINDOWS])
def test_family__bf16_autocast(name):
    model, images = make(name)
    exact = out(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = off(out(model, images).float(), exact)
        handle = mrl.swap_(model, mrl.plan(model, region=1))
        ours = off(out(model, images).float(), exact)
        assert ours <= 2 * theirs
        out(model.train(), images).float().square().mean().backward()
    for mixer in handle.mixers().values():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["dinov2_registers", "segformer", "detr", "timm_pvt_v2", *WINDOWS])
def test_family__plans_with_costs_and_calibrates(name):
    model, images = make(name)
    before = out(model, images)
    plan = mrl.plan(model, region=2, example_inputs=images)
    assert torch.equal(out(model, images), before)  # planning changed nothing
    assert all(
        row.gmacs_before > 0 and row.tokens_after < row.tokens_before for row in plan.rows if row.action == "swap"
    )
    handle = mrl.swap_(model, plan)
    small = mrl.swap.CalibrateConfig(min_updates=2, batch_size=2, epochs=0.1, feature_epochs=0.1, bf16=False)

    report = mrl.calibrate(handle, [images, images.flip(0)], config=small)
    assert [stage.stage for stage in report.stages] == ["stats", "ridge", "layers", "features"]
    handle.restore()
    assert torch.equal(out(model, images), before)


@pytest.mark.parametrize("name", ["dinov2", "pvt_v2", "cvt", "timm_default", *WINDOWS])
def test_family__saves_and_loads_bit_equal(name, tmp_path):
    model, images = make(name)
    recipe = None
    if name != "timm_default":
        recipe = {"kind": "factory", "name": "test_families:rebuilt", "kwargs": {"name": name}}
    mrl.swap_(model, mrl.plan(model, region=2))
    expected = out(model, images)
    mrl.save(model, tmp_path / "m", recipe=recipe)
    assert torch.equal(out(mrl.load(tmp_path / "m"), images), expected)
    assert torch.equal(out(model, images), expected)  # saving changed nothing


def rebuilt(name):
    """The architecture of `make(name)`, for `mrl.load`."""
    return make(name)[0]


@pytest.mark.slow
def test_transformers__a_fresh_process_gives_the_same(tmp_path):
    model, images = make("dinov3")
    mrl.swap_(model, mrl.plan(model, region=2))
    recipe = {"kind": "factory", "name": "test_families:rebuilt", "kwargs": {"name": "dinov3"}}
    mrl.save(model, tmp_path / "m", recipe=recipe)
    torch.save(images, tmp_path / "x.pt")
    code = (
        f"import sys; sys.path.insert(0, {str(__file__.rpartition('/')[0])!r}); import torch, mrl; from mrl.testing import _tensor;"
        f"torch.save(_tensor(mrl.load({str(tmp_path / 'm')!r})(torch.load({str(tmp_path / 'x.pt')!r}))), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), out(model, images))


def test_transformers__text_towers_and_decoders_are_left_alone():
    text = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "vocab_size": 50,
    }
    vision = {**hf_models.VIT, "image_size": 64, "patch_size": 16}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    plan = mrl.plan(clip)
    assert all(name.startswith("vision_model.") for name in plan.names)
    assert len(plan.names) == 2
    assert any("text tower" in row.reason for row in plan.rows if row.name.startswith("text_model."))
    detr = GLOBAL["detr"][3]()
    reasons = {row.name: row.reason for row in mrl.plan(detr).rows}
    assert "decoder's self-attention" in reasons["decoder.layers.0.self_attn"]


def test_transformers__yolos_is_refused():
    model = hf.YolosModel(hf.YolosConfig(**hf_models.VIT, image_size=[32, 80], patch_size=16, num_detection_tokens=3))
    with pytest.raises(mrl.SwapError, match="detection tokens"):
        mrl.plan(model)


def test_timm__xcit_and_mvit_are_refused():
    with pytest.raises(mrl.SwapError, match="among channels"):
        mrl.plan(timm.create_model("xcit_nano_12_p16_224", depth=1), target=r".*\.attn")
    with pytest.raises(mrl.SwapError, match="another grid than its input"):
        mrl.plan(timm.create_model("mvitv2_tiny"))


def test_transformers__the_output_is_a_tuple_whatever_the_batch():
    """A bare tensor of batch 2 would be unpacked as (output, weights) without an error."""
    model, images = make("vit")
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    mixer = next(iter(handle.mixers().values()))
    handle.fix_grid((2, 5))
    answer = mixer(torch.randn(2, 11, 24))
    assert isinstance(answer, tuple)
    assert answer[1] is None
    assert out(model, images[:2]).shape[0] == 2


def test_transformers__padding_masks_reach_the_regions():
    model, images = make("detr")
    detr, mask = model.model, torch.ones(3, 64, 96, dtype=torch.long)
    mask[1, :, 48:] = 0
    before = _tensor(detr(pixel_values=images, pixel_mask=mask))
    handle = mrl.swap_(model, mrl.plan(model, region=1))
    assert off(_tensor(detr(pixel_values=images, pixel_mask=mask)), before) < 1e-5
    assert off(_tensor(detr(pixel_values=images)), before) > 1e-4
    handle.restore()
    mrl.swap_(model, mrl.plan(model, region=2))
    assert off(_tensor(detr(pixel_values=images, pixel_mask=mask)), _tensor(detr(pixel_values=images))) > 1e-4


def test_windows__a_larger_grid_is_mixed_whole():
    torch.manual_seed(0)
    model = shaken(timm.create_model("swin_tiny_patch4_window7_224", window_size=4, **SWIN), 0.1)
    x = torch.randn(1, 3, 32, 32)
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    mixer = handle.mixers()[handle.names[0]]
    y = torch.randn(1, 8, 8, 12)
    moved = y.clone()
    moved[:, -1, -1] += 1
    assert (mixer(moved) - mixer(y))[:, 0, 0].abs().max() > 1e-6  # the far corner is seen; in windows it was not
    with handle.disabled():
        teacher = model.get_submodule(handle.names[0])
        assert torch.equal(teacher(moved)[:, 0, 0], teacher(y)[:, 0, 0])
    model.set_input_size((64, 64))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert x.shape[0] == 1


def segmenters():
    """UPerNet and Mask2Former on a small Swin."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    kwargs = {"image_size": 64, "window_size": 4, "embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
    swin = hf.SwinConfig(out_features=stages, **kwargs)
    yield hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(backbone_config=swin, hidden_size=16, num_labels=3, pool_scales=[1, 2],
                         auxiliary_in_channels=48, auxiliary_channels=8)
    )  # fmt: skip
    yield hf.Mask2FormerForUniversalSegmentation(
        hf.Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=4,
                             encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
                             dim_feedforward=16, num_labels=3)
    )  # fmt: skip


@torch.no_grad()
def test_windows__backbones_of_segmenters_are_swapped_and_their_decoders_are_not():
    for model in segmenters():
        model, images = shaken(Named(model), 0.1), torch.randn(1, 3, 128, 128)
        before = out(model, images)
        handle = mrl.swap_(model, mrl.plan(model, region=2))
        assert len(handle.names) == 4
        assert all("encoder.layers" in name and "decoder" not in name for name in handle.names)
        assert not torch.equal(out(model, images), before)
        handle.restore()
        assert torch.equal(out(model, images), before)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_registers", "dinov3", "detr", "rt_detr"])
@torch.no_grad()
def test_transformers__swapped_sides_fail(name):
    model, images = make(name)
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    right = out(model, images)
    height, width = handle._grids[0].seen
    assert height != width
    handle.fix_grid((width, height))
    assert not torch.equal(out(model, images), right)


def test_lora__finds_the_same_linears_in_a_swapped_model():
    import peft

    model, images = make("dinov2")
    mrl.swap_(model, mrl.plan(model, region=2))
    before = out(model, images)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert torch.allclose(out(tuned.eval(), images), before)  # LoRA starts as zero
    out(tuned.train(), images).square().mean().backward()
    grown = [n for n, p in tuned.named_parameters() if "lora_B" in n and p.grad is not None and p.grad.abs().max() > 0]
    assert len(grown) == 4
    timm_model = timm.create_model("test_vit", img_size=32)
    mrl.swap_(timm_model, mrl.plan(timm_model, region=2))
    tuned = peft.get_peft_model(timm_model, peft.LoraConfig(r=2, target_modules=["qkv"]))
    tuned(torch.randn(2, 3, 32, 32)).sum().backward()
    assert any("lora_B" in n and p.grad is not None for n, p in tuned.named_parameters())


def test_torchvision__models_are_what_they_say():
    model = torchvision.models.swin_t().eval()
    plan = mrl.plan(model)
    assert len(plan.names) == 12
    assert plan.rows[0].input == "(B, H, W, C)"


def unsettled(handle):
    """Region norms with statistics and gains of their own, so that nothing is neutral."""
    generator = torch.Generator().manual_seed(3)
    for mixer in handle.mixers().values():
        for module in mixer.modules():
            if type(module).__name__ == "RegionNorm":
                with torch.no_grad():
                    module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("name", ["dinov2_registers", "segformer", "cvt", "detr", "timm_v2"])
@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_fold__equals_the_swapped_model(name, setting, tmp_path):
    model, images = make(name)
    original = out(model, images)
    handle = mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    unsettled(handle)
    before = out(model, images)
    handle.fold_()
    assert off(out(model, images), before) < 1e-5
    if setting != "cheap":
        with pytest.raises(mrl.SwapError, match="folded already"):
            handle.fold_()
        with pytest.raises(mrl.SwapError, match="save it before"):
            mrl.save(model, tmp_path / "m", recipe={"kind": "factory", "name": "a:b", "kwargs": {}})
    handle.restore()
    assert torch.equal(out(model, images), original)


@pytest.mark.parametrize("name", ["vit", "pvt_v2", "torchvision"])
@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_swap__sync_batch_norm_after_the_swap_reads_the_same_channels(name, setting):
    model, images = make(name)
    handle = mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    unsettled(handle)
    before = out(model, images)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
    assert off(out(model, images), before) < 1e-5
    with pytest.raises(mrl.SwapError, match="fold before converting"):
        handle.fold_()


def test_transformers__gradient_checkpointing_with_two_sizes_is_refused():
    model, images = make("vit")
    vit = model.model
    mrl.swap_(vit, mrl.plan(vit, region=2))
    vit.activation_checkpointing_enable()
    vit.train()
    _tensor(vit(pixel_values=images)).sum().backward()
    with pytest.raises(mrl.SwapError, match="images of two sizes"):
        vit(pixel_values=torch.randn(1, 3, 80, 32), interpolate_pos_encoding=True)


def test_transformers__save_pretrained_is_not_the_way(tmp_path):
    """Reloading such a folder builds the original class; only `mrl.save` keeps the swap."""
    model, images = make("vit")
    mrl.swap_(model.model, mrl.plan(model.model, region=2))
    expected = out(model, images)
    recipe = {"kind": "factory", "name": "test_families:rebuilt_bare", "kwargs": {"name": "vit"}}
    mrl.save(model.model, tmp_path / "m", recipe=recipe)
    assert torch.equal(out(Named(mrl.load(tmp_path / "m")), images), expected)


def rebuilt_bare(name):
    """The model of transformers inside `make(name)`."""
    return make(name)[0].model


def test_transformers__a_device_hook_of_accelerate_is_refused():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, _ = make("vit")
    attention = next(m for n, m in model.named_modules() if type(m).__name__ == "ViTAttention")
    add_hook_to_module(attention, ModelHook())
    plan = mrl.plan(model)
    assert len(plan.names) == 1
    assert "device hook" in next(row.reason for row in plan.rows if row.action == "skip")
