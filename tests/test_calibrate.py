"""Calibration: neutral statistics, falling held-out errors, nothing outside the mixers touched."""

import copy

import pytest
import timm
import torch

import mrl
from mrl.swap import SETTINGS, CalibrateConfig
from mrl.swap.neutral import collect_statistics

SHORT = CalibrateConfig(min_updates=30, epochs=1, feature_epochs=1, batch_size=8, bf16=False)


@pytest.fixture
def swapped():
    def make(setting="cheap", **more):
        torch.manual_seed(1)
        model = timm.create_model(
            "vit_small_patch14_dinov2", img_size=56, num_classes=0, depth=2, embed_dim=24, num_heads=3
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        handle = mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting], **more))
        return model, handle

    return make


def images(n=48):
    return torch.randn(n, 3, 56, 56, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("setting", SETTINGS)
def test_calibrate__brings_every_layer_closer_on_held_out_images(swapped, setting):
    model, handle = swapped(setting)
    untouched = {k: v.clone() for k, v in model.state_dict().items() if ".attn." not in k}
    report = mrl.calibrate(handle, [images()], config=SHORT)
    stats, layers, features = report.stages
    assert (stats.stage, layers.stage, features.stage) == ("stats", "layers", "features")
    assert (stats.updates, layers.updates, features.updates, report.updates) == (0, 30, 30, 60)
    assert features.mean_error_after < features.mean_error_before
    assert layers.mean_error_after < stats.mean_error_before
    assert all(layers.error_after[n] <= layers.error_before[n] for n in handle.names)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in untouched.items())
    assert report.n_images == 48
    assert set(report.to_dict()) >= {"stages", "updates", "seconds", "n_images", "layers"}


def test_calibrate__the_undo_is_still_bit_exact(swapped):
    model, handle = swapped()
    x = images(2)
    with handle.disabled():
        before = model(x)
    mrl.calibrate(handle, [images()], config=SHORT)
    assert not torch.equal(model(x), before)
    handle.restore()
    assert torch.equal(model(x), before)


def test_calibrate__the_same_seed_gives_the_same_weights(swapped):
    states = []
    for _ in range(2):
        model, handle = swapped()
        torch.rand(7)  # the caller's random numbers do not matter
        mrl.calibrate(handle, ({"image": part} for part in images().split(10)), config=SHORT)
        states.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_calibrate__statistics_change_nothing_in_eval(swapped):
    model, handle = swapped("paper")
    x = images(4)
    before = model(x)
    collect_statistics(list(handle.mixers().values()), lambda: model(images(16)))
    norm = model.blocks[0].attn.mrl.norm_q
    assert not torch.allclose(norm.running_mean, torch.zeros(24))
    assert torch.allclose(model(x), before, atol=1e-4)


def test_calibrate__a_stage_that_does_not_help_is_rejected(swapped):
    model, handle = swapped()
    state = copy.deepcopy(model.state_dict())
    config = CalibrateConfig(
        min_updates=3, epochs=0.1, feature_epochs=0.1, batch_size=8, lr_new=30.0, lr_inherited=30.0, bf16=False
    )
    report = mrl.calibrate(handle, [images()], stages=("layers", "features"), config=config)
    for stage in report.stages:
        assert stage.accepted == []
        assert stage.mean_error_after == stage.mean_error_before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("loader", "stages", "message"),
    [
        ([torch.randn(2, 3, 56, 56)], ("stats",), "at least 4"),
        ([torch.randn(4, 3, 56, 56), torch.randn(4, 3, 56, 42)], ("stats",), "several sizes"),
        ([torch.randn(8, 3, 56, 56)], ("magic",), "unknown 'magic'"),
    ],
)
def test_calibrate__wrong_input_is_one_sentence(swapped, loader, stages, message):
    with pytest.raises(mrl.ConfigError, match=message):
        mrl.calibrate(swapped()[1], loader, stages=stages)


@pytest.mark.slow
@pytest.mark.parametrize(
    "field",
    [
        "epochs",
        "feature_epochs",
        "min_updates",
        "batch_size",
        "lr_new",
        "lr_inherited",
        "held_out",
        "max_images",
        "augment",
        "bf16",
        "seed",
    ],
)
def test_calibrate_config__every_field_changes_the_result(swapped, field):
    base = {"epochs": 1, "feature_epochs": 1, "min_updates": 4, "batch_size": 8, "lr_new": 1e-3, "lr_inherited": 1e-4, "held_out": 0.1, "max_images": 48, "augment": True,
            "bf16": False, "seed": 0}  # fmt: skip
    other = {"epochs": 3, "feature_epochs": 3, "min_updates": 9, "batch_size": 4, "lr_new": 1e-2, "lr_inherited": 1e-3, "held_out": 0.3, "max_images": 20, "augment": False,
             "bf16": True, "seed": 1}  # fmt: skip
    found = []
    for values in (base, {**base, field: other[field]}):
        model, handle = swapped()
        mrl.calibrate(handle, [images()], config=CalibrateConfig(**values))
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert not torch.equal(*found)
