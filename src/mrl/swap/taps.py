"""The local convolution and the local gain of a mixer by least squares, without training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from mrl.blocks.regions import broadcast_regions
from mrl.swap.calls import Call, rows_of
from mrl.swap.core import RegionCore
from mrl.swap.ridge import output_projection

STEPS = 2  # Gauss-Newton: taps and gain multiply each other
ITERATIONS = 12  # of conjugate gradients a step
POSITIONS = 10_000  # of the teacher's calls that are enough
PULL = 1e-2  # toward the present values, in units of the diagonal


@torch.no_grad()
def fit_taps(mixer: nn.Module, calls: Sequence[Call], autocast: Callable[[], Any] = contextlib.nullcontext) -> bool:
    """Sets a mixer's local taps, their bias and a learnable local gain to the least squares of its output on these calls.

    With z = conv(regions + gain * source; taps) + bias and the output projection P held: min |P z + b - teacher|^2 over the
    positions, by Gauss-Newton steps on (taps, bias, gain), each solved by conjugate gradients with a pull toward the present
    values. Any kernel and group size; no matrix of the size (taps)^2 is formed.

    Args:
        mixer: the swapped module in eval mode.
        calls: of the teacher, with its answers.
        autocast: the precision in which the calls are repeated; the problem is solved in float32.

    Returns:
        Whether there was something to fit: not where the output projection is wrapped (LoRA, quantisation), or does not
        follow the convolution directly.

    Reference:
        Least squares of one layer on its teacher's output is MiR's (arXiv:2201.02620); taps and gain together are ours.

    Example:
        >>> import timm, mrl
        >>> net = timm.create_model("test_vit", img_size=64).eval()
        >>> attention, x = net.blocks[0].attn, torch.randn(4, 17, 64)
        >>> call = Call((x,), {}, attention(x).detach())
        >>> handle = mrl.swap_(net, mrl.plan(net, region=2))
        >>> handle.fix_grid((4, 4))
        >>> fit_taps(net.blocks[0].attn, [call])
        True
        >>> bool(net.blocks[0].attn.mrl.local_gain.abs().sum() > 0)
        True
    """
    linear = output_projection(mixer)
    if linear is None:
        return False
    with autocast():
        maps = [_maps(mixer, linear, call) for call in calls]
    if not maps or any(found is None for found in maps):
        return False
    regions, source, target = (torch.cat(parts) for parts in zip(*maps, strict=True))
    with torch.autocast(regions.device.type, enabled=False):
        taps = Taps(mixer.mrl, linear, regions, source, target)
        for _ in range(STEPS):
            taps.step()
    return True


class Taps:
    """The least-squares problem of one mixer's local part.

    Args:
        core: the mixer's new part, changed by `step`.
        linear: the output projection, held.
        regions: broadcast region tokens, (B, C, H, W).
        source: the local source, (B, C, H, W).
        target: the teacher's output, (B, C_out, H, W).
    """

    def __init__(self, core: RegionCore, linear: nn.Linear, regions: Tensor, source: Tensor, target: Tensor) -> None:
        self.conv, self.regions, self.source = core.local, regions, source
        self.gain = core.local_gain
        self.projection = linear.weight.float()
        self.target = target if linear.bias is None else target - linear.bias.float()[:, None, None]
        learned = [self.gain] if isinstance(self.gain, nn.Parameter) else []
        self.unknown = [self.conv.weight, self.conv.bias, *learned]

    def local(self, weight: Tensor, bias: Tensor, *gain: Tensor) -> Tensor:
        """The convolution's output for these values, (B, C, H, W)."""
        return self.convolve(self.regions + (_wide(gain[0]) if gain else self.gain) * self.source, weight, bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of a map with these taps."""
        return conv2d(x, weight, bias, padding=self.conv.padding, groups=self.conv.groups)

    def step(self) -> None:
        """One Gauss-Newton step: taps and gain multiply each other, so it takes more than one."""
        now = [p.detach().float() for p in self.unknown]
        z, back = torch.func.vjp(self.local, *now)
        square = self.projection.T @ self.projection  # (C, C)

        def normal(step: list[Tensor]) -> list[Tensor]:
            change = self.local(*step[:2], *now[2:])
            if step[2:]:
                change = change + self.convolve(_wide(step[2]) * self.source, now[0])
            return list(back(torch.einsum("oc,bchw->bohw", square, change)))

        rest = self.target - torch.einsum("oc,bchw->bohw", self.projection, z)
        right = list(back(torch.einsum("oc,bohw->bchw", self.projection, rest)))
        found = _conjugate(normal, right, self._diagonal(now, square.diagonal()))
        for parameter, change in zip(self.unknown, found, strict=True):
            parameter.add_(change.to(parameter.dtype))

    def _diagonal(self, now: list[Tensor], square: Tensor) -> list[Tensor]:
        """About the diagonal of the normal equations for every unknown."""
        conv, mixed = self.conv, self.regions + (_wide(now[2]) if now[2:] else self.gain) * self.source
        energy = mixed.square().sum((0, 2, 3)).view(conv.groups, 1, -1)
        energy = energy.expand(-1, conv.out_channels // conv.groups, -1).flatten(0, 1)  # (C, channels of a group)
        found = [
            (square[:, None] * energy)[..., None, None].expand_as(conv.weight),
            square * (mixed.numel() / mixed.shape[1]),
        ]
        if now[2:]:
            each = square * self.source.square().sum((0, 2, 3))
            found.append(each if len(now[2]) > 1 else each.sum()[None])
        return [t.clamp(min=1e-12 * float(t.amax().clamp(min=1e-20))) for t in found]


def _maps(mixer: nn.Module, linear: nn.Linear, call: Call) -> tuple[Tensor, Tensor, Tensor] | None:
    """Broadcast regions, local source and the teacher's answer as (B, C, H, W), where the projection follows directly."""
    core, seen = mixer.mrl, {}
    own = core._local

    def local(source: Tensor, regions: Tensor, height: int, width: int) -> Tensor:
        seen["local"] = (source, regions, height, width, own(source, regions, height, width))
        return seen["local"][-1]

    core._local = local
    hook = linear.register_forward_pre_hook(lambda module, args: seen.__setitem__("linear", args))
    try:
        call.run(mixer)
    finally:
        hook.remove()
        del core._local
    if len(seen) < 2:
        return None
    source, regions, height, width, mixed = seen["local"]
    prefix, answer = core.num_prefix_tokens, rows_of(mixer, call.output)
    read = rows_of(mixer, seen["linear"][0])[:, prefix:]
    if read.shape != mixed.shape or not torch.equal(read, mixed):
        return None
    rows = -(-height // core.region[0])
    spread = broadcast_regions(regions.unflatten(1, (rows, -1)), height, width, core.region)
    as_map = (t.unflatten(1, (height, width)) for t in (source, answer[:, prefix:]))
    spread, source, answer = (t.float().permute(0, 3, 1, 2) for t in (spread, *as_map))
    return spread, source, answer


def _wide(factor: Tensor) -> Tensor:
    """A factor a channel, or one for all, beside maps (B, C, H, W)."""
    return factor.view(-1, 1, 1)


def _conjugate(normal: Callable, right: list[Tensor], scale: list[Tensor]) -> list[Tensor]:
    """Conjugate gradients for (normal + PULL * scale) x = right, preconditioned by scale."""
    x = [torch.zeros_like(t) for t in right]
    rest, ready = right, [r / s for r, s in zip(right, scale, strict=True)]
    way, before = ready, _dot(rest, ready)
    for _ in range(ITERATIONS):
        if before <= 1e-20:
            break
        image = [a + PULL * s * w for a, s, w in zip(normal(way), scale, way, strict=True)]
        length = before / _dot(way, image)
        x = [a + length * w for a, w in zip(x, way, strict=True)]
        rest = [a - length * b for a, b in zip(rest, image, strict=True)]
        ready = [r / s for r, s in zip(rest, scale, strict=True)]
        now = _dot(rest, ready)
        way, before = [r + now / before * w for r, w in zip(ready, way, strict=True)], now
    return x


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
