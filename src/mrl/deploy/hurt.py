"""Which layers a lower precision hurts: each in it alone, the others in float32, on real images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mrl import run
from mrl.deploy.onnx import plain_float
from mrl.errors import ConfigError

BATCH, MOST_IMAGES = 8, 64
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Hurt:
    """What one layer, or the layers of one block, does to the answers when only it has the lower precision.

    Args:
        layer: name of the module in the model; a common prefix where single layers would take too long.
        change: share of the probability that moves to other classes, mean over the images, 0 to 1; 1 where the answer
            is not finite.
    """

    layer: str
    change: float

    def __str__(self) -> str:
        return f"{self.layer} {percent(self.change)}"


def percent(share: float) -> str:
    """A share in percent, with as many digits as say something.

    Example:
        >>> percent(1.0), percent(0.0213), percent(0.000084)
        ('100 %', '2.1 %', '0.0084 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


@torch.no_grad()
def layers_that_hurt(
    model: nn.Module,
    images: Tensor,
    precision: str,
    *,
    calibration: Tensor | None = None,
    skip: Collection[str] = (),
    seconds: float = 60.0,
) -> list[Hurt]:
    """Rounds the weights and inputs of one layer after the other, and ranks the layers by how much the answers change.

    change = mean over images of 1/2 sum_k |p_k(rounded) - p_k(float32)|. It is a model of the precision, in torch, not a
    reading of the file: int8 is 8 bits, of which the weights use half the range (`mrl.deploy.quantise`), symmetric per output channel, with the range of the calibration images for
    inputs; fp16 and bf16 round both. So it says where a precision hurts, whatever runtime computes it.

    Args:
        model: gives logits; it is not altered.
        images: real images (N, 3, H, W), preprocessed; up to 64 of them, spread evenly, are used.
        precision: "int8", "fp16" or "bf16".
        calibration: images that set the ranges of int8; None takes `images`.
        skip: layers that stay in float32, such as those the accuracy control gave back.
        seconds: about how long it may take: fewer images, down to 8, then whole blocks instead of layers.

    Returns:
        Every layer, or block, that has weights, worst first.

    Raises:
        ConfigError: float32, which rounds nothing.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 4), nn.Flatten(), nn.Linear(4, 2))
        >>> [hurt.layer for hurt in sorted(layers_that_hurt(net, torch.randn(8, 3, 4, 4), "int8"), key=lambda h: h.layer)]
        ['0', '2']
    """
    if precision not in ("int8", "fp16", "bf16"):
        raise ConfigError(f"layers_that_hurt(precision={precision!r}): use int8, fp16 or bf16.")
    net = copy.deepcopy(plain_float(model)).eval()
    layers = {name: module for name, module in net.named_modules() if name not in skip and _weights(module)}
    start = time.monotonic()
    ranges = _ranges(net, layers, images[:BATCH] if calibration is None else calibration) if precision == "int8" else {}
    _answers(net, images[:BATCH])
    each = max((time.monotonic() - start) / (2 if ranges else 1), 1e-4)  # of a batch of 8
    groups = _groups(list(layers), int(seconds / each))
    shown = _spread(images, max(BATCH, int(seconds / each / max(len(groups), 1)) * BATCH))
    expected, found = _answers(net, shown), []
    with run.progress(f"{precision}, layer by layer", len(groups)) as advance:
        for group, names in groups.items():
            with _Rounded({name: layers[name] for name in names}, precision, ranges):
                changed = (_answers(net, shown) - expected).abs().sum(1) / 2
            found.append(Hurt(group, float(torch.nan_to_num(changed, nan=1.0).mean())))
            advance()
    return sorted(found, key=lambda hurt: -hurt.change)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The matrices and kernels a module owns: not positions and tokens, which networks keep at their root."""
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    leaf = not any(True for _ in module.children())
    return {n: t for n, t in own.items() if t.is_floating_point() and t.ndim >= 2 and (leaf or "weight" in n)}


def _spread(images: Tensor, most: int) -> Tensor:
    n = min(len(images), most, MOST_IMAGES)
    return images[[i * len(images) // n for i in range(n)]]


def _answers(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([torch.softmax(net(part).double(), -1) for part in images.split(BATCH)])


def _groups(names: Sequence[str], most: int) -> dict[str, list[str]]:
    """Names as they are, or by as many of their first parts as give at most `most` groups; at least by their first part."""
    deepest = max((name.count(".") + 1 for name in names), default=1)
    for depth in range(deepest, 0, -1):
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(groups) <= most:
            break
    return groups if names else {}


def _ranges(net: nn.Module, layers: dict[str, nn.Module], images: Tensor) -> dict[str, tuple[float, float]]:
    """The smallest and largest input of every layer."""
    seen: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple) -> None:
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
                low, high = seen.get(name, (0.0, 0.0))
                seen[name] = min(low, float(inputs[0].min())), max(high, float(inputs[0].max()))

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        _answers(net, _spread(images, MOST_IMAGES))
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Rounded:
    """Inside, these layers have weights and inputs of the precision; afterwards they are as they were, bit by bit."""

    def __init__(self, layers: dict[str, nn.Module], precision: str, ranges: dict[str, tuple[float, float]]) -> None:
        self.layers, self.precision, self.ranges = layers, precision, ranges

    def __enter__(self) -> None:
        self.kept = [(t, t.detach().clone()) for module in self.layers.values() for t in _weights(module).values()]
        for tensor, whole in self.kept:
            tensor.data.copy_(self._weight(whole))
        self.handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in self.layers.items()
            if self.precision != "int8" or name in self.ranges
        ]

    def __exit__(self, *error: object) -> None:
        for tensor, whole in self.kept:
            tensor.data.copy_(whole)
        for handle in self.handles:
            handle.remove()

    def _weight(self, whole: Tensor) -> Tensor:
        if self.precision != "int8":
            return _half(whole, self.precision)
        scale = whole.flatten(1).abs().amax(1).clamp(min=1e-30).view(-1, *[1] * (whole.ndim - 1)) / 63
        return (whole / scale).round() * scale

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple) -> tuple:
            if not (inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point()):
                return inputs
            if self.precision != "int8":
                return (_half(inputs[0], self.precision), *inputs[1:])
            low, high = self.ranges[name]
            scale = max(high - low, 1e-30) / 255
            zero = round(-low / scale)
            levels = (inputs[0] / scale + zero).round().clamp(0, 255)
            return ((levels - zero) * scale, *inputs[1:])

        return hook


def _half(tensor: Tensor, precision: str) -> Tensor:
    return tensor.to({"fp16": torch.float16, "bf16": torch.bfloat16}[precision]).float()
