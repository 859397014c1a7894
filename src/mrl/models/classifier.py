"""A backbone and a linear head on [CLS, mean patch], or on the pooled features where there are no patch tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import Tensor, nn

from mrl.errors import ConfigError

MAX_GROUPS = 12


class Classifier(nn.Module):
    """A model with a fresh linear head for these classes.

    The features are, in this order of preference: [CLS token, mean of the patch tokens] of a timm vision transformer
    (the mean alone where it has no CLS token); a timm model's pooled features; what the last linear layer of any other
    module reads (that layer becomes an identity); the output itself where it is (B, F) and no linear layer makes it.

    Args:
        backbone: changed in place: it loses its own head.
        num_classes: of the new head.
        classes: their names, in the order of the logits; None numbers them.

    Shape:
        (B, 3, H, W) -> (B, num_classes)

    Raises:
        ConfigError: names that are not `num_classes`, or a backbone whose features cannot be found.

    Example:
        >>> import timm
        >>> model = Classifier(timm.create_model("test_vit", img_size=32), 2, classes=["good", "bad"])
        >>> model(torch.randn(4, 3, 32, 32)).shape, model.features(torch.randn(4, 3, 32, 32)).shape
        (torch.Size([4, 2]), torch.Size([4, 128]))
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, classes: Sequence[str] | None = None) -> None:
        super().__init__()
        if num_classes < 1 or (classes is not None and len(classes) != num_classes):
            named = "no names" if classes is None else f"{len(classes)} names"
            raise ConfigError(
                f"Classifier(num_classes={num_classes}) with {named}: give 1 or more classes, a name each."
            )
        self.num_classes = num_classes
        self.class_names = tuple(str(name) for name in (range(num_classes) if classes is None else classes))
        recipe = backbone_recipe(backbone)
        self.mrl_recipe = recipe and {
            "kind": "classifier",
            "num_classes": num_classes,
            "classes": None if classes is None else list(self.class_names),
            "backbone": recipe,
        }
        self.backbone = backbone
        self.reads = _prepare_(backbone)
        like = next(backbone.parameters(), torch.empty(0))
        was_training = backbone.training
        backbone.eval()
        with torch.no_grad():
            features = self.features(probe_image(backbone))
        backbone.train(was_training)
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(
                f"Classifier: {type(backbone).__name__} returns {shape}, not features (B, F); give a factory whose "
                "model returns one vector or the logits of each image."
            )
        self.head = nn.Linear(features.shape[1], num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """What the head reads, (B, F)."""
        if self.reads == "output":
            return self.backbone(x)
        maps = self.backbone.forward_features(x)
        if self.reads == "pooled":
            return self.backbone.forward_head(maps, pre_logits=True)
        patches = maps[:, self.backbone.num_prefix_tokens :].mean(1)  # (B, C)
        norm = getattr(self.backbone, "fc_norm", None) or nn.Identity()
        return torch.cat([norm(maps[:, 0]), norm(patches)], dim=1) if self.reads == "cls+mean" else norm(patches)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.head(self.features(x))

    @torch.no_grad()
    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Copies a linear classifier, such as a probe on `features`, into the head.

        Args:
            weight: (K, F).
            bias: (K,).

        Raises:
            ConfigError: of another shape.

        Example:
            >>> import timm
            >>> model = Classifier(timm.create_model("test_mrl"), 2)
            >>> model.set_head(torch.zeros(2, 32), torch.ones(2))
            >>> model(torch.randn(1, 3, 32, 32)).tolist()
            [[1.0, 1.0]]
        """
        expected = tuple(self.head.weight.shape)
        if tuple(weight.shape) != expected or tuple(bias.shape) != expected[:1]:
            raise ConfigError(f"set_head: got {tuple(weight.shape)} and {tuple(bias.shape)}; this head is {expected}.")
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

    def layer_groups(self) -> list[list[tuple[str, nn.Parameter]]]:
        """The parameters from input to head, for layer-wise decay and freezing.

        First the embeddings, then a group a block, last the final norm and the head. A timm model says what its blocks
        are; of any other module the parts count, in their order, joined to at most 12.

        Example:
            >>> import timm
            >>> model = Classifier(timm.create_model("test_vit", img_size=32), 2)
            >>> [group[0][0] for group in model.layer_groups()][:2]
            ['backbone.cls_token', 'backbone.blocks.0.norm1.weight']
        """
        parameters = dict(self.backbone.named_parameters())
        if hasattr(self.backbone, "group_matcher"):
            names = _matched(parameters, self.backbone.group_matcher(coarse=False))
        else:
            names = [*_parts(self.backbone), []]
        groups = [[(f"backbone.{name}", parameters[name]) for name in group] for group in names]
        groups[-1].extend((f"head.{name}", parameter) for name, parameter in self.head.named_parameters())
        return groups


def backbone_recipe(model: nn.Module) -> dict[str, Any] | None:
    """How to build a backbone again: what `build_model` noted, or the arguments timm's factory got; None if unknown.

    Example:
        >>> backbone_recipe(nn.Identity()) is None
        True
    """
    own = getattr(model, "mrl_recipe", None)
    arguments = getattr(model, "_model_args", None)
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if own is not None or name is None or arguments is None:
        return own
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    plain = all(isinstance(value, (int, float, str, bool, list, type(None))) for value in kwargs.values())
    return {"kind": "timm", "name": name, "kwargs": kwargs} if plain else None


def probe_image(model: nn.Module) -> Tensor:
    """Two random images of the size, type and device that a model takes; the global random state stays as it is.

    Example:
        >>> probe_image(nn.Conv2d(3, 1, 1)).shape
        torch.Size([2, 3, 224, 224])
    """
    recipe = getattr(model, "mrl_recipe", None) or {}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or recipe.get("image_size")
    size = size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-2:]
    channels = getattr(model, "in_chans", 3)
    like = next(model.parameters(), torch.empty(0))
    image = torch.rand(2, channels, *size, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return image.to(device=like.device, dtype=like.dtype)


def output_layer(model: nn.Module) -> str | None:
    """The name of the linear layer whose output is the model's output, found by running it; None if there is none.

    Example:
        >>> output_layer(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))
        '2'
    """
    seen: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.append((name, out)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    was_training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(probe_image(model))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return next((name for name, out in reversed(seen) if out is output), None)


def _prepare_(backbone: nn.Module) -> str:
    """Takes the backbone's own head off; returns what the new head reads: cls+mean, mean, pooled or output."""
    if hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head"):
        if getattr(backbone, "num_classes", 0):
            backbone.reset_classifier(0)
        with torch.no_grad():
            was_training = backbone.training
            maps = backbone.eval().forward_features(probe_image(backbone))
            backbone.train(was_training)
        tokens = hasattr(backbone, "num_prefix_tokens") and isinstance(maps, Tensor) and maps.ndim == 3
        if not tokens:
            return "pooled"
        return "cls+mean" if getattr(backbone, "cls_token", None) is not None else "mean"
    name = output_layer(backbone)
    if name:
        parent, _, child = name.rpartition(".")
        backbone.get_submodule(parent).register_module(child, nn.Identity())
    return "output"


