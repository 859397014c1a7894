"""Every height and width from 1 to 17 with every region from 1 to 8, against loops over regions."""

import itertools

import numpy as np
import pytest
import torch

import reference
from mrl.blocks import RegionalLocalMixer
from test_blocks import randomized


def shifted_convolution(u, weight, bias):
    """Depthwise 3 x 3 on (B, H, W, C), tap by tap."""
    padded = np.pad(u, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = u.shape[1:3]
    taps = [padded[:, a : a + height, b : b + width] * weight[:, 0, a, b] for a in range(3) for b in range(3)]
    return sum(taps) + bias


def attention(q, k, v, heads, scale, bias):
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).swapaxes(1, 2) for t in (q, k, v))
    logits = scale * q @ k.swapaxes(2, 3) + bias
    share = np.exp(logits - logits.max(-1, keepdims=True))
    out = (share / share.sum(-1, keepdims=True)) @ v
    return out.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)


def by_regions(x, weights, heads, region, training, common):
    """The mixer of block.md with a loop over regions, float64."""
    batch, height, width, dim = x.shape
    cells = reference.regions(height, width, (region, region))
    share = np.array([len(cell) for cell in cells]) / region**2
    grid = -(-height // region), -(-width // region)

    def reduced(full, taps):
        return np.stack(
            [
                sum(full[:, i, j] * taps[:, 0, a, b] for i, j, a, b in cell) / s
                for cell, s in zip(cells, share, strict=True)
            ],
            1,
        )

    tokens = {}
    if common:
        basis, _ = reference.batch_norm(reduced(x, weights["basis.conv.weight"]), weights, "basis.norm", training)
        basis = reference.linear(basis, weights, "basis.proj").reshape(batch, *grid, dim)
    for n in "qkv":
        if common:
            part, name = shifted_convolution(basis, weights[f"basis.{n}_conv.weight"], 0), f"basis.{n}_norm"
            part = part.reshape(batch, -1, dim)
        else:
            part, name = reduced(reference.linear(x, weights, f"{n}_proj"), weights[f"{n}_conv.weight"]), f"{n}_norm"
        tokens[n], _ = reference.batch_norm(part, weights, name, training)
    mixed = attention(tokens["q"], tokens["k"], tokens["v"], heads, (dim // heads) ** -0.5, np.log(share))
    u = x.copy()
    for r, cell in enumerate(cells):
        for i, j, _, _ in cell:
            u[:, i, j] += mixed[:, r]
    return reference.linear(shifted_convolution(u, weights["local.weight"], weights["local.bias"]), weights, "proj")


def check(heights, widths, regions):
    for region, common in itertools.product(regions, (False, True)):
        mixer = randomized(RegionalLocalMixer(4, 2, region, qkv="common" if common else "separate").double())
        weights = {name: value.detach().clone().numpy() for name, value in mixer.state_dict().items()}
        state = {name: value.clone() for name, value in mixer.state_dict().items()}
        for height, width, training in itertools.product(heights, widths, (False, True)):
            for composed in (False,) if common else (False, True):
                mixer.load_state_dict(state)
                mixer.train(training)
                mixer._composes = lambda x, answer=composed: answer
                x = torch.randn(2, height, width, 4).double().requires_grad_()
                y = mixer(x)
                y.square().sum().backward()
                case = f"{height} x {width}, region {region}, {common=}, {training=}, {composed=}"
                expected = by_regions(x.detach().numpy(), weights, 2, region, training, common)
                np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-7, atol=1e-8, err_msg=case)
                assert x.grad.isfinite().all(), case
                assert all(p.grad.isfinite().all() for p in mixer.parameters()), case


def test_ragged__some_sizes():
    check((1, 5, 8, 17), (1, 3, 16), (1, 2, 3, 5, 8))


@pytest.mark.slow
@pytest.mark.parametrize("region", range(1, 9))
def test_ragged__every_size(region):
    check(range(1, 18), range(1, 18), (region,))


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("variant", [{}, {"qkv": "common"}, {"reduce": "mean"}])
def test_ragged__nothing_is_padded_where_the_region_divides(variant, composed, monkeypatch):
    x = torch.randn(2, 6, 12, 8)
    mixer = randomized(RegionalLocalMixer(8, 2, 3, **variant))
    mixer._composes = lambda x: composed
    before = [copy_of(mixer).train(training)(x) for training in (True, False)]

    def refuse(*args, **kwargs):
        raise AssertionError("padded")

    monkeypatch.setattr(torch.nn.functional, "pad", refuse)
    monkeypatch.setattr("mrl.blocks.regions.valid_counts", refuse)
    monkeypatch.setattr("mrl.blocks.mixer.valid_counts", refuse)
    for training, expected in zip((True, False), before, strict=True):
        assert torch.equal(copy_of(mixer).train(training)(x), expected)
    with pytest.raises(AssertionError, match="padded"):
        mixer(x[:, :5])


def copy_of(mixer):
    import copy

    return copy.deepcopy(mixer)
