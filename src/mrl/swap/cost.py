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

from mrl.macs import count_call
from mrl.swap.adapters import adapters
from mrl.swap.grid import Grid
from mrl.swap.modes import evaluating
from mrl.swap.plan import LATER, Plan, PlanRow


@dataclass
class _Seen:
    """What one pass showed of a module: its input, its block's input, its grid."""

    block: str
    x: Tensor
    block_x: Tensor
    grid: tuple[int, int]


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
        shape = (row.kind, row.adapter, tuple(at.x.shape), row.region, at.grid)
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
    inputs: dict[str, Tensor] = {}
    grids: dict[str, Grid] = {}
    hooks = []
    for name in plan.names:
        for watched in (name, name.rpartition(".")[0]):

            def keep(module: nn.Module, args: tuple, watched: str = watched) -> None:
                inputs[watched] = args[0].detach()

            hooks.append(model.get_submodule(watched).register_forward_pre_hook(keep))
        site = plan.sites[name]
        grids[name] = adapters()[site.adapter].grid(site)
        hooks.append(adapters()[site.adapter].hook_point(site).register_forward_hook(grids[name]))
    try:
        with evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    seen = {}
    for name, grid in grids.items():
        block = name.rpartition(".")[0]
        tokens = inputs[name].shape[1] - plan.sites[name].num_prefix_tokens
        seen[name] = _Seen(block, inputs[name], inputs[block], grid.size(tokens))
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
    seconds_before, seconds_after = _interleaved(original, swapped, at.block_x)
    regions = math.ceil(at.grid[0] / row.region[0]) * math.ceil(at.grid[1] / row.region[1])
    attention = getattr(original, leaf)
    fields = {
        "tokens_before": at.x.shape[1],
        "tokens_after": row.prefix_tokens + regions,
        "params_m_before": sum(p.numel() for p in attention.parameters()) / 1e6,
        "params_m_after": sum(p.numel() for p in mixer.parameters()) / 1e6,
        "gmacs_before": count_call(attention, at.x[:1]) / 1e9,
        "gmacs_after": count_call(mixer, at.x[:1]) / 1e9,
        "predicted_latency_ratio": seconds_after / seconds_before,
    }
    return fields, seconds_before, seconds_after


def _interleaved(a: nn.Module, b: nn.Module, x: Tensor, budget_s: float = 1.5) -> tuple[float, float]:
    """Median seconds of two modules on the same input, in the order A B B A."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for which in (0, 1, 1, 0):
        (a, b)[which](x)
    end = time.monotonic() + budget_s
    while len(times[0]) < 6 or (time.monotonic() < end and len(times[0]) < 200):
        for which in (0, 1, 1, 0):
            start = time.perf_counter()
            (a, b)[which](x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