def _matched(names: Iterable[str], matcher: Any) -> list[list[str]]:
    """Names by the groups of a timm matcher, last those it does not know (the head).

    What the matcher joins to the block before it (the final norm) counts as unknown too.
    """
    if callable(matcher):
        return [*group_with_matcher(((name, name) for name in names), matcher).values(), []]
    blocks = {
        group: [part for part in spec if part[1] != MATCH_PREV_GROUP] if isinstance(spec, (list, tuple)) else spec
        for group, spec in matcher.items()
    }
    last = "?"  # no parameter's name, so no pattern knows it
    groups = group_with_matcher(((name, name) for name in (*names, last)), blocks)
    return [[name for name in group if name != last] for group in groups.values()]


def _parts(module: nn.Module) -> list[list[str]]:
    """Names of parameters by part: containers are opened, neighbours joined down to `MAX_GROUPS`."""
    units = [names for names in _open(module, "") if names]
    if not units:
        return []
    count = min(MAX_GROUPS, len(units))
    bounds = [round(i * len(units) / count) for i in range(count + 1)]
    return [[name for unit in units[a:b] for name in unit] for a, b in itertools.pairwise(bounds)]


def _open(module: nn.Module, prefix: str) -> Iterator[list[str]]:
    yield [prefix + name for name, _ in module.named_parameters(recurse=False)]
    children = [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]
    for name, child in children:
        if len(children) == 1 or isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _open(child, f"{prefix}{name}.")
        else:
            yield [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]
