"""Recipes that are inferred: models of transformers and torchvision save and load without being told how they were made."""

import json

import pytest
import torch
import torchvision

import mrl
from mrl.models.build import build_from_recipe
from mrl.swap.recipe import recipe_of
from test_families import GLOBAL, hf_swin

HF = {name: build for name, (*_, build) in GLOBAL.items()} | {"swin": lambda: hf_swin().model}
SMALL = {"num_classes": 3, "image_size": 32}


@pytest.mark.parametrize("name", HF)
def test_recipe__of_every_transformers_model(name, tmp_path):
    """The stored file is plain JSON, and what it builds is the same architecture with every tensor in its place."""
    model = HF[name]()
    recipe = json.loads(json.dumps(recipe_of(model)))
    assert recipe["kind"] == "transformers"
    again = build_from_recipe(recipe)
    assert type(again) is type(model)
    again.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["vit", "dinov3", "segformer", "swin", "detr"])
@torch.no_grad()
def test_recipe__a_swapped_transformers_model_loads_bit_equal(name, tmp_path):
    model = HF[name]().eval()
    mrl.swap_(model, mrl.plan(model, region=2))
    loaded = mrl.load(mrl.save(model, tmp_path / "m"))
    images = torch.randn(2, 3, 64, 64)
    if name in ("vit",):
        images = torch.randn(2, 3, 32, 80)
    ours, theirs = (m(pixel_values=images)[0] for m in (model, loaded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "swin_v2_t"])
@torch.no_grad()
def test_recipe__a_swapped_torchvision_model_loads_bit_equal(name, tmp_path):
    more = SMALL if name.startswith("vit") else {"num_classes": 3}
    images = torch.randn(2, 3, 64, 64) if name.startswith("swin") else torch.randn(2, 3, 32, 32)
    model = torchvision.models.get_model(name, weights=None, **more).eval()
    mrl.swap_(model, mrl.plan(model, region=2))
    loaded = mrl.load(mrl.save(model, tmp_path / "m"))
    assert loaded.mrl_recipe["name"] == name
    assert torch.equal(loaded(images), model(images))


@torch.no_grad()
def test_recipe__a_head_that_was_put_on_later_is_seen(tmp_path):
    model = torchvision.models.vit_b_32(weights=None, image_size=32).eval()
    model.heads.head = torch.nn.Linear(768, 5)
    loaded = mrl.load(mrl.save(model, tmp_path / "m"))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


def test_recipe__a_model_that_no_recipe_gives_says_where_it_differs(tmp_path):
    model = torchvision.models.vit_b_32(weights=None, image_size=32)
    model.encoder.ln = torch.nn.Identity()
    with pytest.raises(mrl.SwapError, match=r"as torchvision builds it differs: .*encoder.ln is a Identity"):
        mrl.save(model, tmp_path / "m")
