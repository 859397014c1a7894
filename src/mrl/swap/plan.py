"""What a swap would do, before anything is done."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from mrl.errors import SwapError
from mrl.swap.adapters import Site, adapters
from mrl.swap.config import Region, SwapConfig, region_of
from mrl.swap.match import Target, closest, selected
from mrl.swap.refused import refused

WORTH = 0.95  # a predicted time above this share of the original's is not worth a swap
LATER = "no adapter for this class in this version"


@dataclass
class PlanRow:
    """One attention module: what it is, what would become of it, and at what cost.

    Args:
        name: dotted name of the module.
        kind: its class.
        adapter: the family that takes it over; empty when skipped for want of one.
        input: layout of its input.
        prefix_tokens: CLS, registers.
        grid_from: where (H, W) is read.
        extras: what is handled besides plain attention.
        region: (rows, columns) of a region in positions.
        action: "swap" or "skip".
        reason: why it is skipped.
        tokens_before: tokens that attend to each other now (with `example_inputs`).
        tokens_after: the same after the swap.
        params_m_before: parameters now, in millions.
        params_m_after: the same after the swap.
        gmacs_before: multiply-adds for one image, in 1e9.
        gmacs_after: the same after the swap.
        predicted_latency_ratio: time of the block around it after / before; below 1 is faster.
        block_latency_ms_before: median time of that block now, on the whole batch of `example_inputs`.
        block_latency_ms_after: the same after the swap.
    """

    name: str
    kind: str
    adapter: str
    input: str
    prefix_tokens: int
    grid_from: str
    extras: list[str]
    region: tuple[int, int]
    action: str
    reason: str = ""
    tokens_before: int | None = None
    tokens_after: int | None = None
    params_m_before: float | None = None
    params_m_after: float | None = None
    gmacs_before: float | None = None
    gmacs_after: float | None = None
    predicted_latency_ratio: float | None = None
    block_latency_ms_before: float | None = None
    block_latency_ms_after: float | None = None


@dataclass
class Plan:
    """The rows of a swap and the configuration that they share; printing it shows the table.

    Args:
        rows: one a module, in the order of the model.
        config: how they are exchanged.
        predicted_latency_ratio: of all blocks together, after / before, from one timed block of each shape.
    """

    rows: list[PlanRow]
    config: SwapConfig
    predicted_latency_ratio: float | None = None
    sites: dict[str, Site] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """The modules that would be exchanged."""
        return [row.name for row in self.rows if row.action == "swap"]

    @property
    def advice(self) -> str:
        """What the predicted time means; empty where nothing was timed or the swap pays off."""
        if self.predicted_latency_ratio is None or self.predicted_latency_ratio < WORTH:
            return ""
        tokens = max(row.tokens_before or 0 for row in self.rows)
        return (
            f"It cannot pay off in time at this image size: with {tokens} tokens attention is a small share of a block's "
            "time. Larger images, larger regions or --swap cheap may."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in a run's `plan.json`."""
        rows = [{("class" if k == "kind" else k): v for k, v in asdict(row).items()} for row in self.rows]
        return {
            "schema": 1,
            "rows": rows,
            "config": self.config.to_dict(),
            "predicted_latency_ratio": self.predicted_latency_ratio,
        }

    def __str__(self) -> str:
        lines = [
            f"{'module':32} {'action':6} {'region':7} {'tokens':12} {'M params':15} {'GMACs':17} {'time':6} reason"
        ]
        for r in self.rows:
            tokens = "" if r.tokens_before is None else f"{r.tokens_before} > {r.tokens_after}"
            params = "" if r.params_m_before is None else f"{r.params_m_before:.3f} > {r.params_m_after:.3f}"
            gmacs = "" if r.gmacs_before is None else f"{r.gmacs_before:.4f} > {r.gmacs_after:.4f}"
            ratio = "" if r.predicted_latency_ratio is None else f"x{r.predicted_latency_ratio:.2f}"
            region = f"{r.region[0]}x{r.region[1]}"
            lines.append(
                f"{r.name:32} {r.action:6} {region:7} {tokens:12} {params:15} {gmacs:17} {ratio:6} {r.reason}".rstrip()
            )
        if self.predicted_latency_ratio is not None:
            lines.append(f"predicted time of all blocks after / before: x{self.predicted_latency_ratio:.2f}")
            lines += [self.advice] if self.advice else []
        return "\n".join(lines)


