"""The surgery itself: all modules or none, and a handle that can undo it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mrl.errors import SwapError
from mrl.swap.adapters import Site, adapters
from mrl.swap.config import SwapConfig
from mrl.swap.grid import Grid
from mrl.swap.modes import evaluating
from mrl.swap.plan import Plan, PlanRow, refuse_wrapped


@dataclass
class _Kept:
    """What `restore` and `disabled` need of one original."""

    original: nn.Module
    teacher: nn.Module


class Handle:
    """A swapped model's way back: what was exchanged, a view of the teacher, and a bit-exact undo.

    Args:
        model: the swapped model.
        plan: what was done.
        grids: one a network inside the model.
        kept: originals by name, or empty with `keep_original=False`.
        hooks: of the grids, by network.

    Example:
        >>> import timm
        >>> net = timm.create_model("test_vit", img_size=32)
        >>> handle = swap_(net, __import__("mrl").plan(net, region=2))
        >>> len(handle.names)
        6
        >>> handle.restore()
        >>> handle.names
        []
    """

    def __init__(
        self, model: nn.Module, plan: Plan, grids: list[Grid], kept: dict[str, _Kept], hooks: list[Any]
    ) -> None:
        self.model, self.plan = model, plan
        self._grids, self._kept, self._hooks = grids, kept, hooks
        self._names = list(plan.names)
        self._mixing: dict[str, Any] = {}
        self._values: dict[str, Tensor] = {}  # what calibration changes beside the mixers, as it was at the swap

    @property
    def names(self) -> list[str]:
        """Dotted names of the modules that are exchanged now, in the model's order."""
        return list(self._names)

    def report(self) -> dict[str, Any]:
        """The plan's rows as they were done, and what is exchanged now, as plain data."""
        return {**self.plan.to_dict(), "swapped": self.names, "originals_kept": bool(self._kept)}

    def mixers(self) -> dict[str, nn.Module]:
        """The exchanged modules by name."""
        return {name: self.model.get_submodule(name) for name in self._names}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The model with its original attention, as it was at the swap, for the length of the block."""
        self._need_originals("disabled")
        students = self.mixers()
        self._exchange_values()
        try:
            for name, student in students.items():
                teacher = self._kept[name].teacher
                teacher.train(student.training)
                put(self.model, name, teacher)
            yield self.model
        finally:
            self._exchange_values()
            for name, student in students.items():
                put(self.model, name, student)

    def mix(self, alpha: float) -> None:
        """Lets every exchanged module answer (1 - alpha) * original + alpha * mixer, for a gradual hand-over in training.

        Both are computed, so it costs more than either. The originals do not learn; gradients pass through them. What
        `mrl.save` writes is the mixers alone, whatever alpha is.

        Args:
            alpha: 0 is the original, 1 the mixer (as after the swap).

        Raises:
            SwapError: an alpha outside 0 to 1, or the originals were discarded.

        Example:
            >>> import timm, torch
            >>> net, x = timm.create_model("test_vit", img_size=32).eval(), torch.randn(1, 3, 32, 32)
            >>> before = net(x)
            >>> handle = swap_(net, __import__("mrl").plan(net, region=2))
            >>> handle.mix(0.0)
            >>> torch.equal(net(x), before)
            True
        """
        if not 0 <= alpha <= 1:
            raise SwapError(f"handle.mix({alpha}): use 0 (the original) to 1 (the mixer).")
        if alpha < 1:
            self._need_originals("mix")
        for hook in self._mixing.values():
            hook.remove()
        self._mixing = {}
        for name, student in self.mixers().items() if alpha < 1 else ():
            teacher = self._kept[name].teacher
            hook = student.register_forward_hook(_blend(teacher, float(alpha)), with_kwargs=True)
            self._mixing[name] = hook

    def block_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the blocks around the mixers that are not the mixers' own, by name."""
        own = tuple(f"{name}." for name in self.names)
        around = tuple(f"{name.rpartition('.')[0]}." for name in self.names if "." in name)
        found = self.model.named_parameters()
        return {name: p for name, p in found if name.startswith(around) and not name.startswith(own)}

    def keep_blocks(self) -> None:
        """Remembers the blocks' other parameters, so that training them can be undone like the swap itself."""
        self._need_originals("keep_blocks")
        for name, parameter in self.block_parameters().items():
            self._values.setdefault(name, parameter.detach().clone())

    def _exchange_values(self) -> None:
        """Swaps the blocks' remembered parameters with what they are now."""
        for name, value in self._values.items():
            parameter = self.model.get_parameter(name)
            parameter.data, self._values[name] = value, parameter.data

    def restore(self, names: Sequence[str] | None = None) -> None:
        """Puts the original modules back, with the very values they had at the swap.

        Args:
            names: which; None is all of them.

        Raises:
            SwapError: the originals were discarded, or a name is not exchanged.
        """
        self._need_originals("restore")
        names = self.names if names is None else list(names)
        unknown = [n for n in names if n not in self._names]
        if unknown:
            raise SwapError(f"restore({unknown}): not exchanged; exchanged are {', '.join(self._names) or 'none'}.")
        for name in names:
            kept = self._kept.pop(name)
            if name in self._mixing:
                self._mixing.pop(name).remove()
            student = self.model.get_submodule(name)
            with torch.no_grad():
                _copy_state(getattr(kept.teacher, "inner", kept.teacher), kept.original)
            kept.original.train(student.training)
            put(self.model, name, kept.original)
            around = name.rpartition(".")[0] + "."
            with torch.no_grad():
                for part in [n for n in self._values if n.startswith(around)]:
                    self.model.get_parameter(part).copy_(self._values.pop(part))
            adapters()[student.mrl_row["adapter"]].leave(parent_of(self.model, name))
            self._names.remove(name)
        if not self._names:
            for hook in self._hooks:
                hook.remove()

    def fold_(self) -> None:
        """Turns every mixer to its inference form, in eval mode: norms go into the region convolutions before them.

        For prediction and export. Save before it, and calibrate or train before it; `restore()` still gives the originals.

        Raises:
            SwapError: the mixers are folded already, or their norms were converted.

        Example:
            >>> import timm, torch
            >>> net, x = timm.create_model("test_vit", img_size=32).eval(), torch.randn(1, 3, 32, 32)
            >>> handle = swap_(net, __import__("mrl").plan(net, region=2))
            >>> before = net(x)
            >>> handle.fold_()
            >>> torch.allclose(net(x), before, atol=1e-5)
            True
        """
        for mixer in self.mixers().values():
            mixer.eval()
            mixer.mrl.fold_()

    def discard_originals(self) -> None:
        """Frees the copies of the original weights; `restore`, `disabled` and `mix` are no longer possible."""
        self.mix(1.0)
        self._kept.clear()
        self._values.clear()

    def fix_grid(self, grid: tuple[int, int] | None) -> None:
        """Fixes the (H, W) of the tokens, for an export to one size; None goes back to looking."""
        for each in self._grids:
            each.fixed = grid

    def _need_originals(self, verb: str) -> None:
        if self._names and not self._kept:
            raise SwapError(f"handle.{verb}(): the originals were not kept; swap with SwapConfig(keep_original=True).")


