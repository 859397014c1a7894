"""Which layers to swap, when not all of them are worth it."""

from __future__ import annotations

from collections.abc import Mapping

from mrl.errors import ConfigError
from mrl.swap.plan import Plan


def select(
    plan: Plan,
    errors: Mapping[str, float],
    *,
    max_latency_ratio: float | None = None,
    max_error: float | None = None,
) -> list[str]:
    """The layers to swap: the least error within a latency budget, or the most time saved within an error budget.

    Layers are taken in the order of error per millisecond saved. Errors are added up and layers taken for independent,
    which they are only roughly: calibrate what was selected, and measure it.

    Args:
        plan: made with `example_inputs`, so that it holds the time of one original and one swapped block of each shape.
        errors: held-out error of each layer, such as `report.to_dict()["layers"]` of `mrl.calibrate`.
        max_latency_ratio: time of all planned blocks after / before that is to be reached, below 1.
        max_error: sum of the errors of the swapped layers that is not to be passed.

    Returns:
        Names in the order of the model, for `mrl.plan(target=...)`; layers that save no time are never among them.

    Raises:
        ConfigError: both budgets or none, a plan without times, layers without an error, or a ratio that cannot be reached.

    Reference:
        Choosing blocks by measured gain and loss: Puzzle (arXiv:2411.19146); the greedy order is ours.

    Example:
        >>> from mrl.swap.plan import PlanRow
        >>> from mrl.swap import SwapConfig
        >>> rows = [PlanRow(n, "Attention", "timm_vit", "", 0, "", [], (2, 2), "swap", block_latency_ms_before=2.0,
        ...     block_latency_ms_after=after) for n, after in (("a", 1.0), ("b", 1.0), ("c", 2.5))]
        >>> select(Plan(rows, SwapConfig()), {"a": 0.1, "b": 0.3, "c": 0.0}, max_error=0.2)
        ['a']
    """
    if (max_latency_ratio is None) == (max_error is None):
        raise ConfigError("select: give either max_latency_ratio or max_error.")
    rows = [row for row in plan.rows if row.action == "swap"]
    if any(row.block_latency_ms_before is None for row in rows):
        raise ConfigError("select: the plan has no times; make it with mrl.plan(..., example_inputs=images).")
    absent = [row.name for row in rows if row.name not in errors]
    if absent:
        raise ConfigError(f"select: no error is given for {', '.join(absent)}.")
    gains = {row.name: row.block_latency_ms_before - row.block_latency_ms_after for row in rows}
    before = sum(row.block_latency_ms_before for row in rows)
    useful = sorted((n for n in gains if gains[n] > 0), key=lambda n: errors[n] / gains[n])
    wanted = None if max_latency_ratio is None else before * (1 - max_latency_ratio)
    best = sum(gains[n] for n in useful)
    if wanted is not None and best < wanted:
        raise ConfigError(
            f"select(max_latency_ratio={max_latency_ratio}): all layers that save time together reach "
            f"{1 - best / before:.2f}; use a larger ratio, larger regions or larger images."
        )
    picked: list[str] = []
    for name in useful:
        if wanted is not None and sum(gains[n] for n in picked) >= wanted:
            break
        if max_error is None or sum(errors[n] for n in picked) + errors[name] <= max_error:
            picked.append(name)
    return [row.name for row in rows if row.name in picked]
