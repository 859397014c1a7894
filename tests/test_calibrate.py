"""Calibration: neutral statistics, falling held-out errors, nothing outside the mixers touched."""

import copy
import dataclasses

import pytest
import timm
import torch

import mrl
from mrl.swap import SETTINGS, CalibrateConfig, Plan, PlanRow, SwapConfig
from mrl.swap.neutral import collect_statistics
from mrl.swap.resume import Resume
from mrl.swap.ridge import Ridge, fit_projections

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
    untouched = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("blocks.")}
    report = mrl.calibrate(handle, [images()], config=SHORT)
    assert [stage.stage for stage in report.stages] == ["stats", "ridge", "layers", "features"]
    stats, ridge, layers, features = report.stages
    assert ridge.updates == 0
    assert ridge.mean_error_after < ridge.mean_error_before
    assert all(ridge.error_after[n] <= ridge.error_before[n] for n in handle.names)
    assert (stats.updates, layers.updates, features.updates, report.updates) == (0, 30, 30, 60)
    assert features.mean_error_after < features.mean_error_before
    assert layers.mean_error_after < stats.mean_error_before
    assert all(layers.error_after[n] <= layers.error_before[n] for n in handle.names)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in untouched.items())
    assert report.n_images == 48
    assert set(report.to_dict()) >= {"stages", "updates", "seconds", "n_images", "layers"}


@pytest.mark.parametrize("scope", ["blocks", "mixers"])
def test_calibrate__the_undo_is_still_bit_exact(swapped, scope):
    model, handle = swapped()
    x = images(2)
    with handle.disabled():
        before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    mrl.calibrate(handle, [images()], config=dataclasses.replace(SHORT, scope=scope))
    changed = [
        k for k, v in model.state_dict().items() if k in state and ".attn." not in k and not torch.equal(v, state[k])
    ]
    assert bool(changed) == (scope == "blocks")
    assert all(name.startswith("blocks.") for name in changed)
    student = model(x)
    assert not torch.equal(student, before)
    with handle.disabled():
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), student)
    handle.restore(handle.names[:1])
    handle.restore()
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_calibrate__the_same_seed_gives_the_same_weights(swapped):
    states = []
    for _ in range(2):
        model, handle = swapped()
        torch.rand(7)  # the caller's random numbers do not matter
        mrl.calibrate(handle, ({"image": part} for part in images().split(10)), config=SHORT)
        states.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


class Killed(BaseException):
    """Stands for a signal, in the middle of an update."""


