"""Closed forms of the calibration: the local convolution, and the pass along the residual stream."""

import contextlib
import functools

import pytest
import timm
import torch
from torch import nn

import mrl
from mrl.swap import SETTINGS, CalibrateConfig, SwapConfig
from mrl.swap.calls import Call
from mrl.swap.features import FINAL, Teacher
from mrl.swap.stream import find_joints, follow_stream
from mrl.swap.taps import fit_taps


def vit(depth=2, **more):
    torch.manual_seed(1)
    options = {"img_size": (56, 70), "num_classes": 0, "depth": depth, "embed_dim": 24, "num_heads": 3}
    model = timm.create_model("vit_small_patch14_dinov2", **{**options, **more}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def images(n=40, size=(56, 70)):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def apart(handle, x):
    """Distance of the student's last tokens from the teacher's, relative to the teacher's size."""
    with handle.disabled():
        theirs = handle.model.forward_features(x)
    ours = handle.model.forward_features(x)
    return float((ours - theirs).norm() / theirs.norm())


def test_find_joints__reads_gains_from_what_passes_through():
    model = vit()
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    joints = {joint.linear: joint for joint in find_joints(handle, images(2))}
    assert list(joints) == ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc2"]
    for i, block in enumerate(model.blocks):
        for linear, scale in ((f"blocks.{i}.attn.proj", block.ls1), (f"blocks.{i}.mlp.fc2", block.ls2)):
            assert torch.allclose(joints[linear].gain, scale.gamma, atol=1e-3)
    assert joints["blocks.1.attn.proj"].after == "blocks.1.norm2"
    assert joints["blocks.1.mlp.fc2"].elements == ((1 + 20) * 96, (1 + 20) * 24)
    without = [joint.linear for joint in find_joints(handle, images(2), blocks=False)]
    assert without == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


@pytest.mark.parametrize("blocks", [True, False])
def test_follow_stream__undoes_planted_errors_of_the_mixers_before(blocks):
    model = vit()
    handle = mrl.swap_(model, mrl.plan(model, region=1))
    assert apart(handle, images(4)) < 1e-5
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.mul_(1.5)
        model.blocks[1].attn.proj.bias.add_(0.7)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = apart(handle, images(4))
    changed = follow_stream(handle, images(), images(48)[40:], blocks=blocks)
    assert before > 0.05
    assert apart(handle, images(4)) < 2e-3 * before  # 1.3e-3: what the pull toward the present values leaves
    assert changed >= 2
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert all(k.endswith(("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")) for k in moved)
    assert blocks or not any("fc2" in k for k in moved)


def test_follow_stream__asking_the_teacher_bit_by_bit_changes_nothing(monkeypatch):
    states = []
    for elements in (10**9, 1):
        monkeypatch.setattr("mrl.swap.stream.ELEMENTS", elements)
        model = vit()
        handle = mrl.swap_(model, mrl.plan(model, region=2))
        assert follow_stream(handle, images(), images(48)[40:]) > 0
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("setting", SETTINGS)
def test_follow_stream__lowers_the_error_of_a_real_swap_on_unseen_images(setting):
    model = vit(3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(3)  # attention that is far from uniform
    handle = mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    smooth = nn.functional.interpolate(
        torch.randn(376, 3, 4, 5, generator=torch.Generator().manual_seed(9)), (56, 70), mode="bicubic"
    )
    fit, held, unseen = smooth.split([300, 60, 16])  # neighbours resemble each other, as in pictures
    teacher = Teacher(handle, unseen, contextlib.nullcontext)
    before = teacher.error()[FINAL]
    follow_stream(handle, fit, held)
    assert teacher.error()[FINAL] < before
    with handle.disabled():
        teacher = model(unseen)
    handle.restore()
    assert torch.equal(model(unseen), teacher)


def test_follow_stream__in_bfloat16_gets_closer_too_and_leaves_channels_that_hardly_count():
    model = vit()
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma[:3] = 1e-6  # what the attention says there does not reach the stream
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    error = apart(handle, images(48)[40:])
    half = functools.partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    assert follow_stream(handle, images(), images(48)[40:], autocast=half) > 0
    assert apart(handle, images(48)[40:]) < error
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    weights = [k for k in changed if k.endswith("proj.weight")]
    assert weights
    assert all(model.state_dict()[k].dtype == torch.float32 for k in changed)
    for name in weights:
        rows = (model.state_dict()[name] - before[name]).abs().amax(1)
        assert rows[:3].max() < 0.05 * rows[3:].median()


class Sums(nn.Module):
    """A block around nn.MultiheadAttention: norms after the sums, or on the branch, where no stream can be found."""

    def __init__(self, on_branch):
        super().__init__()
        self.self_attn, self.norm, self.on_branch = (
            nn.MultiheadAttention(16, 2, batch_first=True),
            nn.LayerNorm(16),
            on_branch,
        )

    def forward(self, x):
        answer = self.self_attn(x, x, x)[0]
        return x + self.norm(answer) if self.on_branch else self.norm(x + answer)


@pytest.mark.parametrize("on_branch", [False, True])
def test_follow_stream__other_blocks(on_branch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), Turn(), Sums(on_branch), Sums(on_branch)).eval()
    x = images(60, (32, 32))
    handle = mrl.swap_(net, mrl.plan(net, region=1))
    handle.fix_grid((4, 4))
    with torch.no_grad():
        net[3].self_attn.out_proj.weight.mul_(torch.linspace(0.5, 2, 16)[:, None])
    joints = find_joints(handle, x[:2])
    assert [j.linear for j in joints] == ["3.self_attn.out_proj", "4.self_attn.out_proj"]
    assert [j.gain is None for j in joints] == [on_branch, on_branch]
    with torch.no_grad(), handle.disabled():
        theirs = net(x[:4])
    before = float((net(x[:4]) - theirs).detach().norm())
    assert follow_stream(handle, x[:48], x[48:]) >= 1
    assert float((net(x[:4]) - theirs).detach().norm()) < 1e-2 * before


def test_find_joints__a_block_that_runs_twice_is_left_out():
    torch.manual_seed(0)
    shared = Sums(False)
    net = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), Turn(), shared, shared, Sums(False)).eval()
    handle = mrl.swap_(net, mrl.plan(net, region=1))
    handle.fix_grid((4, 4))
    x = images(12, (32, 32))
    assert [joint.linear for joint in find_joints(handle, x)] == ["5.self_attn.out_proj"]
    follow_stream(handle, x[:8], x[8:])


