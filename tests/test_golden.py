"""Equality with the numbers of the authors' implementation."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from mrl.blocks import CommonQKVAttention, RegionalLocalMixer
from mrl.models import convert_original

GOLDEN = Path(__file__).parent / "golden"


def read(case):
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def cases():
    return [p.stem for p in sorted(GOLDEN.glob("*.safetensors")) if not p.stem.startswith("net_")]


def error(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()


def build(meta):
    dim, heads, region, group = (int(meta[k]) for k in ("dim", "num_heads", "region_size", "channels_per_group"))
    if meta["kind"] == "common_qkv":
        return CommonQKVAttention(dim, heads, kv_stride=int(meta["stride_kv"]))
    qkv = {"mrl": "separate", "mrl_common_qkv": "common"}[meta["kind"]]
    return RegionalLocalMixer(dim, heads, region, group, scale=dim**-0.5, qkv=qkv)


def golden_mixer(case, path="plain"):
    """`path`: "plain", or "composed" to force what training takes on large maps."""
    meta, tensors = read(case)
    mixer = build(meta).double()
    params = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    mixer.load_state_dict(convert_original(params))
    mixer._composes = lambda x: path == "composed"
    shape = (int(meta["B"]), int(meta["H"]), int(meta["W"]), mixer.dim)
    x = tensors["x"].double().view(shape).requires_grad_()
    return mixer, x, tensors["grad_out"].double().view(shape), tensors


PATHS = [(case, "plain") for case in cases()] + [(c, "composed") for c in cases() if read(c)[0]["kind"] == "mrl"]


def named(tensors, start):
    """Golden tensors under `start`, with our names."""
    return convert_original({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})


@pytest.mark.parametrize(("case", "path"), PATHS)
def test_mixer__eval_equals_golden(case, path):
    mixer, x, grad_out, tensors = golden_mixer(case, path)
    y = mixer.eval()(x)
    (y * grad_out).sum().backward()
    assert error(y, tensors["eval.y"].view_as(y)) <= 1e-9
    assert error(x.grad, tensors["eval.grad_x"].view_as(x)) <= 1e-9
    expected = named(tensors, "eval.grad.")
    ours = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    assert sorted(ours) == sorted(expected)
    errors = {name: error(ours[name], expected[name].view_as(ours[name])) for name in ours}
    # Zero in exact arithmetic: the golden values themselves are rounding noise of up to 2.3e-15, relative to 1e-6 here.
    noise = [errors.pop(name) for name in list(errors) if name.endswith(("k_proj.bias", "k_norm.bias"))]
    assert noise
    assert max(noise) <= 1e-8
    assert max(errors.values()) <= 1e-9, errors


@pytest.mark.parametrize(("case", "path"), PATHS)
def test_mixer__train_equals_golden(case, path):
    mixer, x, grad_out, tensors = golden_mixer(case, path)
    y = mixer.train()(x)
    (y * grad_out).sum().backward()
    assert error(y, tensors["train.y"].view_as(y)) <= 1e-9
    assert error(x.grad, tensors["train.grad_x"].view_as(x)) <= 1e-9
    after = mixer.state_dict()
    expected = named(tensors, "train.after.")
    assert len(expected) == 6 + 2 * ("basis.proj.weight" in after)
    for name, value in expected.items():
        assert error(after[name], value) <= 1e-9, name


@pytest.mark.parametrize("case", cases())
def test_mixer__folded_equals_golden(case):
    mixer, x, _, tensors = golden_mixer(case)
    with torch.inference_mode():
        assert error(mixer.fold_()(x), tensors["eval.y"].view_as(x)) <= 1e-9


def golden_fill():
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NETS = {"net_mrl_common_qkv_13": "mrl_13_common_qkv", "net_mrl_13": "mrl_13", "net_mrl_tiny": "mrl_tiny"}


@pytest.mark.parametrize(("case", "name"), NETS.items())
def test_net__equals_golden(case, name):
    path = GOLDEN / f"{case}.json"
    about, fill = json.loads(path.read_text()), golden_fill()
    weights = {key: torch.from_numpy(fill.fill(key, tuple(shape))) for key, shape in about["state_dict"].items()}
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == about["params"]
    model.load_state_dict(convert_original(weights))
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for limit, form in ((5e-6, "plain"), (1e-5, "folded")):
        if form == "folded":
            model.fold_()
        for size in sorted({key.split(".")[0] for key in golden}):
            x = torch.from_numpy(fill.image(*map(int, size.split("x"))))
            with torch.inference_mode():
                final, stages = model.forward_intermediates(x)
                logits = model.forward_head(final)
            assert error(logits, golden[f"{size}.logits"]) <= limit
            for i, stage in enumerate(stages):
                assert error(stage.mean((2, 3)), golden[f"{size}.stage{i}.mean"]) <= limit


def test_golden__every_file_is_tested():
    assert {p.stem for p in GOLDEN.glob("net_*.json")} == set(NETS)
    assert {read(case)[0]["kind"] for case in cases()} == {"mrl", "mrl_common_qkv", "common_qkv"}
