"""What a network costs on paper: parameters and multiply-adds, counted without computing anything."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mrl.errors import ConfigError


@dataclass(frozen=True)
class Cost:
    """The cost of one image.

    Args:
        params_m: parameters in millions; a shared one counts once, buffers do not count.
        gmacs: multiply-adds in units of 1e9 for one image: convolutions, linear layers, matrix products, attention.
        largest_tensor_mb: the largest tensor made on the way for one image, in 1e6 bytes, attention written out.
    """

    params_m: float
    gmacs: float
    largest_tensor_mb: float = 0.0


def twin(model: nn.Module, *, meta: bool = False) -> nn.Module:
    """A copy of the model's structure in eval mode that shares its parameters and buffers, so that it costs no memory.

    Changing the copy (mode, hooks, parameters replaced) does not reach the original; writing into a tensor would.

    Args:
        model: stays as it is.
        meta: shapes only: parameters and buffers become meta tensors instead of shared ones.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Dropout()).train()
        >>> shadow = twin(model)
        >>> shadow.training, model.training, shadow[0].weight is model[0].weight
        (False, True, True)
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = _meta_like(tensor) if meta else tensor
    return copy.deepcopy(model, memo).eval()


def _meta_like(tensor: Tensor) -> Tensor:
    shadow = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shadow, requires_grad=False) if isinstance(tensor, nn.Parameter) else shadow


def image_pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """`image_size` as (height, width).

    Raises:
        ConfigError: not one or two whole numbers of at least 1.

    Example:
        >>> image_pair(112), image_pair((96, 128))
        ((112, 112), (96, 128))
    """
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sides):
        raise ConfigError(
            f"image_size={image_size!r}: give one whole number of pixels or (height, width), each 1 or more."
        )
    return sides[0], sides[1]


def count(model: nn.Module, image_size: int | tuple[int, int], batch: int = 1) -> Cost:
    """Parameters and multiply-adds of one forward pass in eval mode; 1 multiply-add = 1 MAC.

    Runs on the meta device, where nothing is computed; a model that cannot (it looks at values) runs once on zeros.
    Attention is counted as its two matrix products, fused or not. Element-wise work (norms, activations, softmax,
    additions) is not counted, as everywhere in the field.

    Args:
        model: takes images (B, C, H, W), C read from its first convolution, else 3; it is not altered.
        image_size: pixels along a side, or (height, width).
        batch: images in the pass; the result is for one image whatever it is.

    Raises:
        ConfigError: the model does not take images of this size.

    Example:
        >>> cost = count(nn.Conv2d(3, 8, 3, padding=1, bias=False), 10)
        >>> round(cost.gmacs * 1e9), round(cost.params_m * 1e6)  # 10 * 10 * 8 * 3 * 9 and 8 * 3 * 9
        (21600, 216)
    """
    height, width = image_pair(image_size)
    image = torch.zeros(1, dtype=_dtype(model), device=_device(model)).expand(batch, _channels(model), height, width)
    try:
        macs, largest = _count(model, (image,))
    except _FAILURES as error:
        raise ConfigError(
            f"{type(model).__name__} does not take images of {height} x {width}: {_one_line(error)}; "
            "choose a size that it takes."
        ) from error
    params = sum(p.numel() for p in model.parameters())
    return Cost(params / 1e6, macs / batch / 1e9, largest / batch / 1e6)


def count_call(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of `module(*inputs)` in eval mode, for the whole batch; the rules are those of `count`.

    Example:
        >>> count_call(nn.Linear(4, 5), torch.ones(2, 4))
        40
    """
    return _count(module, inputs)[0]


_FAILURES = (RuntimeError, NotImplementedError, ValueError, AssertionError, TypeError)


def _count(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, int]:
    """Multiply-adds and the bytes of the largest tensor of one call: on the meta device, else for real."""
    shapes = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), inputs)
    try:
        return _counted(twin(module, meta=True), shapes)
    except _FAILURES:
        return _counted(twin(module), inputs)


def _counted(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, int]:
    largest = _Largest()
    with torch.no_grad(), _plain_attention(), FlopCounterMode(display=False) as counter, largest:
        module(*inputs)
    return counter.get_total_flops() // 2, largest.bytes


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products: fused kernels and the encoder's fast path are single calls that hide their work."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, math.prod(leaf.shape) * leaf.element_size())
        return out


def _channels(model: nn.Module) -> int:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None else 3


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
