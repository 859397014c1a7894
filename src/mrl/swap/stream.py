"""One pass in closed form along the residual stream: every projection answers for the errors made before it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mrl.run import progress
from mrl.swap.apply import Handle
from mrl.swap.calls import first_tensor, rows_of
from mrl.swap.ridge import Ridge, output_projection, put_linear, values_of

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
IMAGES = 1500  # for fitting and choosing together
CHUNK = 32  # images at a time, where it need not be all
ELEMENTS = 500_000_000  # numbers of the teacher's stream kept at a time, in half precision: 1 GB
WIDEST = 250_000_000  # numbers of one layer's input: 1 GB
SHARE = 0.2  # weight of an image's mean, and of each prefix token, beside its positions
CAP = 30.0  # how much more at most what varies little between images counts
CLOSE = 1e-3  # relative error up to which a tensor is taken for stream + gain * branch


@dataclass
class Joint:
    """A Linear whose output reaches the residual stream: stream after = stream before + gain * (its output).

    Args:
        linear: its dotted name.
        before: the module whose first input is the stream before the branch.
        after: the module whose first input (`at_end` False) or output (True) is the stream after it.
        at_end: see `after`.
        mixer: the swapped module of the block; its layout and prefix tokens count.
        elements: numbers that one image brings to the Linear, and to its target.
        gain: per channel, (C,); None where no stream was found: the Linear then aims at the teacher's own output.
    """

    linear: str
    before: str
    after: str
    at_end: bool
    mixer: str
    elements: tuple[int, int]
    gain: Tensor | None = None


@dataclass
class Seen:
    """What passed through blocks once: first inputs and outputs by module, in the order of the calls; modules called twice."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    batch: int = 1

    def elements(self, name: str) -> tuple[int, int]:
        """Numbers an image in the first input and in the output of a module."""
        return self.inputs[name].numel() // self.batch, self.outputs[name].numel() // self.batch


@torch.no_grad()
def find_joints(handle: Handle, images: Tensor, *, blocks: bool = True) -> list[Joint]:
    """The Linears that write to the residual stream, in the order in which they run, found by what passes through.

    In every block around a mixer the stream after the mixer is looked for among the inputs of the modules that run after
    it (a norm, as a rule): it must equal the block's input plus a factor a channel times the mixer's output. The same of the
    block's output and the last Linear in it. Nothing is assumed of names. Where a block is built otherwise (norms after
    the sum, windows), only the mixer's projection is taken, and aims at the teacher's own output. What runs more than once in a
    pass is left out: it cannot be solved for one place.

    Args:
        handle: of the swapped model, in eval mode.
        images: a few, (B, 3, H, W).
        blocks: also the last Linear of each block.

    Example:
        >>> import timm, mrl
        >>> net = timm.create_model("test_vit", img_size=32).eval()
        >>> handle = mrl.swap_(net, mrl.plan(net, region=2))
        >>> [joint.linear for joint in find_joints(handle, torch.randn(2, 3, 32, 32))][:2]
        ['blocks.0.attn.proj', 'blocks.0.mlp.fc2']
    """
    mixers = handle.mixers()
    with _watching(handle.model, {name.rpartition(".")[0] for name in mixers}) as seen:
        handle.model(images)
    seen.batch = len(images)
    found: dict[str, Joint] = {}
    for name, mixer in mixers.items():
        block, projection = name.rpartition(".")[0], output_projection(mixer)
        own = next((f"{name}.{n}" for n, m in mixer.named_modules() if m is projection), None)
        if own not in seen.outputs or name not in seen.outputs or {own, name, block} & seen.repeated:
            continue
        if not torch.equal(seen.outputs[own].flatten(), seen.outputs[name].flatten()):
            continue  # something of the mixer's comes after its projection
        middle = _stream_after(seen, block, name)
        if middle is None:
            found[own] = Joint(own, block, name, True, name, seen.elements(own))
            continue
        after, gain = middle
        found[own] = Joint(own, block, after, False, name, seen.elements(own), gain)
        last = [n for n in seen.outputs if n.startswith(f"{block}.") and not n.startswith(f"{name}.")]
        last = [n for n in last if type(handle.model.get_submodule(n)) is nn.Linear and n not in seen.repeated]
        gain = _gain(seen.outputs[block], seen.inputs[after], seen.outputs[last[-1]]) if last and blocks else None
        if gain is not None:
            found[last[-1]] = Joint(last[-1], after, block, True, name, seen.elements(last[-1]), gain)
    return list(found.values())


def _stream_after(seen: Seen, block: str, mixer: str) -> tuple[str, Tensor] | None:
    """The first module after the mixer that reads block input + gain * mixer output, with that gain."""
    order = list(seen.inputs)
    for name in order[order.index(mixer) + 1 :]:
        if name.startswith(f"{block}.") and not name.startswith(f"{mixer}.") and name not in seen.repeated:
            gain = _gain(seen.inputs[name], seen.inputs[block], seen.outputs[mixer])
            if gain is not None:
                return name, gain
    return None


