"""Saving and loading: bit-equal in a fresh process, strict, and never a pickle."""

import json
import subprocess
import sys

import pytest
import timm
import torch

import mrl
from mrl.swap import SETTINGS

TINY = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 4}


def make(**more):
    return timm.create_model("vit_small_patch14_reg4_dinov2", img_size=(28, 70), **{**TINY, **more}).eval()


@pytest.mark.parametrize(
    "setting", ["faithful", *(pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS if s != "faithful")]
)
def test_save__loads_bit_equal_in_a_fresh_process(setting, tmp_path):
    model = make()
    mrl.swap_(model, mrl.plan(model, region=2, config=SETTINGS[setting]))
    x = torch.randn(2, 3, 28, 70)
    model.train()(x)
    model.eval()
    mrl.save(model, tmp_path / "net", meta={"classes": ["a", "b"]})
    torch.save({"x": x, "y": model(x)}, tmp_path / "io.pt")
    code = (
        "import sys, torch, mrl; io = torch.load(sys.argv[2], weights_only=True); net = mrl.load(sys.argv[1]);"
        "assert torch.equal(net(io['x']), io['y']); assert net.mrl_meta == {'classes': ['a', 'b']}"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "net"), str(tmp_path / "io.pt")], check=True)
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["model.json", "model.safetensors"]


def test_load__a_model_of_a_version_that_knew_one_local_kernel(tmp_path):
    model, x = make(), torch.randn(2, 3, 28, 70)
    mrl.swap_(model, mrl.plan(model, region=2))
    path = mrl.save(model, tmp_path / "net") / "model.json"
    stored = json.loads(path.read_text())
    assert stored["swap"]["config"].pop("kernel_size") == 3
    path.write_text(json.dumps(stored))
    assert torch.equal(mrl.load(tmp_path / "net")(x), model(x))


def test_save__the_loaded_model_can_be_saved_again_and_is_still_swapped(tmp_path):
    model = make()
    handle = mrl.swap_(model, mrl.plan(model, region=2, layers=[1]))
    again = mrl.load(mrl.save(mrl.load(mrl.save(model, tmp_path / "a")), tmp_path / "b"))
    with pytest.raises(mrl.SwapError, match="already swapped"):
        mrl.plan(again)
    first, second = (json.loads((tmp_path / n / "model.json").read_text()) for n in "ab")
    assert first["swap"] == second["swap"]
    assert [row["name"] for row in first["swap"]["rows"]] == handle.names == ["blocks.1.attn"]
    assert first["untouched_sha256"] == second["untouched_sha256"]


def test_save__keeps_half_precision(tmp_path):
    model = make().bfloat16()
    mrl.swap_(model, mrl.plan(model, region=2))
    again = mrl.load(mrl.save(model, tmp_path / "net"))
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


def test_save__refuses_an_architecture_that_the_recipe_would_not_give(tmp_path):
    model = make()
    model.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(mrl.SwapError, match=r"blocks\.0\.mlp\.act is a ReLU"):
        mrl.save(model, tmp_path / "net")
    with pytest.raises(mrl.SwapError, match="recipe="):
        mrl.save(torch.nn.Linear(2, 2), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_save__does_not_overwrite(tmp_path):
    mrl.save(make(), tmp_path / "net")
    with pytest.raises(mrl.ConfigError, match="--overwrite"):
        mrl.save(make(), tmp_path / "net")
    mrl.save(make(), tmp_path / "net", overwrite=True)


def test_load__damaged_or_foreign_folders_are_one_sentence(tmp_path):
    with pytest.raises(mrl.ConfigError, match=r"mrl\.save wrote"):
        mrl.load(tmp_path / "nothing")
    folder = mrl.save(make(), tmp_path / "net")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(mrl.ConfigError, match="damaged"):
        mrl.load(folder)


def test_load__lists_every_missing_and_left_over_key(tmp_path):
    folder = mrl.save(make(), tmp_path / "net")
    with pytest.raises(mrl.SwapError, match=r"left over: .*blocks\.1\.attn\.qkv\.weight"):
        mrl.load(folder, base=make(depth=1))
    model = make()
    mrl.swap_(model, mrl.plan(model, region=2))
    swapped = mrl.save(model, tmp_path / "swapped")
    with pytest.raises(mrl.SwapError, match=r"blocks\.1\.attn, which this base does not have"):
        mrl.load(swapped, base=make(depth=1))