def _blend(teacher: nn.Module, alpha: float) -> Any:
    """A forward hook that mixes a module's answer with its teacher's."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ours: Any) -> Any:
        teacher.train(module.training)
        theirs = teacher(*args, **kwargs)
        return tree_map(lambda a, b: torch.lerp(a, b, alpha) if isinstance(a, Tensor) else a, theirs, ours)

    return hook


def swap_(model: nn.Module, plan: Plan) -> Handle:
    """Exchanges the plan's modules for MRL in place: all of them, or, on any failure, none.

    Every replacement is built and tried (same output tree, dtype and shape as the original's) before the first is set.
    It holds the same Linear objects under the same names, so the trained weights are the starting point.

    Args:
        model: the model that was planned.
        plan: from `mrl.plan`.

    Raises:
        SwapError: the model is not the one that was planned, or a replacement does not fit.

    Example:
        >>> import timm, torch
        >>> net = timm.create_model("test_vit", img_size=(32, 48)).eval()
        >>> x = torch.randn(1, 3, 32, 48)
        >>> before = net(x)
        >>> handle = swap_(net, __import__("mrl").plan(net, region=1))
        >>> torch.allclose(net(x), before, atol=1e-5)
        True
    """
    refuse_wrapped(model)
    missing = [n for n in plan.names if n not in plan.sites or not _is(model, n, plan.sites[n].module)]
    if missing:
        raise SwapError(
            f"swap_: {missing[0]} is not the module that was planned; call mrl.plan on this very model, then swap_."
        )
    networks: dict[int, tuple[Grid, nn.Module]] = {}
    built: dict[str, nn.Module] = {}
    for row in plan.rows:
        if row.action == "swap":
            site = plan.sites[row.name]
            adapter = adapters()[row.adapter]
            if id(site.owner) not in networks:
                networks[id(site.owner)] = (adapter.grid(site), adapter.hook_point(site))
            grid = networks[id(site.owner)][0]
            built[row.name] = _build(site, row, plan.config, grid)
    kept = {}
    if plan.config.keep_original:
        for name in built:
            site = plan.sites[name]
            teacher = copy.deepcopy(adapters()[site.adapter].original(site)).requires_grad_(False)
            kept[name] = _Kept(site.module, teacher)
    for name, mixer in built.items():
        put(model, name, mixer)
        adapters()[plan.sites[name].adapter].enter(parent_of(model, name))
    hooks = [point.register_forward_hook(grid) for grid, point in networks.values() if point is not None]
    handle = Handle(model, plan, [grid for grid, _ in networks.values()], kept, hooks)
    plan.sites = {}
    return handle


def _build(site: Site, row: PlanRow, config: SwapConfig, grid: Grid) -> nn.Module:
    """The replacement, tried on a small random grid against the original."""
    adapter = adapters()[row.adapter]
    mixer = adapter.build(site, tuple(row.region), config, grid)
    mixer.mrl_row = {"name": row.name, "adapter": row.adapter, "region": list(row.region), "config": _stored(config)}
    seen, grid.fixed = grid.fixed, adapter.probe_grid(site, tuple(row.region))
    try:
        args, kwargs = adapter.call(site, adapter.probe_input(site, grid.fixed, 2), grid.fixed)
        with torch.no_grad(), evaluating(mixer, site.module):
            ours, theirs = mixer(*args, **kwargs), adapter.original(site)(*args, **kwargs)
    finally:
        grid.fixed = seen
    if not _same_form(ours, theirs):
        raise SwapError(
            f"{row.name}: the replacement returned {_form(ours)} where the original returns {_form(theirs)}; please report this model."
        )
    return mixer


def _stored(config: SwapConfig) -> dict[str, Any]:
    """The choices that make the module what it is; keeping originals is the handle's business."""
    return {k: v for k, v in config.to_dict().items() if k != "keep_original"}


def _same_form(a: Any, b: Any) -> bool:
    """Whether two answers have one form, where None may stand for weights that are not computed."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        a, b = zip(*((x, None if x is None else y) for x, y in zip(a, b, strict=True)), strict=True)
    return _form(a) == _form(b) and all(
        torch.isfinite(t).all() for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, Tensor)
    )


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_form, value))
    return type(value).__name__


def _is(model: nn.Module, name: str, module: nn.Module) -> bool:
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Sets a submodule by its dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def parent_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds a submodule of this dotted name."""
    return model.get_submodule(name.rpartition(".")[0])


def _copy_state(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers in place, so that optimizers and shared references stay valid."""
    values = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, own in (*target.named_parameters(), *target.named_buffers()):
        own.copy_(values[name])
