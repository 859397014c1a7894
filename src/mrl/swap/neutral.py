"""What can be set in a mixer without training: norm statistics that change nothing, and temperatures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mrl.blocks.regions import RegionNorm
from mrl.swap.core import RegionCore

TEMPERATURES = (0.5, 0.7, 1.4, 2.0, 2.8)


@torch.no_grad()
def collect_statistics(mixers: list[nn.Module], run: Callable[[], object]) -> None:
    """Sets the running statistics of every region norm from what passes through it in `run()`, leaving its function in eval alone.

    With running mean m and variance s, gain sqrt(s + eps) and bias m give back the input; a norm that was not the
    identity keeps its affine function by the same change of variables.

    Args:
        mixers: swapped modules in eval mode.
        run: passes images through the model.
    """
    norms = [m for mixer in mixers for m in mixer.modules() if isinstance(m, RegionNorm)]
    sums = {norm: [0, 0.0, 0.0] for norm in norms}

    def gather(norm: RegionNorm, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).double()
        entry = sums[norm]
        entry[0] += len(x)
        entry[1] = entry[1] + x.sum(0)
        entry[2] = entry[2] + x.square().sum(0)

    hooks = [norm.register_forward_pre_hook(gather) for norm in norms]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for norm, (count, total, squares) in sums.items():
        if count:
            mean = total / count
            change_statistics(norm, mean, (squares / count - mean.square()).clamp(min=0))


@torch.no_grad()
def change_statistics(norm: RegionNorm, mean: Tensor, var: Tensor) -> None:
    """Gives a norm other running statistics and the gain and bias with which its function in eval stays the same.

    Args:
        norm: the norm, changed in place.
        mean: new running mean, (C,).
        var: new running variance, (C,).

    Example:
        >>> norm = RegionNorm(2).eval()
        >>> x = torch.randn(1, 2, 2, 2)
        >>> before = norm(x)
        >>> change_statistics(norm, torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0]))
        >>> torch.allclose(norm(x), before, atol=1e-6)
        True
    """
    gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - gain * norm.running_mean.double()
    norm.weight.copy_(gain * torch.sqrt(var.double() + norm.eps))
    norm.bias.copy_(shift + gain * mean.double())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


@torch.no_grad()
def search_temperature(core: RegionCore, error: Callable[[], Tensor]) -> None:
    """One factor a head on the logits of the region tokens, the best of a short list by `error()`; folded into the query norm.

    Args:
        core: the mixer's new part, changed in place.
        error: the mixer's error with what is set now.
    """
    width = core.dim // core.num_heads
    norm = core.norm_q
    best = float(error())
    for head in range(core.num_heads):
        part = slice(head * width, (head + 1) * width)
        weight, bias = norm.weight[part].clone(), norm.bias[part].clone()
        chosen = 1.0
        for factor in TEMPERATURES:
            norm.weight[part], norm.bias[part] = weight * factor, bias * factor
            found = float(error())
            if found < best:
                best, chosen = found, factor
        norm.weight[part], norm.bias[part] = weight * chosen, bias * chosen
