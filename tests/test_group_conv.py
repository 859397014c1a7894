import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mrl.blocks import LocalGroupConv, P4MConv2d, p4m_inverse, p4m_product, p4m_transform
from mrl.errors import ConfigError

ELEMENTS = range(8)


def error(a, b):
    return (a - b).abs().max().item()


def test_p4m__is_a_group_and_acts_as_one():
    plane = torch.arange(15.0).view(1, 3, 5)
    fields = torch.arange(8 * 15.0).view(8, 3, 5)
    for a, b in itertools.product(ELEMENTS, ELEMENTS):
        ab = p4m_product(a, b)
        for x, kind in ((plane, False), (fields, True)):
            twice = p4m_transform(p4m_transform(x, b, fields=kind), a, fields=kind)
            assert torch.equal(twice, p4m_transform(x, ab, fields=kind))
        assert p4m_product(p4m_product(a, b), 3) == p4m_product(a, p4m_product(b, 3))
    for a in ELEMENTS:
        assert p4m_product(a, 0) == p4m_product(0, a) == a
        assert p4m_product(a, p4m_inverse(a)) == p4m_product(p4m_inverse(a), a) == 0
        assert sorted(p4m_product(a, b) for b in ELEMENTS) == list(ELEMENTS)


def test_p4m_transform__is_turns_then_reversed_rows():
    x = torch.randn(1, 3, 5)
    for m, r in itertools.product((0, 1), range(4)):
        expected = torch.rot90(x, r, (-2, -1))
        expected = expected.flip(-2) if m else expected
        assert torch.equal(p4m_transform(x, 4 * m + r, fields=False), expected)
    fields = torch.randn(16, 3, 5)
    for h, s in itertools.product(ELEMENTS, ELEMENTS):
        moved = p4m_transform(fields, h)[8 + s]
        source = fields[8 + p4m_product(p4m_inverse(h), s)]
        assert torch.equal(moved, p4m_transform(source[None], h, fields=False)[0])


CONVS = [
    {"in_fields": 2, "out_fields": 3, "kernel_size": 3, "padding": 1},
    {"in_fields": 2, "out_fields": 2, "kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
    {"in_fields": 1, "out_fields": 2, "kernel_size": 5},
    {"in_fields": 2, "out_fields": 1, "kernel_size": 1, "padding": 1},
]


@pytest.mark.parametrize("kwargs", CONVS)
@pytest.mark.parametrize("size", [(7, 7), (6, 8), (5, 9)])
def test_p4m_conv__is_equivariant(kwargs, size):
    torch.manual_seed(0)
    conv = P4MConv2d(**kwargs).double()
    x = torch.randn(2, 8 * kwargs["in_fields"], *size).double()
    y = conv(x)
    assert y.abs().mean() > 0.05
    for element in ELEMENTS:
        assert error(conv(p4m_transform(x, element)), p4m_transform(y, element)) < 1e-12


@pytest.mark.parametrize("control", ["plain", "stride"])
def test_p4m_conv__negative_controls_fail(control):
    torch.manual_seed(0)
    x = torch.randn(1, 16, 8, 8).double()
    if control == "plain":
        layer = nn.Conv2d(16, 16, 3, padding=1).double()
    else:
        weight, bias = P4MConv2d(2, 2, 3).double().bank()

        def layer(x):
            return F.conv2d(x, weight, bias, padding=1, stride=2)

    y = layer(x)
    # Transposing an even map keeps the grid of stride 2, so 5 and 7 go through there.
    broken = [e for e in ELEMENTS if error(layer(p4m_transform(x, e)), p4m_transform(y, e)) > 1e-3]
    assert set(broken) >= ({1, 2, 3, 4, 6} if control == "stride" else set(ELEMENTS) - {0})


@pytest.mark.parametrize("kwargs", CONVS)
def test_p4m_conv__folded_bank_equals_layer(kwargs):
    conv = P4MConv2d(**kwargs).double()
    x = torch.randn(2, 8 * kwargs["in_fields"], 6, 7).double()
    plain = conv.to_conv2d()
    assert type(plain) is nn.Conv2d
    assert torch.equal(plain(x), conv(x))
    shared = conv.weight.numel() * 8 + (0 if conv.bias is None else conv.bias.numel() * 8)
    assert sum(p.numel() for p in plain.parameters()) == shared


def test_p4m_conv__gradients_and_formats():
    conv = P4MConv2d(1, 1, 3, padding=1).double()
    x = torch.randn(1, 8, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(conv, {"weight": w}, x), (x, conv.weight))
    assert sorted(conv.state_dict()) == ["bias", "weight"]
    assert conv.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert P4MConv2d(1, 2, 3, device="meta")(torch.empty(1, 8, 5, 5, device="meta")).shape == (1, 16, 3, 3)


def test_p4m_conv__survives_the_meta_device():
    with torch.device("meta"):
        empty = P4MConv2d(2, 1, 3)
    conv, x = P4MConv2d(2, 1, 3), torch.randn(1, 16, 5, 5)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(conv.state_dict())
    assert torch.equal(filled(x), conv(x))


def test_local_group_conv__mixes_each_field_only():
    local = LocalGroupConv(16)
    x = torch.zeros(1, 5, 5, 16)
    change = torch.zeros_like(x)
    change[..., 3] = 1
    moved = (local(x + change) - local(x)).abs().amax((0, 1, 2))
    assert moved[:8].min() > 0
    assert moved[8:].max() == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: P4MConv2d(1, 1, 2), "even kernel has no centre; use 1, 3, 5 or 7"),
        (lambda: P4MConv2d(2, 3, 3, groups=2), "groups must divide"),
        (lambda: P4MConv2d(0, 1, 3), "groups must divide"),
        (lambda: LocalGroupConv(12), "12 channels are not fields of 8 orientations; use 16 channels"),
        (lambda: p4m_transform(torch.ones(4, 2, 2), 1), "4 channels are not fields of 8"),
    ],
)
def test_p4m__refuses(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


CHANGES = {
    "in_fields": 4,
    "out_fields": 4,
    "kernel_size": 5,
    "padding": 1,
    "groups": 2,
    "bias": False,
    "dtype": torch.float64,
}


@pytest.mark.parametrize("argument", CHANGES)
def test_p4m_conv__every_argument_changes_something(argument):
    def outcome(**kwargs):
        conv = P4MConv2d(**{"in_fields": 2, "out_fields": 2, "kernel_size": 3, **kwargs})
        x = torch.randn(1, 8 * conv.in_fields, 9, 9, dtype=conv.weight.dtype)
        return {k: (v.shape, v.dtype) for k, v in conv.state_dict().items()}, conv(x).shape

    assert outcome() != outcome(**{argument: CHANGES[argument]})
