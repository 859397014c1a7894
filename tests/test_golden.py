"""Equality with the numbers of the authors' implementation."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from mrl.blocks import RegionalLocalMixer
from mrl.errors import ConfigError
from mrl.models import convert_original

GOLDEN = Path(__file__).parent / "golden"


def read(case):
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def cases(kind):
    found = [p.stem for p in sorted(GOLDEN.glob("*.safetensors")) if not p.stem.startswith("net_")]
    return [case for case in found if read(case)[0]["kind"] == kind]


def error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()


def golden_mixer(case):
    meta, tensors = read(case)
    dim, heads, region, group = (int(meta[k]) for k in ("dim", "num_heads", "region_size", "channels_per_group"))
    mixer = RegionalLocalMixer(dim, heads, region, group, scale=dim**-0.5).double()
    params = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    mixer.load_state_dict(convert_original(params))
    shape = (int(meta["B"]), int(meta["H"]), int(meta["W"]), dim)
    x = tensors["x"].double().view(shape).requires_grad_()
    return mixer, x, tensors["grad_out"].double().view(shape), tensors


def named(tensors, start):
    """Golden tensors under `start`, with our names."""
    return convert_original({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})


@pytest.mark.parametrize("case", cases("mrl"))
def test_mixer__eval_equals_golden(case):
    mixer, x, grad_out, tensors = golden_mixer(case)
    y = mixer.eval()(x)
    (y * grad_out).sum().backward()
    assert error(y, tensors["eval.y"].view_as(y)) <= 1e-9
    assert error(x.grad, tensors["eval.grad_x"].view_as(x)) <= 1e-9
    expected = named(tensors, "eval.grad.")
    ours = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    assert sorted(ours) == sorted(expected)
    errors = {name: error(ours[name], expected[name].view_as(ours[name])) for name in ours}
    # Zero in exact arithmetic: the golden values themselves are rounding noise of up to 2.3e-15, relative to 1e-6 here.
    noise = [errors.pop(name) for name in ("k_proj.bias", "k_norm.bias")]
    assert max(noise) <= 1e-8
    assert max(errors.values()) <= 1e-9, errors


@pytest.mark.parametrize("case", cases("mrl"))
def test_mixer__train_equals_golden(case):
    mixer, x, grad_out, tensors = golden_mixer(case)
    y = mixer.train()(x)
    (y * grad_out).sum().backward()
    assert error(y, tensors["train.y"].view_as(y)) <= 1e-9
    assert error(x.grad, tensors["train.grad_x"].view_as(x)) <= 1e-9
    after = mixer.state_dict()
    expected = named(tensors, "train.after.")
    assert len(expected) == 6
    for name, value in expected.items():
        assert error(after[name], value) <= 1e-9, name


@pytest.mark.parametrize("kind", ["mrl_common_qkv", "common_qkv"])
def test_convert_original__later_variants_are_named(kind):
    for case in cases(kind):
        _, tensors = read(case)
        params = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
        with pytest.raises(ConfigError, match=r"CommonQKV, which is not in this version"):
            convert_original(params)


def golden_fill():
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("net_*.json")), ids=lambda path: path.stem)
def test_net__equals_golden(path):
    about, fill = json.loads(path.read_text()), golden_fill()
    weights = {name: torch.from_numpy(fill.fill(name, tuple(shape))) for name, shape in about["state_dict"].items()}
    if about["variant"] != "mrl":
        with pytest.raises(ConfigError, match="not in this version"):
            convert_original(weights)
        return
    model = timm.create_model(path.stem.removeprefix("net_")).eval()
    assert sum(p.numel() for p in model.parameters()) == about["params"]
    model.load_state_dict(convert_original(weights))
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    sizes = sorted({key.split(".")[0] for key in golden})
    for size in sizes:
        x = torch.from_numpy(fill.image(*map(int, size.split("x"))))
        with torch.inference_mode():
            final, stages = model.forward_intermediates(x)
            logits = model.forward_head(final)
        assert error(logits, golden[f"{size}.logits"]) <= 1e-5
        for i, stage in enumerate(stages):
            assert error(stage.mean((2, 3)), golden[f"{size}.stage{i}.mean"]) <= 1e-5