class Turn(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_follow_stream__leaves_what_it_cannot_help():
    model = vit()
    handle = mrl.swap_(model, mrl.plan(model, region=1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    follow_stream(handle, images(3), images(5)[3:])  # 60 positions, 96 unknowns an output
    assert apart(handle, images(4)) < 1e-4
    assert set(model.state_dict()) == set(state)


@pytest.mark.parametrize(
    ("group_size", "gain", "kernel_size"),
    [(1, "channel", 3), (4, "scalar", 3), (24, None, 3), (4, "channel", 1), (1, "channel", 5), (4, None, 7)],
)
def test_fit_taps__recovers_planted_taps(group_size, gain, kernel_size):
    model = vit()
    config = SwapConfig(
        group_size=group_size, kernel_size=kernel_size, learn_local_gain=gain, local_gain=0.0 if gain else 0.5
    )
    handle = mrl.swap_(model, mrl.plan(model, region=2, config=config))
    mixer = model.blocks[1].attn
    seen = []
    hook = mixer.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(images(24))
    hook.remove()
    start = {k: v.clone() for k, v in mixer.state_dict().items()}
    with torch.no_grad():
        mixer.mrl.local.weight.add_(0.2 * torch.randn_like(mixer.mrl.local.weight))
        mixer.mrl.local.bias.add_(0.3)
        if gain:
            mixer.mrl.local_gain.add_(0.4)
        call = Call(*seen[0], mixer(*seen[0][0], **seen[0][1]).clone())
    mixer.load_state_dict(start)

    def error():
        with torch.no_grad():
            return float((call.run(mixer) - call.output).square().sum() / call.output.square().sum())

    before = error()
    assert fit_taps(mixer, [call])
    assert error() < 0.05 * before
    assert all(torch.equal(v, start[k]) for k, v in mixer.state_dict().items() if not k.startswith(("mrl.local",)))
    assert not hasattr(mixer.mrl, "__dict__") or "_local" not in vars(mixer.mrl)
    assert len(handle.names) == 2


def test_fit_taps__a_wrapped_projection_is_left_alone():
    model = vit()
    mrl.swap_(model, mrl.plan(model, region=2))
    mixer = model.blocks[0].attn
    mixer.proj = nn.Sequential(mixer.proj)
    assert not fit_taps(mixer, [])


@pytest.mark.parametrize("bf16", [False, True])
def test_calibrate__closed_forms_alone_bring_the_final_features_back(bf16):
    model = vit(3)
    handle = mrl.swap_(model, mrl.plan(model, region=2))
    report = mrl.calibrate(handle, [images(120)], stages=("stats", "ridge"), config=CalibrateConfig(bf16=bf16))
    stats, ridge = report.stages
    assert report.updates == 0
    assert stats.stream_before is None
    assert ridge.stream_after < ridge.stream_before
    assert ridge.mean_error_after < ridge.mean_error_before
