"""Checks that users can run on their own parts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mrl.errors import SwapError
from mrl.swap import SwapConfig, plan, swap_
from mrl.swap.modes import evaluating

TOLERANCE = 1e-5


def check_adapter(adapter: Any, model: nn.Module, images: Tensor, *, tolerance: float = TOLERANCE) -> list[str]:
    """Whether a registered adapter keeps the contract on a model: the proof that every built-in family passes.

    Give it a small model with random weights (no norm at its neutral start, no LayerScale of 1e-5), and images that are
    not square, because swapped height and width would pass on a square.

    Args:
        adapter: registered with `mrl.register_adapter`.
        model: a float32 model with at least one module of the family; it is not altered.
        images: a batch of 3 or more images (B, C, H, W).
        tolerance: largest relative difference of the outputs at `region=1`.

    Returns:
        What was found to hold, one sentence each.

    Raises:
        SwapError: the first thing that does not hold, with the numbers.

    Example:
        >>> import timm
        >>> from mrl.swap.adapters import adapters
        >>> net = timm.create_model("test_vit", img_size=(32, 48))
        >>> for line in check_adapter(adapters()["timm_vit"], net, torch.randn(3, 3, 32, 48)):
        ...     print(line)
        finds 6 modules
        region=1 equals the original on batches of 1, 2 and 3
        restores the original bit by bit
        region=2 trains with finite gradients
        region=2 with mean reduction keeps the form of the output
    """
    model = copy.deepcopy(model)
    found = [row.name for row in plan(model).rows if row.adapter == adapter.name and row.action == "swap"]
    if not found:
        raise SwapError(f"check_adapter: {adapter.name} takes no module of {type(model).__name__}.")
    held = [f"finds {len(found)} modules"]
    with evaluating(model), torch.no_grad():
        before = {n: _tensor(model(images[:n])) for n in (1, 2, 3)}
        state = {k: v.clone() for k, v in model.state_dict().items()}
        handle = swap_(model, plan(model, region=1, target=found))
        for n, expected in before.items():
            gap = float((_tensor(model(images[:n])) - expected).abs().max() / expected.abs().max())
            if not gap <= tolerance:
                raise SwapError(
                    f"check_adapter: at region=1 the model differs from the original by {gap:.2g} of its largest output on a "
                    f"batch of {n}; look at the order of q, k and v, the scale, the prefix tokens, and the grid."
                )
        held.append("region=1 equals the original on batches of 1, 2 and 3")
        handle.restore()
        after = model.state_dict()
        if list(state) != list(after) or not all(torch.equal(v, after[k]) for k, v in state.items()):
            raise SwapError("check_adapter: restore() does not give the original state dict back.")
        if not all(torch.equal(_tensor(model(images[:n])), expected) for n, expected in before.items()):
            raise SwapError("check_adapter: restore() gives the weights back, but not the outputs.")
        held.append("restores the original bit by bit")
    handle = swap_(model, plan(model, region=2, target=found))
    _tensor(model.train()(images[:2])).square().mean().backward()
    for name, mixer in handle.mixers().items():
        for part, parameter in mixer.named_parameters():
            if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
                raise SwapError(f"check_adapter: {name}.{part} gets no finite gradient.")
    held.append("region=2 trains with finite gradients")
    handle.restore()
    handle = swap_(model, plan(model, region=2, target=found, config=SwapConfig(reduce="mean", prefix="region")))
    with evaluating(model), torch.no_grad():
        shape = _tensor(model(images[:2])).shape
    if shape != before[2].shape:
        raise SwapError(
            f"check_adapter: with mean reduction the output is {tuple(shape)}, not {tuple(before[2].shape)}."
        )
    return [*held, "region=2 with mean reduction keeps the form of the output"]


def _tensor(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    from torch.utils._pytree import tree_leaves

    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
