"""Multiply-adds: hand counts, published numbers, and that nothing is altered."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from mrl.errors import ConfigError
from mrl.macs import Cost, count, count_call, image_pair, twin


class Attention(nn.Module):
    """Four ways to write the same two matrix products over 9 positions of 3 channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.flatten(2).transpose(1, 2)  # (B, N, 3)
        if self.how == "sdpa":
            return functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
        if self.how == "masked":
            mask = torch.zeros(x.shape[1], device=x.device)
            return functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)
        if self.how == "einsum":
            return torch.einsum("bnm,bmc->bnc", torch.einsum("bnc,bmc->bnm", x, x).softmax(-1), x)
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


class LooksAtValues(nn.Module):
    """Not countable on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(image) if float(image.sum()) >= 0 else image


@pytest.mark.parametrize("how", ["sdpa", "masked", "einsum", "matmul"])
def test_count__attention_is_two_products(how):
    assert count(Attention(how), 3).gmacs * 1e9 == pytest.approx(2 * 9 * 9 * 3)


def test_count__encoder_layer_fast_path():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    tokens, dim = 6, 16
    by_hand = tokens * dim * dim * 4 + 2 * tokens * tokens * dim + 2 * tokens * dim * 32
    assert count_call(layer, torch.randn(1, tokens, dim)) == by_hand
    assert torch.backends.mha.get_fastpath_enabled()


PUBLISHED = [("vit_small_patch16_224", 4.61, 22.05), ("resnet18", 1.82, 11.69), ("mrl_13", 4.642, 20.171496)]


@pytest.mark.parametrize(("name", "gmacs", "params_m"), PUBLISHED)
def test_count__published_networks(name, gmacs, params_m):
    cost = count(timm.create_model(name), 224)
    assert cost.gmacs == pytest.approx(gmacs, rel=0.005)
    assert cost.params_m == pytest.approx(params_m, rel=0.001)


def test_count__same_for_any_batch():
    model = timm.create_model("test_vit", img_size=32)
    assert count(model, 32, batch=4) == count(model, 32)


def test_count__leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    count(model, 8)
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_count__model_that_looks_at_values():
    assert count(LooksAtValues(), 5).gmacs * 1e9 == pytest.approx(3 * 4 * 25)


def test_count__counts_in_half_precision_too():
    model = timm.create_model("test_vit", img_size=32)
    assert count(model, 32).gmacs == count(model.bfloat16(), 32).gmacs


def test_count__largest_tensor_holds_the_attention_matrix():
    assert count(Attention("sdpa"), 16).largest_tensor_mb == pytest.approx(256 * 256 * 4 / 1e6)


def test_count__wrong_size_is_one_sentence():
    with pytest.raises(ConfigError, match="does not take images of 40 x 40"):
        count(timm.create_model("test_vit", img_size=32), 40)
    with pytest.raises(ConfigError, match="image_size"):
        count(nn.Identity(), 0)


def test_twin__mode_and_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    shadow = twin(model)
    assert shadow[0].weight is model[0].weight
    assert shadow[1].running_mean is model[1].running_mean
    assert (shadow.training, model.training) == (False, True)
    assert {p.device.type for p in twin(model, meta=True).parameters()} == {"meta"}


def test_image_pair__both_forms():
    assert image_pair(7) == (7, 7)
    assert image_pair((3, 4)) == (3, 4)
    assert Cost(1.0, 2.0).largest_tensor_mb == 0
