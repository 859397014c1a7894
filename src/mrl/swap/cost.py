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
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from mrl.macs import count_call
from mrl.swap.adapters import Site, adapters
from mrl.swap.apply import parent_of, put
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
        return tuple(_tokens(self.call).shape)


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
        site = plan.sites[name]
        put(model, name, adapters()[site.adapter].original(site))
        adapters()[site.adapter].enter(parent_of(model, name))
        for watched in (name, name.rpartition(".")[0]):

            def keep(module: nn.Module, args: tuple, kwargs: dict, watched: str = watched) -> None:
                calls[watched] = tree_map_only(Tensor, Tensor.detach, (args, kwargs))

            hooks.append(model.get_submodule(watched).register_forward_pre_hook(keep, with_kwargs=True))
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
        for name in plan.names:
            adapters()[plan.sites[name].adapter].leave(parent_of(model, name))
            put(model, name, plan.sites[name].module)
    seen = {}
    for name, grid in grids.items():
        block, site = name.rpartition(".")[0], plan.sites[name]
        x = _tokens(calls[name])
        tokens = x.shape[1 if getattr(site.module, "batch_first", True) else 0] if x.ndim == 3 else x[0, ..., 0].numel()
        found = adapters()[site.adapter].call_grid(*calls[name]) or grid.size(tokens - site.num_prefix_tokens)
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
    copied = dataclasses.replace(site, module=getattr(swapped, leaf), owner=_owner(site, swapped))
    mixer = adapter.build(copied, row.region, plan.config, grid).eval()
    setattr(swapped, leaf, mixer)
    adapter.enter(swapped)
    seconds_before, seconds_after = _interleaved(original, swapped, at.block_call)
    regions = math.ceil(at.grid[0] / row.region[0]) * math.ceil(at.grid[1] / row.region[1])
    attention = adapter.original(
        dataclasses.replace(site, module=getattr(original, leaf), owner=_owner(site, original))
    )
    fields = {
        "tokens_before": at.tokens,
        "tokens_after": row.prefix_tokens + regions,
        "params_m_before": sum(p.numel() for p in attention.parameters()) / 1e6,
        "params_m_after": sum(p.numel() for p in mixer.parameters()) / 1e6,
        "gmacs_before": _gmacs(attention, at),
        "gmacs_after": _gmacs(mixer, at),
        "predicted_latency_ratio": seconds_after / seconds_before,
        "block_latency_ms_before": 1e3 * seconds_before,
        "block_latency_ms_after": 1e3 * seconds_after,
    }
    return fields, seconds_before, seconds_after


def _owner(site: Site, block: nn.Module) -> nn.Module:
    """The copied block where the original one is the site's owner (windows), else the owner itself."""
    return block if type(site.owner) is type(block) and hasattr(block, site.name.rpartition(".")[2]) else site.owner


def _tokens(call: tuple[tuple, dict]) -> Tensor:
    """The first tensor of a call: the module's input."""
    return next(leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor))


def _gmacs(module: nn.Module, at: _Seen) -> float:
    """Multiply-adds of one image, in 1e9."""
    images = _tokens(at.call).shape[0 if getattr(module, "batch_first", True) else 1]
    bound = _Bound(module, at.call)
    return count_call(bound, *bound.tensors) / images / 1e9


class _Bound(nn.Module):
    """A call of a module, to be repeated with other tensors in the places of its own."""

    def __init__(self, module: nn.Module, call: tuple[tuple, dict]) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = tree_flatten(call)
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> object:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.module(*args, **kwargs)


def _interleaved(a: nn.Module, b: nn.Module, call: tuple[tuple, dict], budget_s: float = 1.5) -> tuple[float, float]:
    """Median seconds of two modules on the same input, in the order A B B A."""
    args, kwargs = call
    x = _tokens(call)
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