def plan(
    model: nn.Module,
    region: Region = 2,
    target: Target = "auto",
    exclude: Target | None = None,
    layers: Sequence[int] | None = None,
    example_inputs: Tensor | None = None,
    config: SwapConfig | None = None,
) -> Plan:
    """Which attention modules of a model would be exchanged for MRL, how, and at what predicted cost. Changes nothing.

    Args:
        model: a trained model (uncompiled, unwrapped).
        region: positions a region spans: a number, (rows, columns), or {pattern: either}.
        target: "auto" (all that an adapter takes), a regular expression (full match), dotted suffixes, or `fn(name, module)`.
        exclude: the same, for what to leave alone.
        layers: indices into the matched modules, negative ones from the end; None is all of them.
        example_inputs: one image batch; with it the plan counts multiply-adds and times one original and one swapped
            block of each shape.
        config: how to exchange; the default is "faithful".

    Raises:
        SwapError: nothing matched, an index out of range, a compiled, wrapped or already swapped model, or a targeted
            module that cannot be swapped while `on_unsupported="error"`.

    Reference:
        Supported families and starting points are described in `docs/swap.md`.

    Example:
        >>> import timm
        >>> net = timm.create_model("test_vit", img_size=32)
        >>> plan(net, region=2, layers=[-1]).names
        ['blocks.5.attn']
    """
    config = config or SwapConfig()
    refuse_wrapped(model)
    sites = find_sites(model)
    chosen = _choose(sites, target, exclude, layers, config, model)
    rows = [
        plan_row(site, region_of(region, name) if name in chosen else (1, 1), name in chosen, config)
        for name, site in sites.items()
    ]
    result = Plan(rows, config, None, {name: sites[name] for name in chosen})
    if example_inputs is not None:
        from mrl.swap.cost import predict_cost

        predict_cost(model, result, example_inputs)
    return result


def refuse_wrapped(model: nn.Module) -> None:
    """Raises SwapError for a compiled, wrapped or already swapped model."""
    if hasattr(model, "_orig_mod"):
        raise SwapError("this model is compiled: swap before torch.compile (pass model._orig_mod), then compile.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or type(model).__name__.startswith(
        "FullySharded"
    ):
        raise SwapError(
            "this model is wrapped for several devices: swap the inner module first, then wrap it and make the optimizer."
        )
    if any(hasattr(module, "mrl_row") for module in model.modules()):
        raise SwapError("this model is already swapped: call handle.restore() first, or load the original.")


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every module that an adapter knows or that looks like attention."""
    found: dict[str, Site] = {}
    for name, module in model.named_modules():
        if any(name.startswith(parent + ".") for parent, site in found.items() if not site.reason):
            continue
        for adapter in adapters().values():
            site = adapter.site(model, name, module)
            if site is not None:
                site.adapter = adapter.name
                found[name] = site
                break
        else:
            kind = type(module).__name__
            reason = refused(kind)
            if name and (reason or ("Attention" in kind and any(True for _ in module.parameters()))):
                found[name] = Site(name, module, reason=reason or LATER)
    inner = [name for name, site in found.items() if site.adapter]
    return {n: s for n, s in found.items() if s.adapter or not any(name.startswith(n + ".") for name in inner)}


def _choose(
    sites: dict[str, Site],
    target: Target,
    exclude: Target | None,
    layers: Sequence[int] | None,
    config: SwapConfig,
    model: nn.Module,
) -> list[str]:
    auto = isinstance(target, str) and target == "auto"
    matched = [n for n, s in sites.items() if auto or selected(target, n, s.module)]
    if exclude is not None:
        left_out = [n for n in matched if selected(exclude, n, sites[n].module)]
        if not left_out:
            warnings.warn(f"exclude={exclude!r} excluded nothing", stacklevel=3)
        matched = [n for n in matched if n not in left_out]
    refused = [n for n in matched if sites[n].reason]
    chosen = [n for n in matched if not sites[n].reason]
    if refused and (not auto or not chosen) and config.on_unsupported == "error":
        raise SwapError(
            f"cannot swap {refused[0]} ({type(sites[refused[0]].module).__name__}): {sites[refused[0]].reason}."
        )
    if not chosen:
        raise SwapError(_nothing(sites, target, model))
    if layers is not None:
        bad = [i for i in layers if not -len(chosen) <= i < len(chosen)]
        if bad or not layers:
            raise SwapError(
                f"layers={list(layers)}: {len(chosen)} modules matched; use indices from {-len(chosen)} to {len(chosen) - 1}."
            )
        picked = {i % len(chosen) for i in layers}
        chosen = [n for i, n in enumerate(chosen) if i in picked]
    return chosen


def _nothing(sites: dict[str, Site], target: Target, model: nn.Module) -> str:
    if sites:
        wanted = target if isinstance(target, str) else " ".join(map(str, target)) if not callable(target) else ""
        near = closest(wanted, sites) or list(sites)[:5]
        return f"target={target!r} matched no attention module that can be swapped; the closest are {', '.join(near)}."
    kinds = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
    return (
        f"{type(model).__name__} has no attention module that an adapter knows; its layers are {', '.join(kinds[:8])}."
    )


def plan_row(site: Site, region: tuple[int, int], swap: bool, config: SwapConfig) -> PlanRow:
    """The plan's row of one module."""
    reason = "" if swap else (site.reason or "not selected")
    extras = [e for e in site.extras if e != "masks pooled" or config.bias == "pool"]
    layout = adapters()[site.adapter].layout if site.adapter else ""
    return PlanRow(
        name=site.name,
        kind=type(site.module).__name__,
        adapter=site.adapter,
        input=layout,
        prefix_tokens=site.num_prefix_tokens,
        grid_from=site.grid_from,
        extras=extras,
        region=region,
        action="swap" if swap else "skip",
        reason=reason,
    )