def _gain(after: Tensor, before: Tensor, branch: Tensor) -> Tensor | None:
    """Factors g (C,) with after = before + g * branch, or None where no such factor fits."""
    if not after.shape == before.shape == branch.shape:
        return None
    change, branch = ((t.float()).flatten(0, -2) for t in (after - before, branch))
    gain = (change * branch).sum(0) / branch.square().sum(0).clamp(min=1e-20)
    rest = (change - gain * branch).square().sum() / change.square().sum().clamp(min=1e-20)
    return gain if float(rest) <= CLOSE**2 and float(gain.abs().amax()) > 0 else None


@contextlib.contextmanager
def _watching(model: nn.Module, parents: set[str]) -> Iterator[Seen]:
    """First inputs and outputs of these modules and of all inside them, in the order of the calls."""
    seen, hooks = Seen(), []
    inside = tuple(f"{parent}." if parent else "" for parent in parents)
    for name, module in model.named_modules():
        if name in parents or name.startswith(inside):

            def enter(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                if name in seen.inputs:
                    seen.repeated.add(name)
                if (first := first_tensor((args, kwargs))) is not None:
                    seen.inputs.setdefault(name, first)

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if (first := first_tensor(output)) is not None:
                    seen.outputs.setdefault(name, first)

            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def follow_stream(
    handle: Handle,
    images: Tensor,
    held: Tensor,
    *,
    blocks: bool = True,
    autocast: Callable[[], Any] = contextlib.nullcontext,
) -> int:
    """Solves every joint in the order of the network, with the student's own inputs and the teacher's stream as the target.

    What reaches a Linear in the student already carries the errors of all mixers before it; its weight and bias are set
    to the ridge solution that brings the stream after it back to the teacher's, pulled toward their present values:
    min |gain (Y W^T + b) + stream before - teacher's stream after|^2, every image's mean and every prefix token counted with a
    fifth of the weight of all its positions, or up to 30 times that where they vary less between images. One forward pass does it: the images go through together, and each
    Linear is solved just before it runs. The strength of the pull is the best on the held-out images, or nothing changes.

    Args:
        handle: of the swapped model, in eval mode, with its originals.
        images: to fit on, (B, 3, H, W); as many as memory allows are used, at most 1,500 with the held-out ones.
        held: held-out images that choose the strength, on the model's device.
        blocks: also solve the last Linear of each block, not the mixers' projections alone.
        autocast: the precision of the passes, with `cache_enabled=False`: weights change inside them.

    Returns:
        How many Linears were changed.

    Reference:
        The sequential pass of least-squares pruning and quantisation (MiR, arXiv:2201.02620; PRACTISE, arXiv:2202.07861);
        solving inside one forward pass, the rows and their weights are ours.

    Example:
        >>> import timm, mrl
        >>> net = timm.create_model("test_vit", img_size=32).eval()
        >>> handle = mrl.swap_(net, mrl.plan(net, region=2))
        >>> _ = net.blocks[0].attn.proj.weight.data.mul_(1.5)  # the student's; the teacher keeps its own
        >>> follow_stream(handle, torch.randn(24, 3, 32, 32), torch.randn(8, 3, 32, 32)) > 0
        True
    """
    joints = find_joints(handle, held[:2], blocks=blocks)
    if not joints:
        return 0
    if blocks:
        handle.keep_blocks()
    count = int(min(IMAGES, WIDEST // max(max(joint.elements) for joint in joints)))
    held = held[: max(1, count // 5)]
    images = torch.cat([images[: max(1, count - len(held))].to(held.device), held])
    with autocast():
        return _Pass(handle, joints, images, len(images) - len(held)).run()


class _Enough(Exception):
    """The teacher has been asked all that is wanted."""


class _Pass:
    """One forward pass of the student in which every joint is solved before it runs.

    The teacher's stream is asked for some joints at a time, from inside the pass, so that it never lies in memory as a whole.
    """

    def __init__(self, handle: Handle, joints: list[Joint], images: Tensor, n_fit: int) -> None:
        self.handle, self.joints, self.images, self.n_fit = handle, joints, images, n_fit
        self.mixers = handle.mixers()
        self.goals: dict[str, list[tuple[float, Tensor]]] = {}
        self.stream: Tensor | None = None
        self.asking, self.changed = False, 0

    def run(self) -> int:
        """Runs it; how many Linears changed."""
        get = self.handle.model.get_submodule
        with contextlib.ExitStack() as stack, progress("calibrating along the stream", len(self.joints)) as advance:
            for joint in self.joints:
                if joint.gain is not None:
                    stack.callback(get(joint.before).register_forward_pre_hook(self._keep, with_kwargs=True).remove)
                solve = functools.partial(self._solve, joint, advance)
                stack.callback(get(joint.linear).register_forward_pre_hook(solve).remove)
            self.handle.model(self.images)
        return self.changed

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The stream before the next branch."""
        if not self.asking:
            self.stream = first_tensor((args, kwargs))

    def _solve(self, joint: Joint, advance: Callable[[], None], linear: nn.Module, args: tuple) -> None:
        if self.asking:
            return
        if joint.linear not in self.goals:
            self._ask(self.joints.index(joint))
        goal = torch.cat([scale * part.float() for scale, part in self.goals.pop(joint.linear)])
        mixer = self.mixers[joint.mixer]
        before = None if joint.gain is None else rows_of(mixer, self.stream)
        branch = _Branch(linear, joint.gain, mixer.mrl.num_prefix_tokens, rows_of(mixer, args[0]), before, goal)
        self.changed += branch.solve(self.n_fit)
        advance()

    def _ask(self, first: int) -> None:
        """What the teacher has where this joint ends, and the next ones as memory allows; half precision, scaled."""
        size = [len(self.images) * joint.elements[1] for joint in self.joints[first:]]
        n = next((i for i in range(1, len(size)) if sum(size[: i + 1]) > ELEMENTS), len(size))
        joints = self.joints[first : first + n]
        self.goals = {joint.linear: [] for joint in joints}
        self.asking = True
        try:
            with self.handle.disabled(), contextlib.ExitStack() as stack:
                for joint in joints:
                    module = self.handle.model.get_submodule(joint.after)
                    put = functools.partial(self._put, joint, joint is joints[-1])
                    if joint.at_end:
                        hook = module.register_forward_hook(put)
                    else:
                        hook = module.register_forward_pre_hook(put, with_kwargs=True)
                    stack.callback(hook.remove)
                for chunk in self.images.split(CHUNK):
                    with contextlib.suppress(_Enough):
                        self.handle.model(chunk)
        finally:
            self.asking = False

    def _put(self, joint: Joint, last: bool, module: nn.Module, args: tuple, other: Any) -> None:
        """Keeps a module's output (`other`, where the joint ends with it) or first input (`other` are keywords)."""
        rows = rows_of(self.mixers[joint.mixer], first_tensor(other if joint.at_end else (args, other)))
        scale = float(rows.abs().amax().clamp(min=1e-12)) / 1e4
        self.goals[joint.linear].append((scale, (rows / scale).half()))
        if last:
            raise _Enough


def _weights(goal: Tensor, prefix: int) -> tuple[float, float]:
    """How much a prefix token and an image's mean count beside a position: more where less varies between images."""
    n = goal.shape[1] - prefix
    parts = [goal[:, prefix:], goal[:, :prefix] if prefix else goal, goal[:, prefix:].mean(1)]
    varies = [float(t.var(0, correction=0).mean()) for t in parts]
    return tuple(SHARE * n * min(max(varies[0] / max(v, 1e-12), 1.0), CAP) for v in varies[1:])


class _Branch:
    """The least-squares problem of one joint."""

    def __init__(
        self, linear: nn.Module, gain: Tensor | None, prefix: int, y: Tensor, before: Tensor | None, goal: Tensor
    ) -> None:
        self.linear, self.prefix, self.y = linear, prefix, y
        self.weights = _weights(goal, prefix)
        self.gain = torch.ones_like(goal[0, 0]) if gain is None else gain
        self.target = goal if before is None else goal.sub_(before).div_(self.gain)
        weak = self.gain.abs() < CLOSE * self.gain.abs().amax()
        if weak.any():  # a channel that hardly reaches the stream keeps what it has
            for part, y in zip(self.target.split(CHUNK), self.y.split(CHUNK), strict=True):
                part[..., weak] = self._answer(y)[..., weak]

    def _answer(self, y: Tensor) -> Tensor:
        bias = self.linear.bias
        with torch.autocast(y.device.type, enabled=False):
            return nn.functional.linear(y.float(), self.linear.weight.float(), None if bias is None else bias.float())

    def solve(self, n_fit: int) -> bool:
        """Sets the Linear to the best of the strengths on the images after the first `n_fit`; whether one was better."""
        with torch.autocast(self.y.device.type, enabled=False):
            sums = Ridge(self.linear)
            for y, target, weight in self._parts(slice(None, n_fit)):
                sums.add(y, target, weight)
            candidates = [values_of(self.linear), *(sums.solve(strength) for strength in STRENGTHS)]
            errors = []
            for values in candidates:
                put_linear(self.linear, values)
                errors.append(self._error(slice(n_fit, None)))
            best = min(range(len(errors)), key=lambda i: errors[i] if math.isfinite(errors[i]) else math.inf)
            put_linear(self.linear, candidates[best])
        return best > 0

    def _parts(self, which: slice) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Positions, prefix tokens and means over the positions of these images, each with the weight of a row."""
        for y, target in zip(self.y[which].split(CHUNK), self.target[which].split(CHUNK), strict=True):
            yield y[:, self.prefix :], target[:, self.prefix :], 1.0
            if self.prefix:
                yield y[:, : self.prefix], target[:, : self.prefix], self.weights[0]
            yield y[:, self.prefix :].mean(1), target[:, self.prefix :].mean(1), self.weights[1]

    def _error(self, which: slice) -> float:
        return sum(
            weight * float(((self._answer(y) - target) * self.gain).square().sum())
            for y, target, weight in self._parts(which)
        )