@pytest.mark.parametrize(("stage", "saves"), [("ridge", 0), ("layers", 7), ("features", 11)])
def test_calibrate__a_killed_run_goes_on_and_gives_the_same_weights(swapped, monkeypatch, tmp_path, stage, saves):
    config = dataclasses.replace(SHORT, min_updates=15)
    model, handle = swapped()
    whole = mrl.calibrate(handle, [images()], config=config)
    monkeypatch.setattr("mrl.swap.resume.SAVE_SECONDS", 0.0)
    real, seen = Resume.save, {"stage": "stats", "n": 0}

    def save(self, tensors, reports, inside=None):
        real(self, tensors, reports, inside)
        at = mrl.swap.calibrator.STAGES[min(len(reports), 3)]
        seen["n"] = seen["n"] + 1 if at == seen["stage"] else 0
        seen["stage"] = at
        if at == stage and seen["n"] >= saves:
            raise Killed

    monkeypatch.setattr(Resume, "save", save)
    again, handle = swapped()
    with pytest.raises(Killed):
        mrl.calibrate(handle, [images()], config=config, checkpoint=tmp_path)
    monkeypatch.setattr(Resume, "save", real)
    step, steps = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (steps.append(1), step(self, *a))[1])
    again, handle = swapped()
    report = mrl.calibrate(handle, [images()], config=config, checkpoint=tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert len(steps) == report.updates - saves - (stage == "features") * report.stages[2].updates
    assert [s.error_after for s in report.stages] == [s.error_after for s in whole.stages]
    assert [s.error_before for s in report.stages] == [s.error_before for s in whole.stages]
    handle.restore()
    fresh, untouched = swapped()
    untouched.restore()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_calibrate__a_checkpoint_of_another_calibration_is_refused(swapped, tmp_path):
    mrl.calibrate(swapped()[1], [images()], stages=("stats",), config=SHORT, checkpoint=tmp_path)
    with pytest.raises(mrl.ConfigError, match=r"another calibration is there \(config, images differ\)"):
        mrl.calibrate(
            swapped()[1],
            [images(40)],
            stages=("stats",),
            config=dataclasses.replace(SHORT, seed=1),
            checkpoint=tmp_path,
        )


def test_calibrate__statistics_change_nothing_in_eval(swapped):
    model, handle = swapped("paper")
    x = images(4)
    before = model(x)
    collect_statistics(list(handle.mixers().values()), lambda: model(images(16)))
    norm = model.blocks[0].attn.mrl.norm_q
    assert not torch.allclose(norm.running_mean, torch.zeros(24))
    assert torch.allclose(model(x), before, atol=1e-4)


def spoil(handle, images, held, **more):
    """A pass along the stream that makes everything worse."""
    handle.keep_blocks()
    with torch.no_grad():
        handle.model.blocks[0].mlp.fc2.weight.add_(1.0)
        handle.model.blocks[1].attn.proj.weight.add_(1.0)


def test_calibrate__a_stage_that_does_not_help_is_rejected(swapped, monkeypatch):
    monkeypatch.setattr("mrl.swap.calibrator.follow_stream", spoil)
    model, handle = swapped()
    state = copy.deepcopy(model.state_dict())
    config = CalibrateConfig(
        min_updates=3,
        epochs=0.1,
        feature_epochs=0.1,
        batch_size=8,
        lr_new=30.0,
        lr_inherited=30.0,
        lr_features=30.0,
        bf16=False,
    )
    report = mrl.calibrate(handle, [images()], stages=("layers", "features"), config=config)
    for stage in report.stages:
        assert stage.accepted == []
        assert stage.mean_error_after == stage.mean_error_before
    assert report.stages[0].stream_after == report.stages[0].stream_before > 0
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
        "lr_features",
        "scope",
        "held_out",
        "max_images",
        "augment",
        "bf16",
        "seed",
    ],
)
def test_calibrate_config__every_field_changes_the_result(swapped, field):
    base = {"epochs": 1, "feature_epochs": 1, "min_updates": 4, "batch_size": 8, "lr_new": 1e-3, "lr_inherited": 1e-4, "lr_features": 1e-4, "scope": "blocks", "held_out": 0.1, "max_images": 48, "augment": True,
            "bf16": False, "seed": 0}  # fmt: skip
    other = {"epochs": 3, "feature_epochs": 3, "min_updates": 9, "batch_size": 4, "lr_new": 1e-2, "lr_inherited": 1e-3, "lr_features": 1e-3, "scope": "mixers", "held_out": 0.3, "max_images": 20, "augment": False,
             "bf16": True, "seed": 1}  # fmt: skip
    found = []
    for values in (base, {**base, field: other[field]}):
        model, handle = swapped()
        mrl.calibrate(handle, [images()], config=CalibrateConfig(**values))
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert not torch.equal(*found)


def test_calibrate__leaves_out_stages_without_updates(swapped):
    config = CalibrateConfig(epochs=0, feature_epochs=0, min_updates=0, bf16=False)
    model, handle = swapped()
    report = mrl.calibrate(handle, [images()], config=config)
    assert [stage.stage for stage in report.stages] == ["stats", "ridge"]
    assert report.updates == 0
    assert (
        report.stages[-1].stream_after < report.stages[-1].stream_before
    )  # the pass along the stream ends the last one
    asked, other = swapped()
    mrl.calibrate(other, [images()], stages=("stats", "ridge"), config=config)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in asked.state_dict().items())


