"""How to build a model's architecture again, as plain data, checked against the model itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mrl.errors import SwapError
from mrl.models.build import build_from_recipe

_PLAIN = (int, float, str, bool, type(None))
_IGNORED = {"training", "seen", "dynamic_feat_size", "num_classes"}  # the last is told by the head's own shape


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """The recipe that a model carries (`mrl_recipe`), or one inferred and proved to give the same architecture.

    Inferred for models that timm, torchvision's builders or transformers made.

    Args:
        model: with its original modules (`store` sets swapped ones aside first).

    Raises:
        SwapError: there is none, and none can be inferred.

    Example:
        >>> import timm
        >>> recipe_of(timm.create_model("test_vit", img_size=32, num_classes=3))["kwargs"]["num_classes"]
        3
    """
    own = getattr(model, "mrl_recipe", None)
    if own is not None:
        return copy.deepcopy(own)
    furthest, why = -1, ""
    for recipe in _candidates(model):
        difference = _difference(model, recipe)
        if difference is None:
            return recipe
        if difference[0] > furthest:
            furthest, why = difference[0], f" ({recipe['name']} as {recipe['kind']} builds it differs: {difference[1]})"
    raise SwapError(
        f"mrl.save: how to build this {type(model).__name__} again is not known{why}; pass "
        "recipe={'kind': 'factory', 'name': 'package.module:function', 'kwargs': {...}}, or build it with mrl.models.build_model."
    )


def _candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Recipes that may give this model, by the library that its class is from."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    library = type(model).__module__.partition(".")[0]
    if name:
        yield from ({"kind": "timm", "name": name, "kwargs": kwargs} for kwargs in _guesses(model))
    elif library == "torchvision":
        yield from _torchvision_recipes(model)
    elif library == "transformers":
        # What is built again gets its weights from the file, so nothing is to be looked up or downloaded.
        config = {**model.config.to_dict(), "use_pretrained_backbone": False}
        if not getattr(model.config, "use_pretrained_backbone", False):
            del config["use_pretrained_backbone"]
        yield {"kind": "transformers", "name": type(model).__name__, "config": config}


def _torchvision_recipes(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The builders of the model's own module, with the classes of its last layer and the image size it shows."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)]
    kwargs: dict[str, Any] = {"num_classes": last[-1].out_features} if last else {}
    if isinstance(getattr(model, "image_size", None), int):
        kwargs["image_size"] = model.image_size
    for name in torchvision.models.list_models():
        if torchvision.models.get_model_builder(name).__module__ == type(model).__module__:
            yield {"kind": "torchvision", "name": name, "kwargs": dict(kwargs)}


def _guesses(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try with timm's factory, plainest first."""
    plain: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        plain["num_classes"] = model.num_classes
    if getattr(model, "in_chans", 3) != 3:
        plain["in_chans"] = model.in_chans
    if getattr(model, "global_pool", None) and isinstance(model.global_pool, str):
        plain["global_pool"] = model.global_pool
    yield dict(plain)
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None):
        plain["img_size"] = list(embed.img_size)
        yield dict(plain)
    if isinstance(model, VisionTransformer):
        yield {**plain, **_vit_kwargs(model)}


def _vit_kwargs(model: VisionTransformer) -> dict[str, Any]:
    """What a VisionTransformer shows of its constructor's arguments."""
    block, embed = model.blocks[0], model.patch_embed
    kwargs: dict[str, Any] = {
        "patch_size": list(embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim if hasattr(block.mlp, "fc1") else 4.0,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "class_token": model.cls_token is not None,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": bool(getattr(embed, "dynamic_img_pad", False)),
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "attn_drop_rate": block.attn.attn_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "drop_rate": model.head_drop.p,
        "drop_path_rate": float(getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0) or 0.0),
        "init_values": 1e-5 if hasattr(block.ls1, "gamma") else None,
    }
    return kwargs


def _difference(model: nn.Module, recipe: dict[str, Any]) -> tuple[int, str] | None:
    """How many modules agree before the first in which the recipe's architecture differs, and in what; or None."""
    try:
        with torch.device("meta"):
            other = build_from_recipe(recipe)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        return 0, f"{type(error).__name__}: {error}"
    ours, theirs = dict(model.named_modules()), dict(other.named_modules())
    for place, name in enumerate([*ours, *theirs]):
        if name not in ours or name not in theirs:
            return place, f"module {name!r} is only in one of them"
        if type(ours[name]) is not type(theirs[name]):
            return place, f"{name or 'the model'} is a {type(ours[name]).__name__}, not a {type(theirs[name]).__name__}"
        a, b = _traits(ours[name]), _traits(theirs[name])
        unequal = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
        if unequal:
            key = unequal[0]
            return place, f"{name or 'the model'}.{key} is {a.get(key)!r}, not {b.get(key)!r}"
    return None


def _traits(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes and the shapes of its own tensors."""
    own = vars(module).items()
    traits = {k: _listed(v) for k, v in own if k not in _IGNORED and not k.startswith("_") and _is_plain(v)}
    traits |= {
        f"tensor {k}": tuple(v.shape)
        for k, v in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    traits.pop("grad_checkpointing", None)
    return traits


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _listed(value: Any) -> Any:
    """The value with lists for tuples, which JSON does not tell apart."""
    return [_listed(v) for v in value] if isinstance(value, (tuple, list)) else value
