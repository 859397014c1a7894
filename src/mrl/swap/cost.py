"""What a planned swap would cost or save: one original and one swapped block of each shape, counted and timed."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mrl.macs import count_call
from mrl.swap.adapters import adapters
from mrl.swap.grid import Grid
from mrl.swap.modes import evaluating
from mrl.swap.plan import LATER, Plan, PlanRow


@dataclass
class _Seen:
    """What one pass showed of a module: its input, its block's input, its grid."""

    block: str
    call: tuple[tuple, dict]
    block_call: tuple[tuple, dict]
    tokens: int
    grid: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the module's input."""
        return tuple(self.call[0][0].shape)


@torch.no_grad()
def predict_cost(model: nn.Module, plan: Plan, images: Tensor) -> None:
    """Fills tokens, parameters, multiply-adds and the latency ratio of the rows to swap, and of all blocks together.

    Args:
        model: the model of the plan; it is not changed.
        plan: the plan, changed in place.
        images: one batch (B, 3, H, W); the batch size is that of the timing.
    """
    seen = _look(model, plan, images)
    costs: dict[tuple, tuple[dict, float, float]] = {}
    before = after = 0.0
    for row in plan.rows:
        if row.action != "swap":
            continue
        at = seen[row.name]
        shape = (row.kind, row.adapter, at.shape, row.region, at.grid)
        if shape not in costs:
            costs[shape] = _cost(model, plan, row, at)
        fields, seconds_before, seconds_after = costs[shape]
        for name, value in fields.items():
            setattr(row, name, value)
        before, after = before + seconds_before, after + seconds_after
    swapped = len(plan.names)
    kept = sum(row.action == "skip" and row.reason != LATER for row in plan.rows) * before / swapped
    plan.predicted_latency_ratio = (after + kept) / (before + kept)


def _look(model: nn.Module, plan: Plan, images: Tensor) -> dict[str, _Seen]:
    """One pass over the images, with hooks that are gone afterwards."""
    calls: dict[str, tuple[tuple, dict]] = {}
    grids: dict[str, Grid] = {}
    hooks = []
    for name in plan.names:
        for watched in (name, name.rpartition(".")[0]):

            def keep(module: nn.Module, args: tuple, kwargs: dict, watched: str = watched) -> None:
                calls[watched] = tree_map_only(Tensor, Tensor.detach, (args, kwargs))

            hooks.append(model.get_submodule(watched).register_forward_pre_hook(keep, with_kwargs=True))
        site = plan.sites[name]
        grids[name] = adapters()[site.adapter].grid(site)
        point = adapters()[site.adapter].hook_point(site)
        if point is not None:
            hooks.append(point.register_forward_hook(grids[name]))
    try:
        with evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    seen = {}
    for name, grid in grids.items():
        block, site = name.rpartition(".")[0], plan.sites[name]
        x = calls[name][0][0]
        tokens = x.shape[1 if getattr(site.module, "batch_first", True) else 0]
        found = grid.size(tokens - site.num_prefix_tokens)
        seen[name] = _Seen(block, calls[name], calls[block], tokens, found)
    return seen


def _cost(model: nn.Module, plan: Plan, row: PlanRow, at: _Seen) -> tuple[dict, float, float]:
    """One original and one swapped block on the real activations: the row's fields, seconds before, seconds after."""
    site, adapter = plan.sites[row.name], adapters()[row.adapter]
    original = copy.deepcopy(model.get_submodule(at.block)).eval()
    swapped = copy.deepcopy(original)
    leaf = row.name.rpartition(".")[2]
    grid = adapter.grid(site)
    grid.fixed = at.grid
    copied = dataclasses.replace(site, module=getattr(swapped, leaf))
    mixer = adapter.build(copied, row.region, plan.config, grid).eval()
    setattr(swapped, leaf, mixer)
    seconds_before, seconds_after = _interleaved(original, swapped, at.block_call)
    regions = math.ceil(at.grid[0] / row.region[0]) * math.ceil(at.grid[1] / row.region[1])
    attention = getattr(original, leaf)
    fields = {
        "tokens_before": at.tokens,
        "tokens_after": row.prefix_tokens + regions,
        "params_m_before": sum(p.numel() for p in attention.parameters()) / 1e6,
        "params_m_after": sum(p.numel() for p in mixer.parameters()) / 1e6,
        "gmacs_before": _gmacs(attention, at),
        "gmacs_after": _gmacs(mixer, at),
        "predicted_latency_ratio": seconds_after / seconds_before,
    }
    return fields, seconds_before, seconds_after


def _gmacs(module: nn.Module, at: _Seen) -> float:
    """Multiply-adds of one image, in 1e9."""
    args, kwargs = at.call
    images = args[0].shape[0 if getattr(module, "batch_first", True) else 1]
    return count_call(_Bound(module, kwargs), *args) / images / 1e9


class _Bound(nn.Module):
    """A module with its keyword arguments, to be called with the others."""

    def __init__(self, module: nn.Module, kwargs: dict) -> None:
        super().__init__()
        self.module, self.kwargs = module, kwargs

    def forward(self, *args: object) -> object:
        device = args[0].device
        return self.module(*args, **tree_map_only(Tensor, lambda t: t.to(device), self.kwargs))


def _interleaved(a: nn.Module, b: nn.Module, call: tuple[tuple, dict], budget_s: float = 1.5) -> tuple[float, float]:
    """Median seconds of two modules on the same input, in the order A B B A."""
    args, kwargs = call
    x = args[0]
    times: dict[int, list[float]] = {0: [], 1: []}
    for which in (0, 1, 1, 0):
        (a, b)[which](*args, **kwargs)
    end = time.monotonic() + budget_s
    while len(times[0]) < 6 or (time.monotonic() < end and len(times[0]) < 200):
        for which in (0, 1, 1, 0):
            start = time.perf_counter()
            (a, b)[which](*args, **kwargs)
            if x.is_cuda:
                torch.cuda.synchronize()
            times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