def test_calibrate__layers_over_the_budget_are_restored(swapped):
    _, handle = swapped()
    reference = mrl.calibrate(handle, [images()], config=SHORT).to_dict()
    errors = reference["layers"]
    assert reference["restored"] == []
    _, handle = swapped()
    between = sum(errors.values()) / 2
    report = mrl.calibrate(
        handle, [images()], config=dataclasses.replace(SHORT, scope="mixers", feature_epochs=0.1, budget=between)
    )
    assert report.restored
    assert set(report.restored).isdisjoint(handle.names)
    assert report.to_dict()["restored"] == report.restored
    everything = swapped()[1]
    mrl.calibrate(everything, [images()], stages=("stats",), config=dataclasses.replace(SHORT, budget=0.0))
    assert everything.names == []


def test_ridge__recovers_a_planted_projection_and_leaves_what_it_cannot_help():
    linear = torch.nn.Linear(6, 4)
    start, y = linear.weight.detach().clone(), torch.randn(500, 6)
    target = y @ torch.randn(4, 6).T + 3
    sums = Ridge(linear)
    for part in y.split(100):
        sums.add(part, target[: len(part)])
        target = target[len(part) :]
    weight, bias = sums.solve(1e-9)
    assert torch.allclose(bias, torch.full((4,), 3.0), atol=1e-4)
    stiff, _ = sums.solve(1e6)
    assert torch.allclose(stiff, start, atol=1e-4)  # pulled toward what was inherited
    assert not torch.allclose(weight, start, atol=1e-2)
    fit_projections({"a": sums}, lambda: {"a": float((linear.weight - start).abs().sum())})
    assert torch.equal(linear.weight, start)


def planned(*times):
    row = {
        "kind": "A",
        "adapter": "timm_vit",
        "input": "",
        "prefix_tokens": 0,
        "grid_from": "",
        "extras": [],
        "region": (2, 2),
        "action": "swap",
    }
    rows = [PlanRow(name=n, **row, block_latency_ms_before=b, block_latency_ms_after=a) for n, b, a in times]
    return Plan(rows, SwapConfig())


def test_select__spends_the_budget_where_it_buys_most():
    plan = planned(("a", 4.0, 2.0), ("b", 4.0, 3.0), ("c", 4.0, 3.0), ("d", 4.0, 5.0))
    errors = {"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.0}
    assert mrl.select(plan, errors, max_error=0.1) == ["b"]
    assert mrl.select(plan, errors, max_error=0.41) == ["a", "b"]
    assert mrl.select(plan, errors, max_error=9) == ["a", "b", "c"]  # d would be slower
    assert mrl.select(plan, errors, max_latency_ratio=0.95) == ["b"]
    assert mrl.select(plan, errors, max_latency_ratio=0.82) == ["a", "b"]
    assert mrl.select(plan, errors, max_latency_ratio=0.75) == ["a", "b", "c"]
    for told, message in (
        ({}, "either"),
        ({"max_error": 1, "max_latency_ratio": 0.5}, "either"),
        ({"max_latency_ratio": 0.5}, "reach 0.75"),
    ):
        with pytest.raises(mrl.ConfigError, match=message):
            mrl.select(plan, errors, **told)
    with pytest.raises(mrl.ConfigError, match="no error is given for b"):
        mrl.select(plan, {"a": 1.0}, max_error=1)
    with pytest.raises(mrl.ConfigError, match="no times"):
        mrl.select(planned(("a", None, None)), {"a": 1.0}, max_error=1)


def test_plan__says_when_it_cannot_pay_off():
    plan = planned(("a", 4.0, 4.4))
    assert plan.advice == ""
    plan.predicted_latency_ratio = 1.1
    plan.rows[0].tokens_before = 65
    assert "cannot pay off" in str(plan)
    assert "65 tokens" in plan.advice
    plan.predicted_latency_ratio = 0.6
    assert plan.advice == ""
